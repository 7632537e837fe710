"""A UDP endpoint that takes everything and says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from vallum.testing.fakes.base import Endpoint, Fake, Received


class DatagramSink(Fake):
    """Counts datagrams as connections, and their bytes."""

    def __init__(self, endpoints: Iterable[Endpoint | tuple[str, int]]) -> None:
        super().__init__()
        self._wanted = [Endpoint(*endpoint) for endpoint in endpoints]
        self._transports: list[asyncio.DatagramTransport] = []

    async def start(self) -> None:
        """Bind every endpoint, or none."""
        loop = asyncio.get_running_loop()
        try:
            for wanted in self._wanted:
                count = Received()
                transport, _ = await loop.create_datagram_endpoint(partial(_Counter, count), local_addr=wanted)
                self._transports.append(transport)
                self.received[Endpoint(wanted.host, transport.get_extra_info("sockname")[1])] = count
        except OSError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the sockets."""
        for transport in self._transports:
            transport.close()
        self._transports.clear()


class _Counter(asyncio.DatagramProtocol):
    def __init__(self, count: Received) -> None:
        self._count = count

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._count.connections += 1
        self._count.payload_bytes += len(data)
