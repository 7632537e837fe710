"""An answer that several requests may read: the one that asked first, and its retries."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator

from vallum.gateway.http.exchange import Headers
from vallum.gateway.model.sse import KEEP_ALIVE
from vallum.gateway.stream import PIECE

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
        self._body = bytearray()
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
            self._body += data
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
            if at < len(self._body):
                piece = bytes(memoryview(self._body)[at : at + PIECE])
                at += len(piece)
                yield piece
            elif self.is_over:
                return
            else:
                changed = self._changed
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S if self.is_stream else None):
                        await changed.wait()
                except TimeoutError:
                    # What is written are whole events, so it falls between two.
                    yield KEEP_ALIVE

    def body(self) -> bytes:
        """What there is of the body."""
        return bytes(self._body)

    @property
    def size(self) -> int:
        """Bytes of the body so far."""
        return len(self._body)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeptAnswers:
    """The last answer of each branch, for retries; the oldest go when they become many."""

    def __init__(self, limit_bytes: int, limit: int = 256) -> None:
        self._limit_bytes, self._limit = limit_bytes, limit
        self._keys: OrderedDict[str, bytes] = OrderedDict()
        self._answers: dict[bytes, Answer] = {}
        self._bytes = 0

    def find(self, key: bytes) -> Answer | None:
        """The answer to the request of that digest."""
        return self._answers.get(key)

    def keep(self, branch: str, key: bytes, answer: Answer) -> None:
        """``answer`` is the last one of ``branch``."""
        self._drop(branch)
        if answer.size <= self._limit_bytes and key not in self._answers:
            self._keys[branch], self._answers[key] = key, answer
            self._bytes += answer.size
        while self._bytes > self._limit_bytes or len(self._keys) > self._limit:
            self._drop(next(iter(self._keys)))

    def _drop(self, branch: str) -> None:
        key = self._keys.pop(branch, None)
        if key is not None:
            self._bytes -= self._answers.pop(key).size
