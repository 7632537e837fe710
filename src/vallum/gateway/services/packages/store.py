"""The cache of package files on the host: content by name, whole or not there.

Covered: only this process writes (the directory is its user's, 0700, reached by a descriptor alone); a file appears
under its name by rename when it is complete and its digest was right; what is read is checked again; its size is
bounded, and what was used longest ago goes first. Not covered: others of the same user, and root.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import stat
from collections import OrderedDict

from vallum.gateway.services.packages.base import Digests

MAX_BYTES = 4 * 1024**3
MAX_ENTRIES = 100_000
_PART = ".part"
_BATCH = 256 * 1024

log = logging.getLogger(__name__)


class Store:
    """Files in one directory. On one event loop; a second process may use the directory at the same time."""

    def __init__(self, directory: int, max_bytes: int = MAX_BYTES) -> None:
        """``directory``: an open descriptor, the store's from now on. Raises OSError: it cannot be read."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        found = []
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if name.endswith(_PART) or not stat.S_ISREG(status.st_mode):
                    self._unlink(name)
                else:
                    found.append((status.st_mtime_ns, name, status.st_size))
        self._sizes.update((name, size) for _, name, size in sorted(found))
        self._total = sum(self._sizes.values())
        self._evict()

    @property
    def total_bytes(self) -> int:
        """How much is kept."""
        return self._total

    async def open(self, name: str, digests: Digests) -> tuple[int, int] | None:
        """A descriptor of a file (the caller's to close) and its size, when there is one and it has these digests."""
        if name not in self._sizes:
            return None
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            self._forget(name)
            return None
        try:
            if await asyncio.to_thread(_has_digests, fd, digests):
                os.utime(fd)
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                return fd, os.fstat(fd).st_size
        except OSError as error:
            log.warning("the package cache cannot be read: %s", error.strerror)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        log.warning("%s in the package cache is not what was put there; deleted", name)
        self._unlink(name)
        self._forget(name)
        return None

    def begin(self) -> Part:
        """A file that is not to be seen yet."""
        return Part(self, self._directory, self._max_bytes // 4)

    def add(self, name: str, size: int) -> None:
        """A part has got its name."""
        self._forget(name)
        self._sizes[name] = size
        self._total += size
        self._evict()

    def _evict(self) -> None:
        while self._sizes and (self._total > self._max_bytes or len(self._sizes) > MAX_ENTRIES):
            name = next(iter(self._sizes))
            self._unlink(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._total -= self._sizes.pop(name, 0)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._directory)


class Part:
    """A file on its way into the store. A disk that fails only means that it is not kept."""

    def __init__(self, store: Store, directory: int, max_bytes: int) -> None:
        self._store = store
        self._directory = directory
        self._max_bytes = max_bytes
        self._name = secrets.token_hex(16) + _PART
        self._kept = bytearray()
        self._size = 0
        self._fd: int | None = None
        self._failed = False

    async def write(self, data: bytes) -> None:
        """Take a piece."""
        if self._failed:
            return
        self._kept += data
        self._size += len(data)
        if self._size > self._max_bytes:
            self._fail("it is too large for it")
        elif len(self._kept) >= _BATCH:
            await self._flush()

    async def commit(self, name: str) -> None:
        """It is complete and right: let it be found under ``name``."""
        await self._flush()
        if self._failed or self._fd is None:
            return
        try:
            os.fchmod(self._fd, 0o400)
            os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            self._fail(str(error.strerror))
            return
        os.close(self._fd)
        self._fd = None
        self._store.add(name, self._size)

    def discard(self) -> None:
        """Let go of it, unless it was committed."""
        self._kept.clear()
        self._failed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)

    async def _flush(self) -> None:
        if self._failed:
            return
        data, self._kept = bytes(self._kept), bytearray()
        try:
            if self._fd is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open(self._name, flags, 0o600, dir_fd=self._directory)
            # A descriptor of its own: one that is discarded meanwhile must not be another file's by then.
            fd = os.dup(self._fd)
            await asyncio.shield(asyncio.to_thread(_write_all, fd, data))
        except OSError as error:
            self._fail(str(error.strerror))

    def _fail(self, why: str) -> None:
        log.warning("a package is not kept in the cache: %s", why)
        self.discard()


def _write_all(fd: int, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _has_digests(fd: int, digests: Digests) -> bool:
    own = os.dup(fd)
    try:
        hashes = [(hashlib.new(algorithm, usedforsecurity=False), digits) for algorithm, digits in digests]
        offset = 0
        while data := os.pread(own, _BATCH, offset):
            offset += len(data)
            for digest, _ in hashes:
                digest.update(data)
        return bool(hashes) and all(digest.hexdigest() == digits for digest, digits in hashes)
    finally:
        os.close(own)
