"""What /proc says about one process: bounded, and safe against the process dying or being replaced meanwhile.

Everything is read through one descriptor of ``/proc/PID``: when the process dies the kernel answers ESRCH,
so that facts of two processes with the same number are never mixed.

Covered: processes that die while they are read; argv of any size; bytes that are not text; a zombie leader
with living threads.
Not covered: ``argv`` is memory of the guest, which may rewrite it after exec. ``exe``, uid and parent are the kernel's.
"""

# ruff: noqa: PTH115, PTH208 - descriptors and tight loops, where Path has nothing to offer
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vallum.core.events import Process
from vallum.core.text import keep

ARGV_BYTES = 128 * 1024
ARGV_ARGS = 256
_PIECE = 2048
_CUT = "[vallum: the rest of argv was not kept]"
_GONE = (ProcessLookupError, FileNotFoundError, PermissionError)

UidMap = Sequence[tuple[int, int, int]]
"""Lines of ``/proc/PID/uid_map``: (first inside, first outside, count)."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Fields of ``/proc/PID/stat`` that identify a process and tell whether it lives."""

    state: str
    ppid: int
    start_ticks: int
    """Field 22: clock ticks after boot when it was forked; survives exec."""
    start_stack: int
    """Field 28: moves at every exec (ASLR); 0 where we may not see it."""

    @property
    def is_dead(self) -> bool:
        """Whether this thread has ended (threads of the process may live on)."""
        return self.state in "ZXx"


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as it was read, in one piece."""

    process: Process
    ppid: int
    stat: Stat


def parse_stat(raw: bytes) -> Stat | None:
    """Fields of a stat line, None when it is not one. The name in it may hold spaces, ``)`` and newlines."""
    close = raw.rfind(b")")
    fields = raw[close + 1 :].split()
    if close < 0 or len(fields) < 26:
        return None
    try:
        return Stat(
            state=chr(fields[0][0]), ppid=int(fields[1]), start_ticks=int(fields[19]), start_stack=int(fields[25])
        )
    except ValueError:
        return None


def parse_argv(raw: bytes, *, complete: bool) -> list[str]:
    """Arguments of a cmdline read, kept without loss; what was cut off is said in a last element."""
    if not raw:
        return []
    parts = raw.removesuffix(b"\0").split(b"\0")
    cut = not complete or len(parts) > ARGV_ARGS
    argv = [keep(part) for part in parts[:ARGV_ARGS]]
    return [*argv, _CUT] if cut else argv


def parse_uid_map(raw: bytes) -> list[tuple[int, int, int]]:
    """Lines of a uid_map; what is not three numbers is left out."""
    lines = (line.split() for line in raw.splitlines())
    return [(int(a), int(b), int(n)) for a, b, n in (f for f in lines if len(f) == 3 and all(x.isdigit() for x in f))]


def guest_uid(uid_map: UidMap, host_uid: int) -> int | None:
    """User id inside the cell of a host uid, None when the cell has no name for it."""
    for inside, outside, count in uid_map:
        if outside <= host_uid < outside + count:
            return inside + host_uid - outside
    return None


def parse_uid(status: bytes) -> int | None:
    """Real uid of a status file."""
    for line in status.splitlines():
        if line.startswith(b"Uid:"):
            fields = line.split()
            return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else None
    return None


@contextmanager
def open_pid(pid: int) -> Iterator[int]:
    """A descriptor of ``/proc/PID`` that never becomes another process.

    Raises:
        OSError: there is no such process.
    """
    fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(directory: int, name: str, limit: int) -> tuple[bytes, bool]:
    """(at most ``limit`` bytes, whether that is all of it) of a file of ``/proc/PID``.

    Raises:
        OSError: ESRCH when the process is gone, ENOENT when it has no such file.
    """
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        data = os.read(fd, min(limit + 1, 65536))
        # A page at least is given in one piece, so what is well below it is all.
        while len(data) > _PIECE and len(data) <= limit and (more := os.read(fd, min(limit + 1 - len(data), 65536))):
            data += more
    finally:
        os.close(fd)
    return data[:limit], len(data) <= limit


def read_stat(pid: int) -> Stat | None:
    """Stat of a live or zombie process; None when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except _GONE:
        return None
    try:
        return parse_stat(os.read(fd, 4096))
    except _GONE:
        return None
    finally:
        os.close(fd)


def is_alive(pid: int) -> bool:
    """Whether any thread of the process still runs. A dead leader with living threads is alive."""
    try:
        with open_pid(pid) as proc:
            stat = parse_stat(read_at(proc, "stat", 4096)[0])
            if stat is not None and not stat.is_dead:
                return True
            tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
            try:
                # A zombie waiting to be reaped lists itself alone; its threads vanish as they end.
                return any(entry != str(pid) for entry in os.listdir(tasks))
            finally:
                os.close(tasks)
    except _GONE:
        return False


def read_process(pid: int, uid_map: UidMap = ()) -> Seen | None:
    """A process as the host's kernel sees it; None when it is gone or a zombie.

    ``process.exe`` is the path as seen in the guest (with `` (deleted)`` when the file is no more), empty
    when there is none (kernel threads) or it was gone before it could be read. ``process.uid`` is the uid
    inside the cell under ``uid_map``, or the host's when no map is given.
    """
    try:
        with open_pid(pid) as proc:
            stat = parse_stat(read_at(proc, "stat", 4096)[0])
            if stat is None or stat.is_dead:
                return None
            argv = _argv_at(proc)
            try:
                exe = keep(os.readlink(b"exe", dir_fd=proc))
            except FileNotFoundError:
                exe = ""
            uid = parse_uid(read_at(proc, "status", 8192)[0])
            # Read again: an exec between the first and the last read would mix two programs.
            after = parse_stat(read_at(proc, "stat", 4096)[0])
            if after is not None and after.start_stack != stat.start_stack:
                argv = _argv_at(proc)
                exe = keep(os.readlink(b"exe", dir_fd=proc))
                stat = after
    except _GONE:
        return None
    shown = uid if uid is None or not uid_map else guest_uid(uid_map, uid)
    return Seen(Process(pid=pid, exe=exe, argv=argv, uid=shown), stat.ppid, stat)


def read_argv(pid: int) -> list[str]:
    """Arguments of a live process; empty when it is gone or has none."""
    try:
        with open_pid(pid) as proc:
            return _argv_at(proc)
    except _GONE:
        return []


def _argv_at(proc: int) -> list[str]:
    raw, is_complete = read_at(proc, "cmdline", ARGV_BYTES)
    return parse_argv(raw, complete=is_complete)


def read_uid_map(pid: int) -> list[tuple[int, int, int]]:
    """uid_map of a process, empty when it is gone."""
    try:
        with open_pid(pid) as proc:
            return parse_uid_map(read_at(proc, "uid_map", 65536)[0])
    except _GONE:
        return []


def pids_of_namespace(root_pid: int) -> list[int] | None:
    """Host pids in the pid namespace of ``root_pid``; None when that one is gone.

    A guest cannot leave its pid namespace, so this finds members whatever events were lost. It looks at
    every process of the machine (about 10 us each): for start and recovery, not for every event.
    """
    try:
        wanted = os.readlink(f"/proc/{root_pid}/ns/pid")
    except OSError:
        return None
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == wanted:
                    found.append(int(name))
            except OSError:
                continue
    return found
