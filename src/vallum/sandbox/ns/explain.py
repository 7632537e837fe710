"""What went wrong, in one sentence with what to do. Pure: (words of the C program, errno) -> an error."""

from __future__ import annotations

import errno
import os

from vallum.core.errors import CommandNotExecutable, CommandNotFound, GuestFileError, InvalidInput, SandboxError
from vallum.core.text import show
from vallum.sandbox.ns import wire

_NOT_EXECUTABLE = {errno.EACCES, errno.ENOEXEC, errno.EISDIR, errno.ELIBBAD, errno.EINVAL, errno.ETXTBSY, errno.ELOOP}

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "make namespaces",
        "allow user namespaces (sysctl user.max_user_namespaces, on Ubuntu apparmor_restrict_unprivileged_userns=0)",
    ),
    ("map user ids", "run as root, or without a range of ids (rootless)"),
    ("map group ids", "run as root, or without a range of ids (rootless)"),
    (
        "map the ids of the layer",
        "use a file system that supports idmapped mounts (ext4, xfs, btrfs, tmpfs) and Linux 5.19 or newer",
    ),
    ("nftables", "load the kernel modules nf_tables, nft_chain_nat, nft_redir, nft_log and nf_conntrack"),
    (
        "mount the overlay",
        "load the kernel module overlay (Linux 5.11 or newer) and keep cells on ext4, xfs, btrfs or tmpfs",
    ),
    (
        "mount /proc",
        "run outside of the container, or with an unmasked /proc (docker: --security-opt systempaths=unconfined)",
    ),
    ("cgroup", "let the node's user write to its cgroups, or run without them"),
    ("seccomp", "use a kernel with CONFIG_SECCOMP_FILTER"),
    ("too many requests", "create fewer cells at once"),
)


def name_of(number: int) -> str:
    """The kernel's word for an errno, e.g. ``ENOENT``."""
    return errno.errorcode.get(number, f"errno {number}")


def explain_build(text: str, number: int) -> SandboxError:
    """Why a cell could not be built."""
    reason = f"{os.strerror(number)} ({name_of(number)})" if number else "the kernel gave no reason"
    remedy = next((remedy for words, remedy in _REMEDIES if words in text), None)
    if number == errno.ENOSPC and remedy is None:
        remedy = "free disk space or inodes where the cells are kept"
    tail = f"; {remedy}" if remedy else ""
    return SandboxError(f"the cell could not be built: could not {show(text)}: {reason}{tail}")


def explain_seal(text: str, number: int) -> SandboxError:
    """Why a cell's layer could not be sealed."""
    if number == errno.ECANCELED:
        return SandboxError("the snapshot was given up: its work was cancelled or killed")
    remedy = "; free disk space or inodes where snapshots are kept" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    return SandboxError(
        f"the files of the cell could not be sealed: could not {show(text, 400)}: {os.strerror(number)} ({name_of(number)}){remedy}"
    )


def explain_spawn(stage: int, number: int, *, argv0: str, user: str, cwd: str) -> Exception:
    """Why a command did not start."""
    name = show(argv0)
    reason = os.strerror(number)
    if stage == wire.STAGE_EXEC:
        return _explain_exec(name, number)
    if stage == wire.STAGE_USER:
        if number == errno.ENOENT:
            return InvalidInput(
                f"there is no user {show(user)!r} in the cell; name one of its /etc/passwd, or give uid[:gid]"
            )
        if number == errno.EPERM:
            return InvalidInput(
                f"the user {show(user)!r} cannot be used in this cell (rootless cells have one user; 65535 is reserved)"
            )
        return InvalidInput(f"the user {show(user)!r} cannot be used: {reason}; give a name or uid[:gid]")
    if stage == wire.STAGE_CWD:
        return InvalidInput(
            f"the command cannot start in {show(cwd)!r}: {reason}; give a directory that its user may enter"
        )
    if stage == wire.STAGE_CLONE and number == errno.EAGAIN:
        return SandboxError(
            f"{name!r} could not be started: the cell's limit of processes is reached; raise pids or end some"
        )
    if number == errno.ENOMEM:
        return SandboxError(f"{name!r} could not be started: the cell is out of memory; raise its limit")
    return SandboxError(f"{name!r} could not be started: {reason} ({name_of(number)})")


def _explain_exec(name: str, number: int) -> Exception:
    reason = os.strerror(number)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return CommandNotFound(
            f"{name!r} was not found in the cell (nor, for a script, its interpreter); check the name and PATH"
        )
    if number == errno.E2BIG:
        return InvalidInput(
            f"the arguments and environment of {name!r} are larger than the kernel takes; pass them by file or stdin"
        )
    if number in _NOT_EXECUTABLE:
        return CommandNotExecutable(f"{name!r} cannot be executed in the cell: {reason}; check its mode and format")
    return SandboxError(f"{name!r} could not be executed in the cell: {reason} ({name_of(number)})")


def explain_file(stage: int, number: int, *, verb: str, path: str, user: str) -> Exception:
    """Why a file could not be read or written."""
    if stage == wire.STAGE_USER:
        return explain_spawn(stage, number, argv0=verb, user=user, cwd="")
    return GuestFileError(
        f"{show(path)!r} could not be {verb} in the cell as {show(user)!r}: {os.strerror(number)}", name_of(number)
    )
