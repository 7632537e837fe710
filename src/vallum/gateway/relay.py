"""Bytes both ways between a guest and a server: backpressure, half-close, counted; guest bytes pass a guard first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vallum.core.verdict import Decision
from vallum.gateway.door import is_reset
from vallum.gateway.http1 import RefusedError
from vallum.gateway.sniff import MinerWatch, Sniffed, Sniffer

CHUNK = 256 * 1024
HALF_CLOSED_S = 300.0
"""How long one direction may stay silent once the other has ended."""
LOOK_S = 1.0
"""How often a guest is looked at that is not read from for the time being."""
_piece = memoryview(bytearray(CHUNK))
"""What is read is sent on before anything else is read, so one buffer serves every flow of the loop."""


class Guard(Protocol):
    """Looks at the guest's bytes before they are sent, and at the server's."""

    @property
    def is_waiting(self) -> bool:
        """Whether guest bytes are kept back until the server has spoken."""
        ...

    def feed(self, data: bytes) -> bytes:
        """Bytes to send now. Raises RefusedError to cut the flow."""
        ...

    def feed_response(self, data: bytes) -> bytes:
        """Guest bytes that had waited for these of the server. Raises RefusedError to cut the flow."""
        ...

    def finish(self) -> bytes:
        """The guest sends no more: the last bytes to send. Raises RefusedError to cut the flow."""
        ...


class OpenGuard:
    """Lets everything pass: what TLS and SSH carry cannot be seen."""

    is_waiting = False

    def feed(self, data: bytes) -> bytes:
        """The same bytes."""
        return data

    def feed_response(self, data: bytes) -> bytes:
        """Nothing ever waits."""
        return b""

    def finish(self) -> bytes:
        """Nothing is kept."""
        return b""


class UnknownGuard(OpenGuard):
    """Cuts an unknown flow that turns out to be a miner's."""

    def __init__(self) -> None:
        self._watch = MinerWatch()

    def feed(self, data: bytes) -> bytes:
        """The same bytes, unless they complete a miner's message."""
        if self._watch.feed(data):
            reason = "a miner's message came in a flow that was unknown when it was opened"
            raise RefusedError(Decision(verdict="deny", rule="protocol-mismatch", reason=reason))
        return data


class HoldingGuard:
    """For a server that speaks first: the guest's bytes are kept back until they are identified and judged."""

    is_waiting = False

    def __init__(self, judge: Callable[[Sniffed], Guard]) -> None:
        """``judge`` returns the guard for what the flow is, or raises RefusedError."""
        self._judge = judge
        self._sniffer = Sniffer()
        self._inner: Guard | None = None

    def feed(self, data: bytes) -> bytes:
        """Nothing until the bytes are identified; then all of them through the guard for it."""
        if self._inner is not None:
            return self._inner.feed(data)
        found = self._sniffer.feed(data)
        return b"" if found is None else self._pass(found)

    def feed_response(self, data: bytes) -> bytes:
        """What the inner guard says."""
        return b"" if self._inner is None else self._inner.feed_response(data)

    def finish(self) -> bytes:
        """What is still kept is judged as it stands."""
        if self._inner is not None:
            return self._inner.finish()
        return self._pass(self._sniffer.finish()) if self._sniffer.data else b""

    def _pass(self, found: Sniffed) -> bytes:
        self._inner = self._judge(found)
        return self._inner.feed(bytes(self._sniffer.data))


@dataclass
class Counters:
    """Payload that really went over a socket."""

    bytes_out: int = 0
    bytes_in: int = 0

    def count_out(self, size: int) -> None:
        """So many bytes have gone to the server."""
        self.bytes_out += size

    def count_in(self, size: int) -> None:
        """So many bytes have gone to the guest."""
        self.bytes_in += size


class Meter(Protocol):
    """Counts against a budget before anything is sent."""

    def spend(self, *, bytes_out: int = 0, bytes_in: int = 0) -> None:
        """Raises RefusedError when that is more than is left; nothing of it may be sent then."""
        ...


