"""Coverage-guided fuzzing of the HTTP/2 server: ``python tests/fuzz/http2.py [-runs=N] [CORPUS]``.

The input comes after a preface. Whatever it is, the server ends by itself: read to its end, or refused in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import atheris

with atheris.instrument_imports():
    from vallum.gateway.http.exchange import GuestGoneError, MalformedFlowError
    from vallum.gateway.http.head import Place
    from vallum.gateway.http.server2 import Server2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


class Memory:
    """A stream of what was put in."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    async def recv(self, limit: int = 65536) -> bytes:
        await asyncio.sleep(0)
        return self.pieces.pop(0)[:limit] if self.pieces else b""

    async def send(self, data: bytes) -> None:
        await asyncio.sleep(0)

    async def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


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


def run(data: bytes) -> None:
    async def serve() -> None:
        stream = Memory([PREFACE + data[: len(data) // 2], data[len(data) // 2 :]])
        with contextlib.suppress(MalformedFlowError):
            await asyncio.wait_for(Server2(stream, None, Place(scheme="http", port=80), Desk()).serve(), 5)

    asyncio.run(serve())


if __name__ == "__main__":
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
