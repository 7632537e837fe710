"""Which controls the ``ns`` level has, which of them a cell cannot do without, and what their attempt found. Pure.

Covered: the essential ones are attempted from inside an empty cell when the node starts (native/check.c); one that
does not hold stops the node. Not covered: the optional ones, which only lower what is told or limited; each says so.
"""

from __future__ import annotations

from vallum.core.errors import ControlMissing
from vallum.sandbox.base import Doors

ESSENTIAL: tuple[tuple[str, str, str], ...] = (
    ("cell.capabilities", "a guest has capabilities or can gain them", "use Linux 5.12 or newer"),
    ("cell.seccomp", "system calls that must be closed are open", "use a kernel with CONFIG_SECCOMP_FILTER"),
    (
        "cell.namespaces",
        "a guest can make namespaces or mounts, or sees processes that are not its own",
        "use a kernel with user, mount and PID namespaces",
    ),
    ("cell.proc", "a guest can write kernel settings", "use a kernel with mount_setattr (Linux 5.12 or newer)"),
    (
        "net.redirect",
        "connections do not arrive at the cell's door, or there is another interface than loopback",
        "load the kernel modules nf_tables, nft_chain_nat and nft_redir",
    ),
    (
        "net.ipv6",
        "IPv6 connections do not arrive at the cell's door",
        "load the kernel modules nf_tables, nft_chain_nat and nft_redir, or start the kernel with ipv6.disable=1",
    ),
    ("cell.devices", "a guest can make device nodes", "report this as a bug"),
)
"""(control, what was found when it does not hold, what to do), in the order of the bits of native/check.c."""

FULL_LANDLOCK_ABI = 6
"""The first with scopes for signals and abstract Unix sockets (Linux 6.12)."""


def check_essential(broken: int) -> None:
    """Stop where a cell would have a hole.

    Args:
        broken: the bits of ``check_walls()``.

    Raises:
        ControlMissing: names every control that does not hold, what was found, and what to do.
    """
    found = [
        f"{name}: {what}; {remedy}" for bit, (name, what, remedy) in enumerate(ESSENTIAL) if broken & 1 << bit
    ] or (["the walls could not be tried"] if broken else [])
    if found:
        raise ControlMissing(f"no cell is started on this machine: {'. '.join(found)}")


def describe(*, has_range: bool, why_not: str, doors: Doors, landlock: int) -> dict[str, str]:
    """Control -> tier, for a cell whose essential controls held. ``landlock``: the ABI in force, 0 for none."""
    enforced = "enforced"
    return {
        **{name: enforced for name, _, _ in ESSENTIAL},
        "net.dns": enforced,
        "cell.landlock": _describe_landlock(landlock),
        "cell.users": enforced
        if has_range
        else f"degraded: one user per cell, the node's own ({why_not}); run the node as root",
        "net.packets": enforced
        if doors.packets
        else "degraded: dropped packets are not seen; load the kernel module nfnetlink_log",
        "net.owners": enforced
        if doors.diag
        else "degraded: who owns a connection is not known; load the kernel module inet_diag",
    }


def _describe_landlock(abi: int) -> str:
    if abi >= FULL_LANDLOCK_ABI:
        return "enforced"
    if abi == 0:
        return (
            "degraded: no second wall behind the mount tree (this kernel has no Landlock); "
            "use Linux 6.12 or newer with CONFIG_SECURITY_LANDLOCK and lsm=landlock,..."
        )
    return (
        f"degraded: Landlock ABI {abi} has no scopes for signals and abstract sockets"
        f"{'' if abi >= 5 else ', nor for device ioctls'}; use Linux 6.12 or newer"
    )
