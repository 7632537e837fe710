"""What servers answer: read, or UpstreamError; never more than was sent, and the same in pieces."""

from __future__ import annotations

import asyncio

from memory import Memory

from vallum.gateway.http.client1 import Upstream, UpstreamError
from vallum.gateway.relay import Counters

SEEDS = (
    b"\x40HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"\x40HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"\x80HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
    b"\x80HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"\x80HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\x81\x00",
)
_loop = asyncio.new_event_loop()


def read(pieces: list[bytes]) -> object:
    async def run() -> object:
        upstream = Upstream(None, Memory(pieces), Counters())
        await upstream.send_whole("GET", "/", ((b"host", b"a.example"),), b"")
        try:
            head = await upstream.read_head()
            if head.status == 101:
                return head
            body = b"".join([piece async for piece in upstream.read_body()])
        except UpstreamError:
            return None
        upstream.settle()
        return head, body

    return _loop.run_until_complete(run())


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    assert read([rest]) == read([rest[:cut], rest[cut:]])
