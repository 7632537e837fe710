"""Raw namespace work of the closed world: new network, mount and user namespaces for the calling process.

Covered: as root, and as an ordinary user where the kernel grants user namespaces.
Not covered: a multithreaded caller (the kernel refuses a new user namespace then).
Source: unshare(2), user_namespaces(7), mount_namespaces(7), prctl(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from vallum.core.errors import ControlMissing

NEWNS, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 19, 2, 4
_PR_SET_PDEATHSIG, _PR_CAP_AMBIENT = 1, 47
_CAP_NET_ADMIN, _CAP_NET_RAW, _CAP_SYS_ADMIN = 12, 13, 21
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move the calling process to new namespaces; with a user namespace first, keeping its ids, when it has no privilege.

    Raises:
        ControlMissing: the kernel does not grant them; says which switch to look at.
    """
    if _libc.unshare(flags) == 0:
        return
    if ctypes.get_errno() != 1 or os.geteuid() == 0:
        raise ControlMissing(
            f"cannot make namespaces: {os.strerror(ctypes.get_errno())}; a container needs CAP_SYS_ADMIN for it"
        )
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(flags | NEWUSER) != 0:
        raise ControlMissing(
            f"cannot make a user namespace: {os.strerror(ctypes.get_errno())}; allow them "
            "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0) or run this as root"
        )
    Path("/proc/self/setgroups").write_text("deny", "ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", "ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", "ascii")


def keep_privilege_over_exec(is_kept: bool) -> None:
    """Let programs that this process executes have its power over its own namespaces (``ip`` needs it), or not."""
    names = (_CAP_NET_ADMIN, _CAP_NET_RAW, _CAP_SYS_ADMIN)
    if not is_kept:
        _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
        return
    mask = sum(1 << name for name in names)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, data), "read the capabilities")
    data[2] |= mask & data[1]
    _check(_libc.capset(header, data), "make capabilities inheritable")
    for name in names:
        _check(_libc.prctl(_PR_CAP_AMBIENT, 2, name, 0, 0), "raise an ambient capability")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, however it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "set the parent-death signal")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)  # the parent was gone before the call


def detach_mounts() -> None:
    """Keep mounts made from here on to this mount namespace."""
    _mount(None, "/", None, _MS_REC | _MS_SLAVE)


def bind(source: str, target: str) -> None:
    """Show ``source`` at ``target`` (a link is followed, so what it points to is covered)."""
    _mount(source, os.path.realpath(target), None, _MS_BIND)


def mount_tmpfs(target: str) -> None:
    """An empty file system that goes with the namespace."""
    _mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NODEV)


def mount_proc() -> None:
    """A /proc of the current pid namespace."""
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    result = _libc.mount(
        None if source is None else os.fsencode(source), os.fsencode(target), None if kind is None else kind.encode(),
        ctypes.c_ulong(flags), None,
    )  # fmt: skip
    _check(result, f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise ControlMissing(
            f"the demo's closed world could not be made: cannot {what}: {os.strerror(ctypes.get_errno())}"
        )
