"""An answer that several requests may read: the one that asked first, and its retries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vallum.gateway.http.exchange import Headers
from vallum.gateway.model.sse import KEEP_ALIVE

KEEP_ALIVE_S = 5.0


class Answer:
    """Written by the call, read by any number of requests, kept whole so that a retry can be given it again."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.status = 0
        self.headers: Headers = ()
        self.is_stream = False
        self.failure = ""
        """Why it broke off after its head, when it did."""
        self.is_over = False
        self.readers = 0
        self.size = 0
        self._pieces: list[bytes] = []
        self._changed = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Whether its head is known."""
        return self.status != 0

    def begin(self, status: int, headers: Headers, *, is_stream: bool) -> None:
        """Its head is known. Pieces of a stream are whole events."""
        self.status, self.headers, self.is_stream = status, headers, is_stream
        self._wake()

    def write(self, data: bytes) -> None:
        """More of its body."""
        if data:
            self._pieces.append(data)
            self.size += len(data)
            self._wake()

    def end(self, failure: str = "") -> None:
        """It is complete, or it broke off."""
        if not self.is_over:
            self.is_over, self.failure = True, failure
            self._wake()

    async def begun(self) -> None:
        """Wait for the head, or for the end without one."""
        while not (self.status or self.is_over):
            await self._changed.wait()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, with comments between events of a stream that is silent."""
        at = 0
        while True:
            if at < len(self._pieces):
                piece = self._pieces[at] if len(self._pieces) == at + 1 else b"".join(self._pieces[at:])
                at = len(self._pieces)
                yield piece
            elif self.is_over:
                return
            else:
                changed = self._changed
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S if self.is_stream else None):
                        await changed.wait()
                except TimeoutError:
                    yield KEEP_ALIVE

    def body(self) -> bytes:
        """What there is of the body."""
        return b"".join(self._pieces)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
