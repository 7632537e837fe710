"""What every fake is: listeners on given endpoints, and counts of what arrived at each.

A count is made when the bytes are read from the socket, before anything is parsed, so that a
message the fake does not understand counts as delivered all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

MAX_READ_BYTES = 64 * 1024
LINGER_S = 30.0
"""Silence after which a fake hangs up, so that no test waits for a forgotten connection."""

_TURNS = 4
"""Turns of the loop from accepting a connection until its handler has begun: before, nobody would close it."""


class Endpoint(NamedTuple):
    """Where a fake listens. Port 0 lets the kernel choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Received(msgspec.Struct, kw_only=True):
    """What arrived at one endpoint."""

    connections: int = 0
    """Connections accepted, or datagrams for a UDP endpoint. A connection without payload counts here only."""
    payload_bytes: int = 0
    """Bytes read from peers, headers of TCP/IP excluded."""
    units: dict[str, int] = msgspec.field(default_factory=dict)
    """What the bytes meant, in the fake's own words: ``shares``, ``secrets_read``, ``queries``..."""

    def count(self, unit: str, amount: int = 1) -> None:
        """Add to a unit."""
        self.units[unit] = self.units.get(unit, 0) + amount

    def since(self, before: Received) -> Received:
        """What arrived after ``before`` was copied."""
        units = {name: value - before.units.get(name, 0) for name, value in self.units.items()}
        return Received(
            connections=self.connections - before.connections,
            payload_bytes=self.payload_bytes - before.payload_bytes,
            units={name: value for name, value in units.items() if value},
        )

    def is_nothing(self) -> bool:
        """Whether not even a connection arrived."""
        return self.connections == 0 and self.payload_bytes == 0 and not any(self.units.values())


class Fake(ABC):
    """A server that counts. Use it as an async context manager."""

    def __init__(self) -> None:
        self.received: dict[Endpoint, Received] = {}
        """Counts by endpoint; filled with zeros when the fake has started."""

    @abstractmethod
    async def start(self) -> None:
        """Listen. After it, :attr:`received` names the real endpoints (ports that were 0 are known).

        Raises:
            OSError: an endpoint cannot be bound.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Close every listener and connection."""

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where it listens, in the order given."""
        return list(self.received)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class TcpFake(Fake):
    """A fake over TCP: subclasses serve one connection in :meth:`serve`, reading through :class:`CountedReader`."""

    def __init__(self, endpoints: Iterable[Endpoint | tuple[str, int]]) -> None:
        super().__init__()
        self._wanted = [Endpoint(*endpoint) for endpoint in endpoints]
        self.tls: ssl.SSLContext | None = None
        """Set before it starts: it speaks TLS."""
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Speak the protocol on one connection; the caller closes it."""

    async def start(self) -> None:
        """Listen on every endpoint, or on none."""
        try:
            for wanted in self._wanted:
                server, at = await self._listen(wanted)
                self._servers.append(server)
                self.received[at] = Received()
        except OSError:
            await self.stop()
            raise

    async def _listen(self, wanted: Endpoint) -> tuple[asyncio.Server, Endpoint]:
        bound: list[Endpoint] = []

        async def accept(raw: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await self._serve_one(raw, writer, bound[0])
            finally:
                self._tasks.discard(task)

        server = await asyncio.start_server(accept, wanted.host, wanted.port, backlog=1024, ssl=self.tls)
        bound.append(Endpoint(wanted.host, server.sockets[0].getsockname()[1]))
        return server, bound[0]

    async def _serve_one(self, raw: asyncio.StreamReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        count = self.received[at]
        count.connections += 1
        try:
            await self.serve(CountedReader(raw, count), writer, at)
        except (ConnectionError, TimeoutError, EOFError):
            pass  # a peer that leaves is nothing special here: what it had sent is counted
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def stop(self) -> None:
        """Close listeners and connections."""
        for server in self._servers:
            server.close()
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._servers.clear()


class CountedReader:
    """A stream of which every byte is counted on arrival."""

    def __init__(self, raw: asyncio.StreamReader, count: Received) -> None:
        self._raw = raw
        self._buffer = b""
        self.count = count

    async def read(self) -> bytes:
        """The next bytes; empty at the end.

        Raises:
            TimeoutError: nothing came for ``LINGER_S`` seconds.
        """
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        async with asyncio.timeout(LINGER_S):
            data = await self._raw.read(MAX_READ_BYTES)
        self.count.payload_bytes += len(data)
        return data

    async def readline(self) -> bytes:
        """The next line with its end; what there is at the end of the stream; at most ``MAX_READ_BYTES``."""
        kept = b""
        while b"\n" not in kept and len(kept) < MAX_READ_BYTES:
            data = await self.read()
            if not data:
                return kept
            kept += data
        line, end, self._buffer = kept.partition(b"\n")
        return line + end