class _Sink:
    """The sending side of a socket: what the kernel does not take at once is kept, and more is asked for when it is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, count: Callable[[int], None]) -> None:
        """``count`` is told of bytes that have gone over the socket."""
        self._loop = loop
        self._count = count
        self._sock = sock
        self._kept = bytearray()
        self._is_ending = False
        self._drained: Callable[[], None] | None = None
        self._failed: Callable[[OSError], None] | None = None
        self.is_ended = False

    def listen(self, drained: Callable[[], None], failed: Callable[[OSError], None]) -> None:
        """``drained``: everything that was kept has been sent. ``failed``: it cannot be."""
        self._drained, self._failed = drained, failed

    def send(self, data: memoryview | bytes) -> bool:
        """Whether all of it was taken; if not, :meth:`listen` tells when. Raises OSError."""
        sent = 0
        if not self._kept:
            with contextlib.suppress(BlockingIOError):
                sent = self._sock.send(data)
            self._count(sent)
            if sent == len(data):
                return True
            self._loop.add_writer(self._sock.fileno(), self._writable)
        self._kept += data[sent:]
        return False

    def end(self) -> None:
        """Half-close once everything has been sent. Raises OSError."""
        self._is_ending = True
        if not self._kept and not self.is_ended:
            self._sock.shutdown(socket.SHUT_WR)
            self.is_ended = True

    def forget(self) -> None:
        """Send no more."""
        self._loop.remove_writer(self._sock.fileno())

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._kept)
            self._count(sent)
            del self._kept[:sent]
            if self._kept:
                return
            self._loop.remove_writer(self._sock.fileno())
            if self._is_ending:
                self.end()
        except BlockingIOError:
            return
        except OSError as error:
            self._loop.remove_writer(self._sock.fileno())
            if self._failed is not None:
                self._failed(error)
            return
        if self._drained is not None:
            self._drained()


class Relay:
    """One flow. No task and no future for a piece: two readers on the loop, and one future for the end."""

    def __init__(
        self,
        guest: socket.socket,
        server: socket.socket,
        guard: Guard,
        counters: Counters,
        meter: Meter | None = None,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._guest, self._server = guest, server
        self._guard = guard
        self._counters = counters
        self._meter = meter
        self._out, self._in = _Sink(loop, server, counters.count_out), _Sink(loop, guest, counters.count_in)
        self._out.listen(self._resume_guest, self._fail)
        self._in.listen(self._resume_server, self._fail)
        self._guest_ended = self._server_ended = False
        self._done: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._seen = (0, 0)

    async def run(self, first: bytes) -> None:
        """As :func:`relay`."""
        try:
            if not first or self._send_out(first):
                self._resume_guest()
            else:
                self._pause_guest()
            self._resume_server()
            await self._done
        finally:
            for timer in (self._timer, self._look):
                if timer is not None:
                    timer.cancel()
            for sock in (self._guest, self._server):
                self._loop.remove_reader(sock.fileno())
            self._out.forget()
            self._in.forget()

    def _resume_guest(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if not self._guest_ended:
            self._loop.add_reader(self._guest.fileno(), self._read_guest)
        self._check_end()

    def _pause_guest(self) -> None:
        """The server does not read. Nor do we then; and who is not read from is not seen to go, so it is looked at."""
        self._loop.remove_reader(self._guest.fileno())
        if self._look is None:
            self._look = self._loop.call_later(LOOK_S, self._look_at_guest)

    def _look_at_guest(self) -> None:
        if is_reset(self._guest):
            self._fail(ConnectionResetError(errno.ECONNRESET, "the guest has gone"))
        self._look = self._loop.call_later(LOOK_S, self._look_at_guest)

    def _resume_server(self) -> None:
        if not self._server_ended:
            self._loop.add_reader(self._server.fileno(), self._read_server)
        self._check_end()

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _read_guest(self) -> None:
        try:
            size = self._guest.recv_into(_piece)
            if size:
                if not self._send_out(bytes(_piece[:size])):
                    self._pause_guest()
                return
            self._loop.remove_reader(self._guest.fileno())
            self._guest_ended = True
            last = self._guard.finish()
            if last:
                self._count_out(last)
            self._out.end()
            self._check_end()
        except BlockingIOError:
            return
        except (RefusedError, OSError) as error:
            self._fail(error)

    def _send_out(self, data: bytes) -> bool:
        try:
            ready = self._guard.feed(data)
        except RefusedError as error:
            error.evidence = data
            raise
        return not ready or self._count_out(ready)

    def _count_out(self, ready: bytes) -> bool:
        if self._meter is not None:
            self._meter.spend(bytes_out=len(ready))
        return self._out.send(ready)

    def _read_server(self) -> None:
        try:
            size = self._server.recv_into(_piece)
            if not size:
                self._loop.remove_reader(self._server.fileno())
                self._server_ended = True
                self._in.end()
                self._check_end()
                return
            data = _piece[:size]
            if self._meter is not None:
                self._meter.spend(bytes_in=size)
            is_taken = self._in.send(data)
            if self._guard.is_waiting and (released := self._guard.feed_response(bytes(data))):
                self._count_out(released)
            if not is_taken:
                self._loop.remove_reader(self._server.fileno())
        except BlockingIOError:
            return
        except (RefusedError, OSError) as error:
            self._fail(error)

    def _check_end(self) -> None:
        if self._done.done() or not (self._out.is_ended or self._in.is_ended):
            return
        if self._out.is_ended and self._in.is_ended:
            self._done.set_result(None)
        elif self._timer is None:
            self._watch_silence()

    def _watch_silence(self) -> None:
        seen = (self._counters.bytes_out, self._counters.bytes_in)
        if self._timer is not None and seen == self._seen:
            self._fail(TimeoutError("half closed and silent"))
            return
        self._seen = seen
        self._timer = self._loop.call_later(HALF_CLOSED_S, self._watch_silence)


async def relay(
    guest: socket.socket,
    server: socket.socket,
    guard: Guard,
    counters: Counters,
    first: bytes,
    meter: Meter | None = None,
) -> None:
    """Send ``first`` (guest bytes judged already, through the guard like all others), then relay until both sides ended.

    Raises:
        RefusedError: the guard (or the meter) refused bytes of the guest; they were not sent.
        OSError: one side broke off (also TimeoutError: silent for too long when half closed).
    """
    await Relay(guest, server, guard, counters, meter).run(first)
