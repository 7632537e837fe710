"""Reading and writing control files, with errors that name the file and what to do.

Paths below a cgroup mount are never the guest's to shape (cgroupfs is not mounted in a cell, and a
delegated user owns single ``cgroup.procs`` files, never a directory), so plain paths are safe here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vallum.core.errors import SandboxError

_PIECE = 2048


def read_text(path: str, *, dir_fd: int | None = None) -> str:
    """Content of a control file.

    Raises:
        OSError: as the kernel says; a group that is gone gives ENOENT or ENODEV.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        data = part = os.read(fd, 65536)
        # The kernel gives whole lines, and a page of them in one piece: what is well below a page is all.
        while len(part) > _PIECE and (part := os.read(fd, 65536)):
            data += part
        return data.decode("ascii", "replace")
    finally:
        os.close(fd)


def write_text(path: str, value: str, *, dir_fd: int | None = None) -> None:
    """Write one value to a control file in one call.

    Raises:
        OSError: as the kernel says.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def set_quota(path: str, value: str, what: str) -> None:
    """Write a quota that was asked for.

    Raises:
        SandboxError: the kernel refuses it; names the controller's file and what to do.
    """
    try:
        write_text(path, value)
    except OSError as error:
        raise SandboxError(
            f"the {what} quota of the cell cannot be set: writing {value!r} to {path} failed ({error.strerror}); "
            f"make that cgroup controller writable for this user, or ask for no {what} limit"
        ) from error


def read_int(path: str) -> int | None:
    """The number in a control file; None where the file is missing or says ``max``."""
    try:
        return int(read_text(path))
    except (OSError, ValueError):
        return None


def parse_pairs(text: str) -> dict[str, int]:
    """``key value`` lines (``cpu.stat``, ``memory.events``, ``cgroup.events``) as a dictionary; other lines are skipped."""
    pairs: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            pairs[key] = int(value)
    return pairs


def read_pairs(path: str) -> dict[str, int]:
    """:func:`parse_pairs` of a file; empty where it cannot be read."""
    try:
        return parse_pairs(read_text(path))
    except OSError:
        return {}


def read_pids(path: str) -> list[int]:
    """Pids in a ``cgroup.procs`` file; empty once the group is gone. Pids outside our pid namespace (0) are left out."""
    try:
        return [pid for pid in map(int, read_text(path).split()) if pid > 0]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def make_dir(path: str) -> None:
    """Make a cgroup directory; one that exists is kept.

    Raises:
        SandboxError: it cannot be made.
    """
    try:
        Path(path).mkdir(0o755)
    except FileExistsError:
        return
    except OSError as error:
        raise SandboxError(
            f"the cgroup {path} cannot be made ({error.strerror}); run as root, or in a subtree delegated to this user "
            "(systemd: Delegate=yes)"
        ) from error


def remove_dir(path: str, *, timeout_s: float = 2.0) -> None:
    """Remove a cgroup directory; one that is gone is fine. Waits while its last processes leave the kernel.

    Raises:
        SandboxError: it is still busy after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0005
    while True:
        try:
            Path(path).rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise SandboxError(
                    f"the cgroup {path} cannot be removed ({error.strerror}); see which processes are in its cgroup.procs"
                ) from error
            # rmdir is refused for a moment after the last process became a zombie; v1 has no event for it.
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.02)
        else:
            return


def walk_bottom_up(root: str) -> list[str]:
    """Every cgroup directory at and below ``root``, children before parents; empty when there is none."""
    return [path for path, _, _ in os.walk(root, topdown=False, followlinks=False)]


def await_event(path: str, key: str, value: int, timeout_s: float) -> bool:
    """Wait until ``key`` of a ``cgroup.events`` file is ``value``. True when it is, also when the group is gone.

    The kernel wakes ``poll`` for POLLPRI at each change of the file, so nothing is polled in a loop.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    poller = select.poll()
    poller.register(fd, select.POLLPRI)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                if parse_pairs(os.pread(fd, 4096, 0).decode("ascii", "replace")).get(key) == value:
                    return True
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return True
                raise
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            poller.poll(left_s * 1000)
    finally:
        os.close(fd)


def send_kill(pids: Iterable[int]) -> None:
    """SIGKILL each pid; those gone already are fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_without_kernel_help(
    list_pids: Callable[[], list[int]],
    freeze: Callable[[], None],
    thaw: Callable[[], None],
    *,
    timeout_s: float = 2.0,
) -> None:
    """End every process that ``list_pids`` names, on kernels without ``cgroup.kill``.

    Frozen first: a frozen process can neither fork nor exit, so no pid of the list can have been
    given to a stranger between reading and killing, and a fork bomb cannot outrun the sweep.
    """
    deadline = time.monotonic() + timeout_s
    while list_pids():
        freeze()
        try:
            send_kill(list_pids())
        finally:
            thaw()
        if time.monotonic() >= deadline:
            return
        time.sleep(0.002)
