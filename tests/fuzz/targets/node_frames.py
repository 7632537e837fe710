"""Frames between node and gateway: over a real socket pair, cut in two. Only bodies that are frames are taken for one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.gateway.wire import Attribute, Channel, Done, Failed, FromGateway, FromNode, Ping

_loop = asyncio.new_event_loop()
_kinds = (msgspec.msgpack.Decoder(FromGateway), msgspec.msgpack.Decoder(FromNode))
_encode = msgspec.msgpack.encode


def _frame(body: bytes) -> bytes:
    return struct.pack("!IB", len(body), 0) + body


SEEDS = tuple(
    b"\x40" + _frame(_encode(frame))
    for frame in (
        Ping(seq=1),
        Done(seq=2),
        Failed(seq=3, error="x"),
        Attribute(seq=4, cell="c", protocol="tcp", src=("192.0.2.1", 1), dst=("192.0.2.2", 2)),
    )
)


def read(pieces: list[bytes]) -> list[bytes]:
    async def run() -> list[bytes]:
        ours, theirs = socket.socketpair()
        bodies: list[bytes] = []
        ended: list[str] = []

        def take(body: bytes, fds: list[int]) -> None:
            for fd in fds:
                os.close(fd)
            bodies.append(body)

        channel = Channel(ours, take, ended.append)
        with theirs:
            for piece in pieces:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    theirs.sendall(piece)
                await asyncio.sleep(0)
        for _ in range(8):
            await asyncio.sleep(0)
        assert len(ended) == 1, "the end of a channel is told once"
        assert not channel.is_open
        return bodies

    return _loop.run_until_complete(run())


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole = read([rest])
    assert whole == read([rest[:cut], rest[cut:]])
    for body in [rest, *whole]:
        for kind in _kinds:
            try:
                frame = kind.decode(body)
            except MALFORMED:
                continue
            assert kind.decode(_encode(frame)) == frame
