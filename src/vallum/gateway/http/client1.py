"""HTTP/1.1 towards granted servers: requests written anew, answers read strictly and with bounded memory.

Covered: answers that lie about their length, end early, come twice or unasked, have heads without end, or do not come.
Not covered: trailers of answers; they are dropped (RFC 9110, section 6.5.1).
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

import h11
import msgspec

from vallum.gateway.cell import GatewayCell
from vallum.gateway.http.exchange import MAX_HEAD_BYTES, Carrier, Headers
from vallum.gateway.http.head import MalformedError, end_to_end, is_chunked, read_length
from vallum.gateway.relay import Counters
from vallum.gateway.stream import PIECE, SocketStream, Stream
from vallum.gateway.tls.upstream import connect_tls

HEAD_S = 300.0
"""How long a server may think before its answer begins."""
IDLE_S = 300.0
"""How long a server may pause within its answer, or leave what was sent to it unread."""
MAX_UPSTREAMS = 1024
"""Connections to servers that one cell may have at once."""
MAX_IDLE = 8
"""Of one flow, kept for its next requests."""
SLOT_S = 30.0
"""How long a request waits for others of the cell to end."""
MAX_INTERIM = 16
"""Answers with 1xx before the real one."""


class UpstreamError(OSError):
    """The server's answer cannot be used. Says why."""


