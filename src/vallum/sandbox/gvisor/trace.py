"""The socket on which a cell's kernel reports, read on the event loop.

One connection a cell, over a listener that exists in that cell's mount namespace only. When it ends, or what comes is
no report, the cell is blind and is ended (``lost``).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vallum.sandbox.gvisor import points
from vallum.sandbox.gvisor.points import MalformedPoint, Point

log = logging.getLogger(__name__)

_BATCH = 256


class TraceReader:
    """Reads points and hands them on, in order."""

    def __init__(
        self, listener: socket.socket, take: Callable[[list[Point]], None], lost: Callable[[str], None]
    ) -> None:
        """``take`` gets what came, a batch at a time; ``lost`` is told once why nothing more will come."""
        self._listener: socket.socket | None = listener
        self._connection: socket.socket | None = None
        self._is_greeted = False
        self._take = take
        self._lost = lost
        self.dropped = 0
        """Points that the kernel could not deliver."""
        listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop."""
        for sock in (self._listener, self._connection):
            if sock is not None:
                self._loop.remove_reader(sock.fileno())
                sock.close()
        self._listener = self._connection = None

    def drain(self) -> None:
        """Take what has arrived: the socket holds fewer than this many, so what comes meanwhile can wait."""
        for _ in range(4):
            if self._connection is None or not self._read():
                return

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()  # there is one kernel in a cell, and it has come
        self._listener = None
        connection.setblocking(False)
        self._connection = connection
        self._loop.add_reader(connection.fileno(), self._read)

    def _read(self) -> bool:
        """Take at most a batch; whether there may be more."""
        found: list[Point] = []
        more = True
        why = ""
        for _ in range(_BATCH):
            if self._connection is None:
                return False
            try:
                raw = self._connection.recv(points.MAX_DATAGRAM)
            except BlockingIOError:
                more = False
                break
            except OSError as error:
                why = f"its kernel's reports ended: {error.strerror}"
                break
            if not raw:
                why = "its kernel's reports ended"
                break
            if not self._is_greeted:
                self._is_greeted = True
                try:
                    self._connection.send(points.HANDSHAKE)
                except OSError as error:
                    why = f"its kernel did not take our greeting: {error.strerror}"
                    break
                continue
            try:
                datagram = points.parse(raw)
            except MalformedPoint as error:
                why = str(error)
                break
            self.dropped = max(self.dropped, datagram.lost)
            if datagram.point is not None:
                found.append(datagram.point)
        if found:
            self._take(found)
        if why:
            self.close()
            self._lost(why)
            return False
        return more
