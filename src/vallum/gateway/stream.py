"""Bytes both ways, the same over a bare socket and inside TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Protocol

from vallum.gateway.door import reset

PIECE = 64 * 1024


class Stream(Protocol):
    """One end of a connection, on one event loop. One reader and one writer at a time."""

    async def recv(self, limit: int = PIECE) -> bytes:
        """Some bytes; empty at the end.

        Raises:
            OSError: the connection broke (``ssl.SSLError`` is one).
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send all of it; waits while the other side does not read.

        Raises:
            OSError: as :meth:`recv`.
        """
        ...

    async def finish(self) -> None:
        """Say that no more will be sent (close_notify, FIN)."""
        ...

    def close(self) -> None:
        """Close without a reset, if the bytes sent may still be on their way. More than once is no error."""
        ...

    def abort(self) -> None:
        """Close with a reset."""
        ...


class SocketStream:
    """A connected non-blocking stream socket. ``head`` are bytes that were read of it before."""

    def __init__(self, sock: socket.socket, head: bytes = b"") -> None:
        self._sock = sock
        self._head = head

    async def recv(self, limit: int = PIECE) -> bytes:
        """As :meth:`Stream.recv`."""
        if self._head:
            data, self._head = self._head[:limit], self._head[limit:]
            return data
        return await asyncio.get_running_loop().sock_recv(self._sock, limit)

    async def send(self, data: bytes) -> None:
        """As :meth:`Stream.send`."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def finish(self) -> None:
        """As :meth:`Stream.finish`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """As :meth:`Stream.close`."""
        self._sock.close()

    def abort(self) -> None:
        """As :meth:`Stream.abort`."""
        reset(self._sock)