class ResponseHead(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer begins."""

    status: int
    headers: Headers
    """As :data:`~vallum.gateway.http.exchange.Headers`."""
    length: int | None
    """Content-Length; None when there is none."""


class Upstream:
    """One connection to a server. One request at a time."""

    def __init__(self, sock: socket.socket, stream: Stream, counters: Counters) -> None:
        self._sock = sock
        self._stream = stream
        self._counters = counters
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    @property
    def is_fresh(self) -> bool:
        """Whether another request may be sent over it: the last one ended well, and nothing came since."""
        if self._parser.our_state is not h11.IDLE or self._parser.trailing_data[0]:
            return False
        poll = select.poll()  # select(2) cannot take descriptors beyond 1023
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    async def send_head(self, method: str, target: str, headers: Headers) -> None:
        """Send a request's head; ``headers`` are complete, with Host and the framing of the body.

        Raises:
            OSError: the connection broke.
        """
        await self._send(h11.Request(method=method, target=target, headers=list(headers)))

    async def send_body(self, data: bytes) -> None:
        """Send a piece of its body; waits while the server does not read. Raises OSError as :meth:`send_head`."""
        await self._send(h11.Data(data=data))

    async def end_body(self) -> None:
        """The request is complete. Raises OSError as :meth:`send_head`."""
        await self._send(h11.EndOfMessage())

    async def send_whole(self, method: str, target: str, headers: Headers, body: bytes) -> None:
        """Send a request and its body in one piece: each piece wakes the server. Raises OSError as :meth:`send_head`."""
        events = [
            h11.Request(method=method, target=target, headers=list(headers)),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        data = b"".join(self._parser.send(event) or b"" for event in events)
        self._counters.bytes_out += len(data)
        async with asyncio.timeout(IDLE_S):
            await self._stream.send(data)

    async def read_head(self) -> ResponseHead:
        """The final answer's head, or that of 101; other interim answers are passed over.

        Raises:
            UpstreamError: there is none that can be read.
            OSError: the connection broke; TimeoutError: it took too long.
        """
        async with asyncio.timeout(HEAD_S):
            for _ in range(MAX_INTERIM):
                event = await self._next_event()
                if isinstance(event, h11.Response) or (
                    isinstance(event, h11.InformationalResponse) and event.status_code == 101
                ):
                    headers = [(bytes(name), bytes(value)) for name, value in event.headers]
                    try:
                        length = read_length(headers)
                    except MalformedError as error:
                        raise UpstreamError(f"the server's answer is malformed: {error}") from error
                    if is_chunked(event):
                        length = None  # it was read by its chunks, whatever else it claims
                    return ResponseHead(status=event.status_code, headers=end_to_end(headers), length=length)
                if not isinstance(event, h11.InformationalResponse):
                    raise UpstreamError("the server ended without an answer")
        raise UpstreamError(f"the server sent more than {MAX_INTERIM} interim answers")

    async def read_body(self) -> AsyncIterator[bytes]:
        """The answer's body. Raises as :meth:`read_head`."""
        while True:
            async with asyncio.timeout(IDLE_S):
                event = await self._next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise UpstreamError("the server ended within its answer")

    def settle(self) -> None:
        """The exchange is over: be ready for the next, if it ended well on both sides."""
        if self._parser.our_state is h11.DONE and self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()

    def switch(self) -> Stream:
        """The bytes themselves, after a 101: those that came behind its head first. They are counted."""
        return _Switched(self._stream, self._parser.trailing_data[0], self._counters)

    def close(self) -> None:
        """Close it, without waiting for anything."""
        self._stream.abort()

    async def _send(self, event: h11.Event) -> None:
        data = self._parser.send(event)
        if data:
            self._counters.bytes_out += len(data)
            async with asyncio.timeout(IDLE_S):
                await self._stream.send(data)

    async def _next_event(self) -> object:
        try:
            while (event := self._parser.next_event()) is h11.NEED_DATA:
                data = await self._stream.recv()
                self._counters.bytes_in += len(data)
                self._parser.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise UpstreamError(f"the server's answer is malformed ({error})") from error
        return event


class _Switched:
    """A :class:`~vallum.gateway.stream.Stream` that begins with bytes that came already."""

    def __init__(self, stream: Stream, head: bytes, counters: Counters) -> None:
        self._stream = stream
        self._head = head
        self._counters = counters

    async def recv(self, limit: int = PIECE) -> bytes:
        """As :meth:`Stream.recv`."""
        if self._head:
            data, self._head = self._head[:limit], self._head[limit:]
            return data
        data = await self._stream.recv(limit)
        self._counters.bytes_in += len(data)
        return data

    async def send(self, data: bytes) -> None:
        """As :meth:`Stream.send`."""
        self._counters.bytes_out += len(data)
        await self._stream.send(data)

    async def finish(self) -> None:
        """As :meth:`Stream.finish`."""
        await self._stream.finish()

    def close(self) -> None:
        """As :meth:`Stream.close`."""
        self._stream.close()

    def abort(self) -> None:
        """As :meth:`Stream.abort`."""
        self._stream.abort()


_slots: WeakKeyDictionary[GatewayCell, asyncio.Semaphore] = WeakKeyDictionary()


class Upstreams:
    """The connections of one flow to its server. Never shared with another flow; of one cell at most :data:`MAX_UPSTREAMS`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._free = _slots.setdefault(carrier.cell, asyncio.Semaphore(MAX_UPSTREAMS))
        self._idle: dict[tuple[str, str], list[Upstream]] = {}
        self._all: set[Upstream] = set()

    async def open(self, scheme: str, host: str, *, fresh: bool = False) -> tuple[Upstream, bool]:
        """A connection for a request to ``host``, and whether it was used before (never when ``fresh``).

        Raises:
            HandshakeError: the server's certificate cannot be accepted.
            OSError: it cannot be connected to (TimeoutError: also when the cell has too many connections for too long).
        """
        idle = self._idle.get((scheme, host), [])
        while idle and not fresh:
            kept = idle.pop()
            if kept.is_fresh:
                return kept, True
            self.drop(kept)
        sock = await self._carrier.connect()
        try:
            stream: Stream = SocketStream(sock)
            if scheme == "https":
                roots = self._carrier.cell.kit.upstream_roots
                stream = await connect_tls(sock, server_name=host, roots_pem=roots)
        except BaseException:
            sock.close()
            raise
        upstream = Upstream(sock, stream, self._carrier.counters)
        self._all.add(upstream)
        return upstream, False

    def keep(self, scheme: str, host: str, upstream: Upstream) -> None:
        """Its exchange ended: keep it for the next, if it can be."""
        upstream.settle()
        idle = self._idle.setdefault((scheme, host), [])
        if upstream.is_fresh and len(idle) < MAX_IDLE:
            idle.append(upstream)

    def release(self, upstream: Upstream) -> None:
        """Nobody uses it any more: close it, unless it is kept."""
        if not any(upstream in idle for idle in self._idle.values()):
            self.drop(upstream)

    def drop(self, upstream: Upstream) -> None:
        """Close one."""
        if upstream in self._all:
            self._all.remove(upstream)
            self._free.release()
        upstream.close()

    def close(self) -> None:
        """Close all of them."""
        for upstream in tuple(self._all):
            self.drop(upstream)
        self._idle.clear()
