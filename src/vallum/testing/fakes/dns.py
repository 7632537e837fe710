"""A name server for a made-up zone, over UDP and TCP, that remembers every question.

A query is itself a message to whoever runs the zone, so the questions are the payload that counts.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from vallum.testing.fakes.base import CountedReader, Endpoint, Fake, Received, TcpFake

TTL_S = 30


class DnsServer(Fake):
    """Answers A and AAAA of ``zone`` (name -> addresses); other names NXDOMAIN. Units: ``queries``.

    UDP and TCP of one address share one :class:`Received`.
    """

    def __init__(self, endpoints: Iterable[Endpoint | tuple[str, int]], zone: Mapping[str, Iterable[str]]) -> None:
        super().__init__()
        self._wanted = [Endpoint(*endpoint) for endpoint in endpoints]
        self._zone = {name.lower().rstrip("."): list(addresses) for name, addresses in zone.items()}
        self._transports: list[asyncio.DatagramTransport] = []
        self._streams: list[_DnsOverTcp] = []
        self.queries: list[tuple[str, str]] = []
        """(name, type) of every question, oldest first; names in lower case without the last dot."""

    async def start(self) -> None:
        """Bind UDP and TCP on every endpoint; with port 0 the same port for both."""
        loop = asyncio.get_running_loop()
        try:
            for wanted in self._wanted:
                count = Received()
                transport, _ = await loop.create_datagram_endpoint(partial(_DnsOverUdp, self, count), local_addr=wanted)
                self._transports.append(transport)
                at = Endpoint(wanted.host, transport.get_extra_info("sockname")[1])
                stream = _DnsOverTcp(self, at)
                await stream.start()
                stream.received[at] = self.received[at] = count
                self._streams.append(stream)
        except OSError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the sockets."""
        for transport in self._transports:
            transport.close()
        for stream in self._streams:
            await stream.stop()
        self._transports.clear()
        self._streams.clear()

    def answer(self, wire: bytes, count: Received) -> bytes | None:
        """The reply to one message; None for what is not a query."""
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            count.count("not_dns")
            return None
        if query.flags & dns.flags.QR or not query.question:
            return None
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        count.count("queries")
        self.queries.append((name, kind))
        reply = dns.message.make_response(query, recursion_available=True)
        addresses = self._zone.get(name)
        if addresses is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        else:
            wanted = [a for a in addresses if (":" in a) == (kind == "AAAA")] if kind in ("A", "AAAA") else []
            if wanted:
                reply.answer.append(dns.rrset.from_text(question.name, TTL_S, "IN", kind, *wanted))
        return reply.to_wire()


class _DnsOverUdp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer, count: Received) -> None:
        self._server = server
        self._count = count
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # 3.11's class does not say that it is one

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._count.connections += 1
        self._count.payload_bytes += len(data)
        reply = self._server.answer(data, self._count)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, addr)


class _DnsOverTcp(TcpFake):
    def __init__(self, server: DnsServer, at: Endpoint) -> None:
        super().__init__([at])
        self._server = server

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        held = b""
        while data := await reader.read():
            held += data
            while len(held) >= 2 and len(held) >= 2 + (length := struct.unpack(">H", held[:2])[0]):
                reply = self._server.answer(held[2 : 2 + length], reader.count)
                held = held[2 + length :]
                if reply is None:
                    return
                writer.write(struct.pack(">H", len(reply)) + reply)
                await writer.drain()
