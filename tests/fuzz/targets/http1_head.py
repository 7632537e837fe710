"""Coverage-guided fuzzing of HTTP/1 heads and bodies.

The first byte cuts the input in two. What is read has to be the same in pieces, and what would be sent on has to be
read by h11's client side of the wire in the same way: one request, nothing behind it.
"""

from __future__ import annotations

import h11

from vallum.gateway.http.head import (
    MalformedError,
    MisdirectedError,
    Place,
    check_head,
    find_end,
    read_request,
)
from vallum.gateway.services.forward import write_headers

PLACE = Place(scheme="http", port=80)


SEEDS = (
    b"\x40GET /a?b HTTP/1.1\r\nHost: a.example\r\nX: y\r\n\r\n",
    b"\x80POST http://a.example/%2e%2e HTTP/1.1\r\nHost: a.example:80\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"\x80PUT * HTTP/1.0\r\nHost: [2001:db8::1]\r\nContent-Length: 3, 3\r\n\r\n",
)


def read(pieces: list[bytes]) -> object:
    data, searched = bytearray(), 0
    try:
        for piece in pieces:
            data += piece
            end = find_end(data, searched)
            searched = len(data)
            if end > 0:
                break
        else:
            return None
        raw = bytes(data[:end])
        check_head(raw)
        parser = h11.Connection(h11.SERVER)
        parser.receive_data(raw)
        request = parser.next_event()
        assert isinstance(request, h11.Request)
        return read_request(request, PLACE)
    except (MalformedError, MisdirectedError, h11.RemoteProtocolError) as error:
        return type(error).__name__


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole, parts = read([rest]), read([rest[:cut], rest[cut:]])
    if not isinstance(whole, str) and not isinstance(parts, str):
        assert whole == parts
    if whole is None or isinstance(whole, str) or whole.method == "CONNECT":
        return
    client = h11.Connection(h11.CLIENT)
    headers = write_headers(whole, whole.headers, default_port=80)
    sent = client.send(h11.Request(method=whole.method, target=whole.target, headers=list(headers)))
    server = h11.Connection(h11.SERVER)
    server.receive_data(sent)
    again = server.next_event()
    assert isinstance(again, h11.Request) and again.target == whole.target.encode()
    assert not server.trailing_data[0]
