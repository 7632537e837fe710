"""Coverage-guided fuzzing of the HTTP/2 server.

The input comes after a preface. Whatever it is, the server ends by itself: read to its end, or refused in words.
"""

from __future__ import annotations

import asyncio
import contextlib

from memory import Memory

from vallum.gateway.http.exchange import GuestGoneError, MalformedFlowError
from vallum.gateway.http.head import Place
from vallum.gateway.http.server2 import Server2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


_loop = asyncio.new_event_loop()


class Desk:
    async def answer(self, exchange) -> None:
        try:
            body = await exchange.read_body(1 << 16)
            await exchange.start(200, (), length=len(body))
            await exchange.send(body)
            await exchange.end()
        except GuestGoneError:
            await exchange.abort("gone")

    async def turn_away(self, decision) -> None:
        pass


def fuzz(data: bytes) -> None:
    """The last byte may say that the guest breaks off after some bytes."""
    if not data:
        return
    room = data[-1] * 4 if data[-1] % 4 == 1 else 1 << 30
    stream = Memory([PREFACE + data[: len(data) // 2], data[len(data) // 2 :]], room)

    async def serve() -> None:
        with contextlib.suppress(MalformedFlowError, BrokenPipeError):
            await asyncio.wait_for(Server2(stream, None, Place(scheme="http", port=80), Desk()).serve(), 5)
        assert len(asyncio.all_tasks()) == 1, "a task outlived its connection"

    _loop.run_until_complete(serve())
