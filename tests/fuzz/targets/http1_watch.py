"""The filter of plaintext HTTP/1 flows, with its sink: what left is read by another parser, request for request.

No request for another host ever leaves, and nothing after what could not be read.
"""

from __future__ import annotations

import h11

from vallum.core.verdict import Decision
from vallum.gateway.http1 import Http1Watch, RefusedError
from vallum.gateway.sniff import split_authority

GRANTED = "a.example"
SEEDS = (
    b"\x40GET / HTTP/1.1\r\nHost: a.example\r\n\r\nGET /b HTTP/1.1\r\nHost: b.example\r\n\r\n",
    b"\x40POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"\x40POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    b"\x80GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nabc",
    b"\x80GET / HTTP/1.0\r\nHost: a.example\r\nUpgrade: h2c\r\nConnection: upgrade, close\r\n\r\n",
)


def judge(host: str | None) -> Decision:
    return Decision(verdict="allow" if host == GRANTED else "deny", rule="r", reason="x")


def forward(pieces: list[bytes]) -> tuple[bytes, bool, bool]:
    """What left, whether it was refused, and whether the guest waits for the server."""
    watch = Http1Watch(judge, {GRANTED})
    sink = b""
    try:
        for piece in pieces:
            sink += watch.feed(piece)
    except RefusedError:
        return sink, True, watch.is_waiting
    return sink, False, watch.is_waiting


def count(sink: bytes) -> int:
    """Requests that a server would read there."""
    found = 0
    while sink:
        server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        server.receive_data(sink)
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                found += 1
                assert event.method != b"CONNECT"
                hosts = [value for name, value in event.headers if name == b"host"]
                assert [split_authority(host) for host in hosts] == [GRANTED]
            elif event is h11.NEED_DATA:
                return found
            elif isinstance(event, h11.EndOfMessage):
                sink = server.trailing_data[0]
                break
    return found


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole, parts = forward([rest]), forward([rest[:cut], rest[cut:]])
    one, two = count(whole[0]), count(parts[0])
    assert whole[1] == parts[1]
    assert one == two or whole[1]
