"""The HTTP/1 server with a forwarding desk and its sink: each request that left is one request to who reads it.

Nothing leaves for a request whose head could not be read, nor after a body that could not; in pieces the same leaves.
"""

from __future__ import annotations

import asyncio
import contextlib

import h11
from memory import Memory

from vallum.gateway.http.exchange import GuestGoneError, MalformedFlowError
from vallum.gateway.http.head import Place
from vallum.gateway.http.server1 import Server1
from vallum.gateway.services.forward import write_headers

PLACE = Place(scheme="http", port=80)
SEEDS = (
    b"\x40GET / HTTP/1.1\r\nHost: a.example\r\n\r\nGET /b HTTP/1.1\r\nHost: b.example\r\n\r\n",
    b"\x40POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"\x40POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
    b"\x80POST /a HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x80GET /a%2f..%00 HTTP/1.0\r\nHost: a.example:8080\r\nConnection: keep-alive\r\n\r\n",
)
_loop = asyncio.new_event_loop()


class Desk:
    """Writes each request as the forwarder does; one sink for each."""

    def __init__(self) -> None:
        self.sinks: list[tuple[bytes, bool]] = []

    async def answer(self, exchange) -> None:
        client = h11.Connection(h11.CLIENT)
        head = exchange.head
        if head.method == "CONNECT":
            await exchange.abort("not forwarded")
            return
        headers = write_headers(head, head.headers, default_port=80)
        sink = client.send(h11.Request(method=head.method, target=head.target, headers=list(headers)))
        whole = False
        try:
            async for data in exchange.body():
                sink += client.send(h11.Data(data=data))
            sink += client.send(h11.EndOfMessage())
            whole = True
            await exchange.start(200, (), length=2)
            if head.method != "HEAD":
                await exchange.send(b"ok")
            await exchange.end()
        except GuestGoneError:
            await exchange.abort("gone")
        finally:
            self.sinks.append((sink, whole))

    async def turn_away(self, decision) -> None:
        pass


def serve(pieces: list[bytes], room: int = 1 << 30) -> list[tuple[str, bytes, bytes, bool]]:
    """Method, target, body of each request that left, read anew from the sinks."""
    desk = Desk()

    async def run() -> None:
        with contextlib.suppress(MalformedFlowError, BrokenPipeError):
            await asyncio.wait_for(Server1(Memory(pieces, room), None, PLACE, desk).serve(), 5)
        assert len(asyncio.all_tasks()) == 1, "a task outlived its connection"

    _loop.run_until_complete(run())
    found = []
    for sink, whole in desk.sinks:
        server = h11.Connection(h11.SERVER)
        server.receive_data(sink)
        request = server.next_event()
        assert isinstance(request, h11.Request)
        body = b""
        while isinstance(event := server.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage) or not whole
        assert not server.trailing_data[0], "a second request hides in the first"
        found.append((request.method, request.target, body if whole else b"", whole))
    return found


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    assert serve([rest]) == serve([rest[:cut], rest[cut:]])
    serve([rest], data[0] * 2)
