"""Pipes of a command on the node's loop: out of the guest (Pump), into it (Feed). Memory is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable

from vallum.node.output import Capture

CHUNK_BYTES = 256 * 1024
LAST_DRAIN_BYTES = 4 * 1024 * 1024
"""What is still taken from a pipe when its command has ended; more than any pipe holds, less than a flood."""
HIGH_WATER_BYTES = 1024 * 1024


class Pump:
    """Takes what the guest writes to one descriptor, which it owns and closes. Nothing is taken before :meth:`watch`."""

    def __init__(
        self, fd: int, capture: Capture, relay: Callable[[bytes], Awaitable[None] | None] | None = None
    ) -> None:
        self._fd: int | None = fd
        self._is_watched = False
        self._capture = capture
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.Task[None] | None = None
        self.at_end = asyncio.Event()
        """Set when every writer has closed its end."""

    def watch(self) -> None:
        """Take whatever is written from now on, as it is written."""
        if self._fd is not None and not self._is_watched and self._pause is None:
            self._is_watched = True
            self._loop.add_reader(self._fd, self._ready)

    def _ignore(self) -> None:
        if self._fd is not None and self._is_watched:
            self._is_watched = False
            self._loop.remove_reader(self._fd)

    def _ready(self) -> None:
        waiting = self._take()
        if waiting is not None and self._fd is not None:
            self._ignore()
            self._pause = self._loop.create_task(self._resume_after(waiting))

    async def _resume_after(self, waiting: Awaitable[None]) -> None:
        await waiting
        self._pause = None
        self.watch()

    def _take(self) -> Awaitable[None] | None:
        assert self._fd is not None
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError:  # EIO: the other side of a terminal is closed
            data = b""
        if not data:
            self.close()
            return None
        self._capture.feed(data)
        return self._relay(data) if self._relay is not None else None

    def drain(self) -> None:
        """Take what is already in the pipe, without waiting for more."""
        end = self._capture.total + LAST_DRAIN_BYTES
        before = -1
        while before != self._capture.total < end and not self.at_end.is_set():
            before = self._capture.total
            waiting = self._take()
            if waiting is not None:
                self._pause = self._loop.create_task(self._settle(waiting))

    @staticmethod
    async def _settle(waiting: Awaitable[None]) -> None:
        await waiting

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._fd is not None:
            self._ignore()
            os.close(self._fd)
            self._fd = None
            self.at_end.set()


class Feed:
    """Writes to a descriptor of the guest as fast as the guest reads. Owns and closes it."""

    def __init__(self, fd: int, *, closes: bool = True) -> None:
        self._fd: int | None = fd
        self._closes = closes
        self._loop = asyncio.get_running_loop()
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._is_ending = False
        self._is_writing = False
        self._room = asyncio.Event()
        self._room.set()

    def write(self, data: bytes) -> None:
        """Queue bytes."""
        if self._fd is None or not data:
            return
        self._queue.append(memoryview(data))
        self._queued += len(data)
        if self._queued > HIGH_WATER_BYTES:
            self._room.clear()
        if not self._is_writing:
            self._ready()

    def end(self) -> None:
        """Close after what is queued."""
        self._is_ending = True
        if not self._queue:
            self.close()

    async def wait_for_room(self) -> None:
        """Return when little is queued, or nobody reads any more."""
        await self._room.wait()

    def _ready(self) -> None:
        if self._fd is None:
            return
        try:
            while self._queue:
                written = os.write(self._fd, self._queue[0][:CHUNK_BYTES])
                self._queued -= written
                rest = self._queue[0][written:]
                if rest:
                    self._queue[0] = rest
                else:
                    self._queue.popleft()
        except BlockingIOError:
            pass
        except OSError:  # EPIPE, EIO: the guest reads no more
            self.close()
            return
        if self._queued <= HIGH_WATER_BYTES:
            self._room.set()
        if self._queue and not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._fd, self._ready)
        elif not self._queue and self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._fd)
        if not self._queue and self._is_ending:
            self.close()

    def close(self) -> None:
        """Let go, whatever is queued."""
        if self._fd is None:
            return
        if self._is_writing:
            self._loop.remove_writer(self._fd)
            self._is_writing = False
        if self._closes:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = None
        self._queue.clear()
        self._room.set()
