"""Bytes both ways between a guest and a server: backpressure, half-close, counted; guest bytes pass a guard first."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vallum.core.verdict import Decision
from vallum.gateway.http1 import RefusedError
from vallum.gateway.sniff import MinerWatch, Sniffed, Sniffer

CHUNK = 128 * 1024
HALF_CLOSED_S = 300.0
"""How long one direction may stay silent once the other has ended."""


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


async def send_all(sock: socket.socket, data: bytes) -> int:
    """Send everything; returns how much was sent. Waits while the other side does not read.

    Raises:
        OSError: the other side has gone.
    """
    loop = asyncio.get_running_loop()
    try:
        sent = sock.send(data)
    except BlockingIOError:
        sent = 0
    if sent < len(data):
        await loop.sock_sendall(sock, memoryview(data)[sent:])
    return len(data)


class _Pump:
    def __init__(self, guest: socket.socket, server: socket.socket, guard: Guard, counters: Counters) -> None:
        self.guest = guest
        self.server = server
        self.guard = guard
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self.sending = asyncio.Lock()

    async def to_server(self, data: bytes) -> None:
        async with self.sending:
            try:
                ready = self.guard.feed(data)
            except RefusedError as error:
                error.evidence = data
                raise
            if ready:
                self.counters.bytes_out += await send_all(self.server, ready)

    async def outward(self) -> None:
        while data := await self.loop.sock_recv(self.guest, CHUNK):
            await self.to_server(data)
        async with self.sending:
            if last := self.guard.finish():
                self.counters.bytes_out += await send_all(self.server, last)
        self.server.shutdown(socket.SHUT_WR)

    async def inward(self) -> None:
        while data := await self.loop.sock_recv(self.server, CHUNK):
            if self.guard.is_waiting:
                # Only then may guest bytes follow from it; otherwise the lock could hold up the server's bytes.
                async with self.sending:
                    if released := self.guard.feed_response(data):
                        self.counters.bytes_out += await send_all(self.server, released)
            self.counters.bytes_in += await send_all(self.guest, data)
        self.guest.shutdown(socket.SHUT_WR)


async def relay(guest: socket.socket, server: socket.socket, guard: Guard, counters: Counters, first: bytes) -> None:
    """Send ``first`` (guest bytes judged already, through the guard like all others), then relay until both sides ended.

    Raises:
        RefusedError: the guard refused bytes of the guest; they were not sent.
        OSError: one side broke off (also TimeoutError: silent for too long when half closed).
    """
    pump = _Pump(guest, server, guard, counters)
    if first:
        await pump.to_server(first)
    tasks = {asyncio.create_task(pump.outward()), asyncio.create_task(pump.inward())}
    try:
        open_ways = tasks
        while open_ways:
            before = (counters.bytes_out, counters.bytes_in)
            silence_s = HALF_CLOSED_S if len(open_ways) == 1 else None
            done, open_ways = await asyncio.wait(open_ways, timeout=silence_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if not done and before == (counters.bytes_out, counters.bytes_in):
                raise TimeoutError("half closed and silent")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
