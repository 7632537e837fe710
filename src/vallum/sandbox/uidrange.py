"""Host user ids for cells: each cell gets 65536 of its own, so that no two cells, and no cell and host user, share one.

Covered: nodes of several homes on one machine (locks in one directory of the machine), crashes (the
kernel drops a dead process's ``flock``), ranges given to others in ``/etc/subuid`` and ``/etc/subgid``,
and users and groups that exist. Not covered: programs that take ids without writing them down anywhere.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.sandbox.base import MIN_UID_RANGE

FIRST_ID = 0x2000_0000
"""Where our ranges begin: inside what systemd documents as the ids of containers (UIDS-GIDS.md)."""
RANGES = 4096
"""How many there are."""
LOCKS = Path("/run/vallum-uids")


@dataclass(frozen=True)
class IdRange:
    """Ids ``first`` to ``first + count - 1``."""

    first: int
    count: int

    def overlaps(self, other: IdRange) -> bool:
        """Whether they have an id in common."""
        return self.first < other.first + other.count and other.first < self.first + self.count


def parse_subids(text: str) -> list[tuple[str, IdRange]]:
    """Lines ``owner:first:count`` of ``/etc/subuid`` (subuid(5)); lines that are none are skipped."""
    found = []
    for line in text.splitlines():
        parts = line.split(":")
        if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal() and int(parts[2]) > 0:
            found.append((parts[0], IdRange(int(parts[1]), int(parts[2]))))
    return found


def parse_ids(text: str) -> list[int]:
    """Third field of each line of ``/etc/passwd`` or ``/etc/group``."""
    fields = (line.split(":") for line in text.splitlines())
    return [int(parts[2]) for parts in fields if len(parts) > 2 and parts[2].isdecimal()]


def find_subids(text: str, *, name: str, uid: int) -> IdRange | None:
    """The first range of at least 65536 ids that ``/etc/subuid`` (or subgid) gives to a user; None when there is none."""
    for owner, given in parse_subids(text):
        if owner in (name, str(uid)) and given.count >= MIN_UID_RANGE:
            return given
    return None


def list_free(taken: list[IdRange], *, start: int = 0) -> Iterator[int]:
    """First ids of our ranges that touch nothing of ``taken``, beginning at range number ``start`` and going round."""
    near = [one for one in taken if one.overlaps(IdRange(FIRST_ID, RANGES * MIN_UID_RANGE))]
    for turn in range(RANGES):
        first = FIRST_ID + (start + turn) % RANGES * MIN_UID_RANGE
        if not any(one.overlaps(IdRange(first, MIN_UID_RANGE)) for one in near):
            yield first


@dataclass
class Lease:
    """A range that is ours until :meth:`release`, or until this process ends."""

    ids: IdRange
    lock_fd: int

    def release(self) -> None:
        """Give it back. The cell must be gone, and its files deleted."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


class UidRanges:
    """Gives out ranges. Several processes may each have one of these over the same directory."""

    def __init__(self, locks: Path = LOCKS, etc: Path = Path("/etc")) -> None:
        """``locks`` is one directory for the whole machine, emptied by a reboot; made 0700 when missing.

        Raises:
            SandboxError: it cannot be made, or is somebody else's.
        """
        self._locks = locks
        self._leases: dict[int, Lease] = {}
        self._taken = read_taken(etc)
        try:
            locks.mkdir(mode=0o700, exist_ok=True)
            found = locks.lstat()
        except OSError as error:
            raise SandboxError(
                f"the directory of uid locks {locks} cannot be made: {error.strerror}; run as root"
            ) from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise SandboxError(
                f"{locks} is not a directory that only user {os.geteuid()} can write to, so its locks mean nothing; remove it"
            )

    def lease(self) -> Lease:
        """Take a free range. A random one is tried first, so that a range rests before it is used again.

        Raises:
            SandboxError: all 4096 are in use, or the directory cannot be written.
        """
        for first in list_free(self._taken, start=secrets.randbelow(RANGES)):
            fd = self._try_lock(first)
            if fd is not None:
                return Lease(IdRange(first, MIN_UID_RANGE), fd)
        raise SandboxError(
            f"all {RANGES} uid ranges of this machine are in use (locks in {self._locks}); end some cells"
        )

    def take(self) -> int:
        """:meth:`lease`, kept here by its first id until :meth:`give_back`."""
        lease = self.lease()
        self._leases[lease.ids.first] = lease
        return lease.ids.first

    def give_back(self, base: int) -> None:
        """Release what :meth:`take` gave. The cell must be gone, and its files deleted."""
        self._leases.pop(base).release()

    def _try_lock(self, first: int) -> int | None:
        path = self._locks / f"{first:08x}"
        try:
            # Never deleted: unlinking a lock file while another process opens it would let two hold "the same" lock.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SandboxError(f"the uid lock {path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise SandboxError(f"the uid lock {path} cannot be taken: {error.strerror}") from error
        return fd


def read_taken(etc: Path) -> list[IdRange]:
    """Every id that ``passwd``, ``group``, ``subuid`` and ``subgid`` in ``etc`` give to somebody; a missing file gives none."""
    taken = [given for name in ("subuid", "subgid") for _, given in parse_subids(_read(etc / name))]
    taken += [IdRange(one, 1) for name in ("passwd", "group") for one in parse_ids(_read(etc / name))]
    return taken


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
