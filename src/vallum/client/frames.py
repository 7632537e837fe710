"""Length-prefixed frames over a stream socket, without a task and two wake-ups for each: bytes in, callbacks out.

Covered: frames longer than :data:`vallum.client.wire.MAX_FRAME_BYTES` end the connection.
Not covered: what a frame means; the caller decodes and checks it.
"""

from __future__ import annotations

import asyncio
import pwd
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

from vallum.client.wire import LENGTH, MAX_FRAME_BYTES
from vallum.core.decoding import MALFORMED
from vallum.core.errors import NodeError

_UCRED = struct.Struct("3i")
_NO_LOGIN = 0xFFFF_FFFF
"""What the kernel says where nobody logged in."""


class FrameStream(asyncio.Protocol):
    """One end of a connection."""

    def __init__(self, on_connected: Callable[[FrameStream], None]) -> None:
        """``on_connected`` is called once, before any frame; it sets :attr:`on_frame`."""
        self._on_connected = on_connected
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._room: asyncio.Future[None] | None = None
        self.on_frame: Callable[[bytes], None] | None = None
        """Told of each frame's body, in order. What it raises (:class:`NodeError`, ``MALFORMED``) ends the connection."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set when the connection has ended, to what was wrong with the last frame (empty: nothing)."""
        self._wrong = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)  # not a subclass in every loop (uvloop's is not)
        self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        buffer = self._buffer
        if not buffer and len(data) >= LENGTH.size and LENGTH.unpack_from(data)[0] == len(data) - LENGTH.size:
            self._give(data[LENGTH.size :])  # one whole frame, nearly always
            return
        buffer += data
        at = 0
        while len(buffer) - at >= LENGTH.size and not self._wrong:
            (length,) = LENGTH.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                self._end(f"a message of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
                return
            end = at + LENGTH.size + length
            if len(buffer) < end:
                break
            self._give(bytes(buffer[at + LENGTH.size : end]))
            at = end
        del buffer[:at]

    def _give(self, body: bytes) -> None:
        if self.on_frame is None or self._wrong:
            return
        try:
            self.on_frame(body)
        except (NodeError, *MALFORMED) as error:
            self._end(str(error))

    def _end(self, wrong: str) -> None:
        self._wrong = self._wrong or wrong
        self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self.resume_writing()
        if not self.ended.done():
            self.ended.set_result(self._wrong)

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    @property
    def is_open(self) -> bool:
        """Whether what is written still has a chance to arrive."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def unsent_bytes(self) -> int:
        """How much waits to be taken by the kernel."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def write(self, data: bytes) -> None:
        """Send whole frames (:func:`vallum.client.wire.frame`); nothing when the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Return when there is room for more, or the connection has ended."""
        while self._room is not None:
            await asyncio.shield(self._room)

    def close(self) -> None:
        """End the connection after what was written; :attr:`ended` follows."""
        if self._transport is not None:
            self._transport.close()

    def peer_uid(self) -> int:
        """User of the process at the other end, by the kernel's word, as it was when it connected."""
        assert self._transport is not None
        raw: bytes = self._transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size
        )
        return int(_UCRED.unpack(raw)[1])

    def peer_name(self) -> str:
        """Who that is, for the record: user name and uid, and the login user of the process where it is another (sudo)."""
        assert self._transport is not None
        raw: bytes = self._transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size
        )
        pid, uid, _ = _UCRED.unpack(raw)
        name = _name_user(uid)
        try:
            login = int(Path(f"/proc/{pid}/loginuid").read_text("ascii"))
        except (OSError, ValueError):
            return name
        return name if login in (uid, _NO_LOGIN) else f"{name}, logged in as {_name_user(login)}"


def _name_user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
