"""What a guest sends, read ahead a little, so that its going away is noticed while its request is being answered."""

from __future__ import annotations

import asyncio
import contextlib

from vallum.gateway.http.exchange import GuestGoneError
from vallum.gateway.stream import PIECE, Stream

READ_AHEAD_BYTES = 64 * 1024


class Inflow:
    """Reads a stream. One consumer."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._kept = bytearray()
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._ended = False
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when no more will come, because the guest said so or because the connection broke."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection broke."""
        self._pump = asyncio.create_task(self._read())

    async def take(self, timeout_s: float | None = None) -> bytes:
        """What has come, at least a byte; empty at the end.

        Raises:
            GuestGoneError: the connection broke.
            TimeoutError: nothing came in time.
        """
        while not self._kept:
            if self.broken.done():
                raise GuestGoneError("the guest broke the connection off")
            if self._ended:
                return b""
            self._changed.clear()
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        data = bytes(self._kept)
        self._kept.clear()
        self._taken.set()
        return data

    def give_back(self, data: bytes) -> None:
        """Put bytes back in front of what comes."""
        self._kept[:0] = data
        self._changed.set()

    async def close(self) -> None:
        """Read no more."""
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump
        self.left.cancel()
        self.broken.cancel()

    async def _read(self) -> None:
        try:
            while data := await self._stream.recv(PIECE):
                self._kept += data
                self._changed.set()
                while len(self._kept) >= READ_AHEAD_BYTES:
                    self._taken.clear()
                    await self._taken.wait()
        except OSError:
            if not self.broken.done():
                self.broken.set_result(None)
        finally:
            self._ended = True
            self._changed.set()
            if not self.left.done():
                self.left.set_result(None)


class GuestStream:
    """The guest's stream again, beginning with what was read ahead of it. A :class:`~vallum.gateway.stream.Stream`."""

    def __init__(self, inflow: Inflow, stream: Stream) -> None:
        self._inflow = inflow
        self._stream = stream

    async def recv(self, limit: int = PIECE) -> bytes:
        """As :meth:`Stream.recv`."""
        try:
            data = await self._inflow.take()
        except GuestGoneError as error:
            raise ConnectionResetError(str(error)) from error
        if len(data) > limit:
            self._inflow.give_back(data[limit:])
        return data[:limit]

    async def send(self, data: bytes) -> None:
        """As :meth:`Stream.send`."""
        await self._stream.send(data)

    async def finish(self) -> None:
        """As :meth:`Stream.finish`."""
        await self._stream.finish()

    def close(self) -> None:
        """As :meth:`Stream.close`."""
        self._stream.close()

    def abort(self) -> None:
        """As :meth:`Stream.abort`."""
        self._stream.abort()
