"""Frames between clients and the node: the same in pieces, and only documented errors for bodies that are none."""

from __future__ import annotations

import asyncio

import msgspec

from vallum.client.frames import FrameStream
from vallum.client.wire import Hello, Reply, Status, decode_message, decode_request, frame
from vallum.core.decoding import MALFORMED

_loop = asyncio.new_event_loop()
SEEDS = tuple(
    b"\x40" + frame(message)
    for message in (
        Hello(seq=1, protocol=1, version="x"),
        Status(seq=2),
        Reply(seq=3, result=msgspec.Raw(b"\x80")),
    )
)


class Transport(asyncio.Transport):
    """Keeps whether it was closed."""

    closed = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def read(pieces: list[bytes]) -> tuple[list[bytes], bool]:
    async def run() -> tuple[list[bytes], bool]:
        bodies: list[bytes] = []
        stream = FrameStream(lambda _: None)
        stream.on_frame = bodies.append
        transport = Transport()
        stream.connection_made(transport)
        for piece in pieces:
            stream.data_received(piece)
        stream.connection_lost(None)
        return bodies, transport.closed

    return _loop.run_until_complete(run())


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole = read([rest])
    assert whole == read([rest[:cut], rest[cut:]])
    for body in [rest, *whole[0]]:
        for decode in (decode_request, decode_message):
            try:
                message = decode(body)
            except MALFORMED:
                continue
            assert decode(frame(message)[4:]) == message
