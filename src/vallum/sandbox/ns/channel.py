"""A SOCK_SEQPACKET socket to ``vallum-cell`` on the event loop: messages with descriptors, in order, both ways."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from vallum.sandbox.ns import wire

_UCRED = struct.Struct("=iII")
_ROOM = socket.CMSG_SPACE(64 * 4) + socket.CMSG_SPACE(_UCRED.size)
_BATCH = 64

Receiver = Callable[[wire.Message, list[int], int], None]
"""Called with a message, its descriptors (the receiver's to close) and the sender's pid on the host (0: unknown)."""


class Channel:
    """One end of the socket; the only reader and writer of it."""

    def __init__(self, sock: socket.socket, receive: Receiver, lost: Callable[[], None]) -> None:
        """``lost`` is called once, when the other side is gone (not after :meth:`close`)."""
        sock.setblocking(False)
        self._sock = sock
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self.is_open = True
        self._loop.add_reader(sock.fileno(), self._read)

    def send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Send now, or as soon as there is room. Descriptors are duplicated when it must wait.

        Raises:
            BrokenPipeError: the other side is gone.
        """
        if not self.is_open:
            raise BrokenPipeError("the other side is gone")
        raw = message.encode()
        if self._waiting or not self._try_send(raw, fds):
            self._waiting.append((raw, [os.dup(fd) for fd in fds]))
            self._loop.add_writer(self._sock.fileno(), self._flush)

    def close(self) -> None:
        """Close our end; a cell's PID 1 then ends the cell."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, fds in self._waiting:
            close_all(fds)
        self._waiting.clear()
        self._sock.close()

    def _try_send(self, raw: bytes, fds: Sequence[int]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([raw], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            self._break()
            raise BrokenPipeError("the other side is gone") from error
        return True

    def _flush(self) -> None:
        while self._waiting:
            raw, fds = self._waiting[0]
            try:
                if not self._try_send(raw, fds):
                    return
            except BrokenPipeError:
                return
            self._waiting.popleft()
            close_all(fds)
        self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        for _ in range(_BATCH):
            if not self.is_open:
                return
            try:
                raw, ancillary, _, _ = self._sock.recvmsg(wire.MAX_MESSAGE, _ROOM, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._break()
                return
            fds, pid = _take_ancillary(ancillary)
            message = wire.Message.decode(raw)
            if message is None:
                close_all(fds)
                self._break()
                return
            self._receive(message, fds, pid)

    def read_now(self) -> None:
        """Take what has arrived, without waiting for the loop."""
        if self.is_open:
            self._read()

    def _break(self) -> None:
        if self.is_open:
            self.close()
            self._lost()


def _take_ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[list[int], int]:
    fds: list[int] = []
    pid = 0
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += numbers
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _UCRED.unpack(data[: _UCRED.size])[0]
    return fds, pid


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def make_payload(raw: bytes) -> int:
    """A memfd with these bytes; the caller closes it."""
    fd = os.memfd_create("payload", os.MFD_CLOEXEC)
    try:
        view = memoryview(raw)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
