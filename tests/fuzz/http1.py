"""Coverage-guided fuzzing of HTTP/1 heads and bodies: ``python tests/fuzz/http1.py [-runs=N] [CORPUS]``.

The first byte cuts the input in two. What is read has to be the same in pieces, and what would be sent on has to be
read by h11's client side of the wire in the same way: one request, nothing behind it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
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


def run(data: bytes) -> None:
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


if __name__ == "__main__":
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
