"""WebSockets between a guest and a granted server: frames read, searched for canaries, counted, written anew. Sans-I/O
but for :func:`relay_frames`.

Covered: only frames of RFC 6455 pass; the first thing that is none ends both directions, and nothing of it or after it
is sent. Extensions (permessage-deflate) are taken out of the handshake, so that frames can be read. A message is
searched over the borders of its frames. Not covered: what a message means; a canary cut over several messages.

Source: RFC 6455.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable

from vallum.gateway.http.canaries import CanaryScanner, FoundError
from vallum.gateway.http.exchange import DeniedError, Headers, RequestHead, Tally
from vallum.gateway.kit import Canary
from vallum.gateway.stream import Stream

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _CLOSE = 0, 8
_DATA_OPCODES = frozenset({0, 1, 2})
_CONTROL_OPCODES = frozenset({8, 9, 10})
MAX_CONTROL = 125
CLOSING_S = 10.0
"""How long the other side may still speak once one has ended."""


class FrameError(Exception):
    """What came is no frame that this side may send. Says why."""


def check_key(head: RequestHead) -> bytes | None:
    """The key of a correct opening handshake (RFC 6455, section 4.1); None when it is not one."""
    key = head.header(b"sec-websocket-key")
    if key is None or head.header(b"sec-websocket-version") != b"13" or head.method != "GET":
        return None
    try:
        return key if len(base64.b64decode(key, validate=True)) == 16 else None
    except (binascii.Error, ValueError):
        return None


def accept_of(key: bytes) -> bytes:
    """The answer to a key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _MAGIC, usedforsecurity=False).digest())


def without_extensions(headers: Headers) -> Headers:
    """The guest's headers without the extensions that it offers."""
    return tuple(pair for pair in headers if pair[0] != b"sec-websocket-extensions")


class FrameFilter:
    """One direction: takes bytes of frames, returns bytes of frames that may be sent on."""

    def __init__(self, canaries: Iterable[Canary], *, masked: bool) -> None:
        """``masked``: the sender is the client."""
        kept = tuple(canaries)
        self._masked = masked
        self._messages = CanaryScanner(kept)
        self._controls = CanaryScanner(kept)
        self._buffer = bytearray()
        self._opcode = _CONTINUATION
        self._is_final = False
        self._left: int | None = None
        """Bytes of the current data frame's payload that have not come; None between frames."""
        self._mask = b""
        self._at = 0
        self._in_message = False
        self._has_sent = False
        self._closed = False
        self.messages = 0
        """Data messages that came whole."""

    def feed(self, data: bytes) -> bytes:
        """Frames to send on.

        Raises:
            FrameError: this is not allowed, and the direction is over.
            FoundError: a canary is in it.
        """
        self._buffer += data
        out = bytearray()
        while self._buffer or self._left == 0:
            if self._closed:
                raise FrameError("there are bytes after the close frame")
            if self._left is None:
                if not self._begin(out):
                    break
            else:
                self._go_on(out)
        return bytes(out)

    def _begin(self, out: bytearray) -> bool:
        """Read a frame's head; a control frame as a whole. False: more is needed."""
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        final, opcode = bool(buffer[0] & 0x80), buffer[0] & 0x0F
        if buffer[0] & 0x70:
            raise FrameError("a reserved bit is set, and no extension was agreed on")
        if bool(buffer[1] & 0x80) != self._masked:
            raise FrameError("a client's frame has to be masked, and a server's must not be")
        read = _read_length(buffer)
        if read is None:
            return False
        length, at = read
        self._check(opcode, length, final=final)
        mask_size = 4 if self._masked else 0
        whole = at + mask_size + (length if opcode in _CONTROL_OPCODES else 0)
        if len(buffer) < whole:
            return False
        mask = bytes(buffer[at : at + mask_size])
        if opcode in _CONTROL_OPCODES:
            payload = apply_mask(bytes(buffer[at + mask_size : whole]), mask)
            self._controls.feed(payload)
            self._controls.flush()
            out += self._write(0x80 | opcode, payload)
            self._closed = opcode == _CLOSE
        else:
            self._left, self._mask, self._at, self._is_final = length, mask, 0, final
            if not self._in_message:
                self._opcode, self._in_message, self._has_sent = opcode, True, False
        del buffer[:whole]
        return True

    def _check(self, opcode: int, length: int, *, final: bool) -> None:
        if opcode in _CONTROL_OPCODES:
            if not final or length > MAX_CONTROL:
                raise FrameError("a control frame is fragmented or longer than 125 bytes")
        elif opcode not in _DATA_OPCODES:
            raise FrameError(f"there is no opcode {opcode}")
        elif (opcode == _CONTINUATION) != self._in_message:
            raise FrameError("a message begins within another one, or goes on without having begun")

    def _go_on(self, out: bytearray) -> None:
        """Take what has come of the current data frame."""
        left = self._left or 0
        taken = bytes(self._buffer[:left])
        del self._buffer[: len(taken)]
        payload = apply_mask(taken, self._mask, self._at)
        self._at += len(taken)
        self._left = left - len(taken)
        ready = self._messages.feed(payload)
        ended = self._left == 0
        if ended:
            self._left = None
        if ended and self._is_final:
            ready += self._messages.flush()
            out += self._write(0x80 | self._next_opcode(), ready)
            self._in_message = False
            self.messages += 1
        elif ready:
            out += self._write(self._next_opcode(), ready)
            self._has_sent = True

    def _next_opcode(self) -> int:
        return _CONTINUATION if self._has_sent else self._opcode

    def _write(self, first: int, payload: bytes) -> bytes:
        bit = 0x80 if self._masked else 0
        if len(payload) < 126:
            head = bytes((first, bit | len(payload)))
        elif len(payload) < 65536:
            head = bytes((first, bit | 126)) + struct.pack("!H", len(payload))
        else:
            head = bytes((first, bit | 127)) + struct.pack("!Q", len(payload))
        if not self._masked:
            return head + payload
        mask = secrets.token_bytes(4)
        return head + mask + apply_mask(payload, mask)


