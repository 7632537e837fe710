"""Hosts of an internal network with services that greet or answer whoever connects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vallum.testing.fakes.base import CountedReader, Endpoint, TcpFake

PORTS = (22, 80, 443, 3306, 5432, 6379, 8080)
_GREETING = {22: b"SSH-2.0-OpenSSH_9.2p1 internal\r\n", 3306: b"\x2f\x00\x00\x00\x0a8.0.36-fake\x00"}
_ANSWER = {
    80: b"HTTP/1.0 200 OK\r\nServer: internal-wiki\r\nContent-Length: 0\r\n\r\n",
    8080: b"HTTP/1.0 401 Unauthorized\r\nServer: internal-ci\r\nContent-Length: 0\r\n\r\n",
    443: b"\x15\x03\x01\x00\x02\x02\x28",
    5432: b"N",
    6379: b"-NOAUTH Authentication required.\r\n",
}


class InternalHosts(TcpFake):
    """Open ports on several addresses: some greet, the others answer the first bytes. Unit: ``probes`` (with payload)."""

    def __init__(
        self, hosts: Iterable[str], ports: Iterable[int] = PORTS, *, services: dict[int, int] | None = None
    ) -> None:
        """``services`` maps a listening port to the well-known one whose service it plays, where they differ."""
        wanted = list(ports)
        super().__init__([Endpoint(host, port) for host in hosts for port in wanted])
        self._services = services or {}

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Greet, read once, answer, hang up."""
        service = self._services.get(at.port, at.port)
        if greeting := _GREETING.get(service):
            writer.write(greeting)
            await writer.drain()
        if await reader.read():
            reader.count.count("probes")
            writer.write(_ANSWER.get(service, b""))
            await writer.drain()
