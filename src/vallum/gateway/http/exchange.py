"""One request and its answer, the same for HTTP/1.1 and HTTP/2, in clear or inside TLS that the gateway ended.

A *server* (``server1``, ``server2``) reads requests from a guest and makes exchanges; a *service* answers them:
``forward`` (the granted server), ``packages``, ``model``, ``tools``. A service is only called after the request was
judged and its opening record acknowledged.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell, Owner
from vallum.gateway.relay import Counters
from vallum.gateway.stream import Stream
from vallum.rules.verdicts import FlowFacts

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, in the order sent, without those that belong to the connection (RFC 9110 7.6.1) and without
``transfer-encoding``; ``host`` is in :attr:`RequestHead.host`."""

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for."""

    method: str
    scheme: Literal["http", "https"]
    host: str
    """Normalised name, or an address without brackets."""
    port: int
    target: str
    """Path and query in origin form, as sent (not decoded)."""
    headers: Headers
    version: Literal["1.0", "1.1", "2"]
    length: int | None = None
    """Content-Length; None when the body is of unknown length or there is none."""
    streamed: bool = False
    """There may be a body, and its length is not known."""
    upgrade: str = ""
    """``websocket`` when the request asks for it."""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name (lower case)."""
        return next((value for key, value in self.headers if key == name), None)


class Carrier(Protocol):
    """The flow that carries requests."""

    id: str
    cell: GatewayCell
    facts: FlowFacts
    counters: Counters

    async def connect(self) -> socket.socket:
        """A new connection to the server that the guest meant; the caller's to close. Raises OSError."""
        ...

    async def owner(self) -> Owner:
        """Who opened it. Raises NodeGoneError."""
        ...


@dataclass
class Tally:
    """What an exchange came to, for the record of its end."""

    status: int | None = None
    bytes_out: int = 0
    """Body bytes that a service really sent outside; the service counts them."""
    bytes_in: int = 0
    """Body bytes given to the guest; the exchange counts them."""
    credential: str = ""
    upgrade: str = ""
    messages_out: int = 0
    messages_in: int = 0


class Exchange(Protocol):
    """A request that waits for its answer."""

    id: str
    head: RequestHead
    carrier: Carrier
    decision: Decision
    """The verdict on it; ``decision.rule`` names the grant whose credential and service hold."""
    tally: Tally
    opened: asyncio.Future[None] | None
    """The record of its opening, on its way: only for a service of :data:`vallum.gateway.http.desk.WAITING`. Raises NodeGoneError."""

    def body(self) -> AsyncIterator[bytes]:
        """The request's body, as it comes; ends at its end. Reading it slows the guest down.

        Raises:
            GuestGoneError: the guest went away or broke the protocol; nothing more may be sent upstream.
        """
        ...

    async def read_body(self, limit: int) -> bytes:
        """All of the body.

        Raises:
            BodyTooLargeError: it has more than ``limit`` bytes.
            GuestGoneError: as :meth:`body`.
        """
        ...

    async def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """Send the answer's head. ``length`` None: the body ends with :meth:`end`."""
        ...

    async def send(self, data: bytes) -> None:
        """Send a piece of the answer's body; waits while the guest does not read."""
        ...

    async def end(self) -> None:
        """The answer is complete."""
        ...

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer in one piece, where that can be; no body goes to a HEAD."""
        ...

    async def switch(self, headers: Headers) -> Stream:
        """Answer 101 with these headers; from here on it is bytes both ways, and ``end`` is not called.

        Raises:
            NoUpgradeError: this exchange cannot (HTTP/2, or the guest did not ask for it).
        """
        ...

    async def left(self) -> None:
        """Returns when the guest has gone, or will send nothing more."""
        ...

    async def abort(self, reason: str) -> None:
        """Cut the answer off so that the guest can tell (RST_STREAM, or the connection closed)."""
        ...

    async def refuse(self, decision: Decision, status: int = 403) -> None:
        """Answer ``status`` with the rule and the reason in words, if the head was not sent yet; else :meth:`abort`."""
        ...


class Desk(Protocol):
    """Where servers bring what guests ask."""

    async def answer(self, exchange: Exchange) -> None:
        """Judge, record and answer it, whatever comes of it; only cancelling ends it early.

        Raises:
            OSError: the guest's connection broke.
        """
        ...

    async def turn_away(self, decision: Decision) -> None:
        """Record that what came could not be read as a request. The server answers it."""
        ...


class DeniedError(Exception):
    """What a service was to send must not be sent. Nothing of it was."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.reason)
        self.decision = decision


class MalformedFlowError(Exception):
    """What the guest sends can no longer be read; its connection ends. Says why."""


class NoUpgradeError(Exception):
    """The exchange cannot become a stream of bytes both ways."""


class GuestGoneError(Exception):
    """The guest went away, or what it sent is not HTTP."""


class BodyTooLargeError(Exception):
    """A body is larger than the service reads."""


class Service(Protocol):
    """Answers exchanges."""

    async def serve(self, exchange: Exchange) -> None:
        """Answer it. The request was allowed and recorded as opened before; the caller records its end.

        Raises:
            DeniedError: what it was to send outside must not be sent; the caller refuses and records.
            GuestGoneError, OSError, NodeGoneError: it could not be finished; the caller aborts and records.
        """
        ...

    def close(self) -> None:
        """The flow is over: let go of what was kept for it (connections to servers). More than once is no error."""
        ...


async def collect_body(exchange: Exchange, limit: int) -> bytes:
    """:meth:`Exchange.read_body` in terms of :meth:`Exchange.body`; raises as it does."""
    length = exchange.head.length
    if length is not None and length > limit:
        raise BodyTooLargeError(f"the body has {length} bytes, more than {limit}")
    read = bytearray()
    async for piece in exchange.body():
        read += piece
        if len(read) > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes")
    return bytes(read)