def _read_length(buffer: bytearray) -> tuple[int, int] | None:
    """Length of the payload and where the head goes on; None when more is needed.

    Raises:
        FrameError: it is not written in the shortest way (RFC 6455, section 5.2).
    """
    length, at = buffer[1] & 0x7F, 2
    if length < 126:
        return length, at
    size, least = (2, 126) if length == 126 else (8, 65536)
    if len(buffer) < at + size:
        return None
    length = int.from_bytes(buffer[at : at + size], "big")
    if length < least or length >> 63:
        raise FrameError("a length is not written in the shortest way")
    return length, at + size


def apply_mask(data: bytes, mask: bytes, at: int = 0) -> bytes:
    """Mask or unmask (RFC 6455, section 5.3) the payload from its byte ``at`` on; an empty mask changes nothing."""
    if not mask or not data:
        return data
    turned = mask[at % 4 :] + mask[: at % 4]
    repeated = (turned * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(data), "big")


async def relay_frames(
    guest: Stream, server: Stream, canaries: Iterable[Canary], tally: Tally, spend: Callable[[int, int], None]
) -> None:
    """Pass frames both ways until both sides ended. Counts messages and bytes in ``tally``.

    ``spend`` is told of bytes out and in before they are sent; what it raises ends both ways.

    Raises:
        FrameError: one side sent what is no frame; nothing of it was sent on.
        FoundError: a canary was about to leave.
        OSError: a side broke off.
    """
    outward, inward = FrameFilter(canaries, masked=True), FrameFilter((), masked=False)

    async def pump(source: Stream, target: Stream, frames: FrameFilter, *, is_outward: bool) -> None:
        while data := await source.recv():
            ready = frames.feed(data)
            if ready:
                spend(len(ready) if is_outward else 0, 0 if is_outward else len(ready))
                await target.send(ready)
            if is_outward:
                tally.bytes_out += len(ready)
                tally.messages_out = frames.messages
            else:
                tally.bytes_in += len(ready)
                tally.messages_in = frames.messages
        await target.finish()

    ways = {
        asyncio.create_task(pump(guest, server, outward, is_outward=True)),
        asyncio.create_task(pump(server, guest, inward, is_outward=False)),
    }
    try:
        done, rest = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in done:
            way.result()
        if rest:
            done, _ = await asyncio.wait(rest, timeout=CLOSING_S)
            for way in done:
                way.result()
    finally:
        for way in ways:
            way.cancel()
        for way in ways:
            with contextlib.suppress(asyncio.CancelledError, OSError, FrameError, FoundError, DeniedError):
                await way
