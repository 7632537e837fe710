"""What msgspec raises beside its own errors, at faces that read the bytes of others."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec
import pytest

from vallum.client.frames import FrameStream
from vallum.client.wire import Status, decode_request, frame
from vallum.core.decoding import MALFORMED
from vallum.core.events import decode
from vallum.core.messages import ToolCall
from vallum.gateway.wire import Channel
from vallum.record.calls import describe_call

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("raw", [b'{"kind":"\xd7x"}', b'{"kind":' + NESTED.encode(), b"[", b"{}"])
def test_every_malformed_event_is_one_of_these(raw):
    with pytest.raises(MALFORMED):
        decode(raw)


def test_a_call_with_endless_nesting_is_described_as_it_is():
    arguments = '{"argv": ["ls"], "x": ' + NESTED + "}"
    assert describe_call(ToolCall(id="a", name="bash", arguments=arguments)) == arguments
    assert describe_call(ToolCall(id="a", name="bash", arguments='{"argv": ["ls"]}')) == "ls"


async def test_text_that_is_no_utf8_ends_a_connection_of_the_node_in_order():
    seen: list[object] = []
    stream = FrameStream(lambda _: None)
    stream.on_frame = lambda body: seen.append(decode_request(body))
    stream.data_received(frame(Status(seq=1)))
    stream.data_received(frame(msgspec.msgpack.Ext(1, b"")) + frame(Status(seq=2)))
    stream.connection_lost(None)
    assert seen == [Status(seq=1)]
    assert "Expected" in await asyncio.wait_for(stream.ended, 1)

    stream = FrameStream(lambda _: None)
    stream.on_frame = lambda body: seen.append(decode_request(body))
    bad = b"\x82\xa2op\xa5hel\xd7o\xa3seq\x01"
    stream.data_received(len(bad).to_bytes(4, "big") + bad + frame(Status(seq=3)))
    stream.connection_lost(None)
    assert seen == [Status(seq=1)]
    assert "utf-8" in await asyncio.wait_for(stream.ended, 1)


async def test_no_frame_of_a_channel_is_given_out_twice():
    ours, theirs = socket.socketpair()
    seen: list[bytes] = []
    failed: list[BaseException] = []

    def take(body: bytes, fds: list[int]) -> None:
        seen.append(body)
        if body == b"bad":
            raise LookupError("it cannot be handled")

    def write(body: bytes) -> bytes:
        return struct.pack("!IB", len(body), 0) + body

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failed.append(context["exception"]))
    channel = Channel(ours, take, lambda _: None)
    with theirs:
        for data in (write(b"one") + write(b"bad"), write(b"two")):
            theirs.sendall(data)
            await asyncio.sleep(0.02)
        assert seen == [b"one", b"bad", b"two"]
        assert [type(error) for error in failed] == [LookupError]
        channel.close()
