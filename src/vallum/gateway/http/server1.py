"""HTTP/1.1 (and 1.0) towards a guest: requests become exchanges, one after the other.

Heads are checked by ``head`` and parsed by h11; nothing of a request is given to anybody before its head was read in
the one way it can be read. What follows a message that cannot be read is never looked at.

Covered: request smuggling towards the server behind us (requests are written anew from what was read), slow heads,
idle connections, heads and chunks without end, a guest that leaves. Not covered: trailers; they are dropped, as an
intermediary may (RFC 9110, section 6.5.1).

Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import h11

from vallum.core.verdict import Decision
from vallum.gateway.http.exchange import (
    MAX_HEAD_BYTES,
    Carrier,
    Desk,
    GuestGoneError,
    Headers,
    NoUpgradeError,
    RequestHead,
    Tally,
    collect_body,
)
from vallum.gateway.http.head import MalformedError, MisdirectedError, Place, check_head, find_end, read_request
from vallum.gateway.http.inflow import GuestStream, Inflow
from vallum.gateway.http.refusal import render
from vallum.gateway.stream import Stream

IDLE_S = 300.0
"""How long a connection may be kept without a request."""
HEAD_S = 30.0
"""How long a head may take from its first byte on."""
BODY_IDLE_S = 300.0
"""How long a guest may stay silent within a body."""
SEND_STALL_S = 300.0
"""How long a guest may leave a piece of an answer unread."""
MAX_DRAIN_BYTES = 256 * 1024
"""Of a body that nobody wanted, read so that the connection can go on."""
_DRAIN_S = 2.0
_UNDECIDED = Decision(verdict="deny", rule="internal-error", reason="it was not judged")


class Exchange1:
    """See :class:`~vallum.gateway.http.exchange.Exchange`."""

    def __init__(self, server: Server1, head: RequestHead, parser: h11.Connection, *, expects: bool) -> None:
        self.id = secrets.token_hex(6)
        self.head = head
        self.carrier = server.carrier
        self.decision = _UNDECIDED
        self.tally = Tally()
        self.opened: asyncio.Future[None] | None = None
        self.switched: GuestStream | None = None
        self.must_close = False
        self._server = server
        self._parser = parser
        self._expects = expects
        self._started = False
        self._ended = False
        self._read_all = False

    @property
    def is_answered(self) -> bool:
        """Whether the guest has a complete answer."""
        return self._ended

    @property
    def has_started(self) -> bool:
        """Whether the head of an answer was sent."""
        return self._started

    async def body(self) -> AsyncIterator[bytes]:
        """As :meth:`Exchange.body`."""
        if self._expects and not self._started and not self._read_all:
            self._expects = False
            await self._write(self._parser.send(h11.InformationalResponse(status_code=100, headers=[])))
        while not self._read_all:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError as error:
                self.must_close = True
                raise GuestGoneError(f"the body is malformed ({error})") from error
            if isinstance(event, h11.Data):
                if event.data:
                    yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._read_all = True
            elif event is h11.NEED_DATA:
                try:
                    self._parser.receive_data(await self._server.inflow.take(BODY_IDLE_S))
                except TimeoutError:
                    raise GuestGoneError(f"nothing of the body came for {BODY_IDLE_S:g} s") from None
            else:
                raise GuestGoneError("the guest ended before the body did")

    async def read_body(self, limit: int) -> bytes:
        """As :meth:`Exchange.read_body`."""
        return await collect_body(self, limit)

    async def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """As :meth:`Exchange.start`."""
        await self._write(self._begin(status, headers, length=length))

    def _begin(self, status: int, headers: Headers, *, length: int | None) -> bytes | None:
        framing: list[tuple[bytes, bytes]] = [] if length is None else [(b"content-length", b"%d" % length)]
        if self.must_close or self._expects:
            # A guest that waits for 100 and hears the end instead may send the body or may not.
            self.must_close = True
            framing.append((b"connection", b"close"))
        self._started = True
        self.tally.status = status
        return self._parser.send(h11.Response(status_code=status, headers=[*headers, *framing]))

    async def send(self, data: bytes) -> None:
        """As :meth:`Exchange.send`."""
        if data:
            self.tally.bytes_in += len(data)
            await self._write(self._parser.send(h11.Data(data=data)))

    async def end(self) -> None:
        """As :meth:`Exchange.end`."""
        await self._write(self._parser.send(h11.EndOfMessage()))
        self._ended = True

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """As :meth:`Exchange.answer`."""
        parts = [self._begin(status, headers, length=len(body))]
        if self.head.method != "HEAD":
            self.tally.bytes_in += len(body)
            parts.append(self._parser.send(h11.Data(data=body)))
        parts.append(self._parser.send(h11.EndOfMessage()))
        await self._write(b"".join(part for part in parts if part))
        self._ended = True

    async def switch(self, headers: Headers) -> Stream:
        """As :meth:`Exchange.switch`."""
        async for _ in self.body():
            raise NoUpgradeError("a request that asks for another protocol cannot have a body")
        if not self.head.upgrade or self._parser.our_state is not h11.SEND_RESPONSE:
            raise NoUpgradeError("the guest did not ask for another protocol")
        self.tally.status, self.tally.upgrade = 101, self.head.upgrade
        switching = [(b"connection", b"upgrade"), (b"upgrade", self.head.upgrade.encode()), *headers]
        self._started = True
        await self._write(self._parser.send(h11.InformationalResponse(status_code=101, headers=switching)))
        rest, _ = self._parser.trailing_data
        self._server.inflow.give_back(rest)
        self.switched = GuestStream(self._server.inflow, self._server.stream)
        self._ended = True
        return self.switched

    async def left(self) -> None:
        """As :meth:`Exchange.left`."""
        await asyncio.shield(self._server.inflow.left)

    async def abort(self, reason: str) -> None:
        """As :meth:`Exchange.abort`."""
        self.must_close = True
        self._ended = True
        self._server.stream.abort()

    async def refuse(self, decision: Decision, status: int = 403) -> None:
        """As :meth:`Exchange.refuse`."""
        if self._started:
            await self.abort(decision.reason)
            return
        status, headers, body = render(self.head, decision, status)
        await self.answer(status, headers, body)

    async def settle(self) -> bytes | None:
        """After the answer: what the guest sent behind this request, or None when the connection cannot go on."""
        if self.must_close or not self._ended or self.switched is not None:
            return None
        drained = 0
        try:
            async with asyncio.timeout(_DRAIN_S):
                async for piece in self.body():
                    drained += len(piece)
                    if drained > MAX_DRAIN_BYTES:
                        return None
        except (GuestGoneError, TimeoutError):
            return None
        if self._parser.our_state is not h11.DONE or self._parser.their_state is not h11.DONE:
            return None
        return self._parser.trailing_data[0]

    async def _write(self, data: bytes | None) -> None:
        if data:
            async with asyncio.timeout(SEND_STALL_S):  # no task of its own, as wait_for makes
                await self._server.stream.send(data)


class Server1:
    """Serves one connection."""

    def __init__(self, stream: Stream, carrier: Carrier, place: Place, desk: Desk) -> None:
        self.stream = stream
        self.carrier = carrier
        self.inflow = Inflow(stream)
        self._place = place
        self._desk = desk

    async def serve(self) -> None:
        """Until the guest or the protocol ends it.

        Raises:
            OSError: the connection broke.
        """
        try:
            while (await self._serve_one()) is not None:
                pass
        except GuestGoneError:
            return
        finally:
            await self.inflow.close()

    async def _serve_one(self) -> bytes | None:
        try:
            raw = await self._read_head()
            if not raw:
                return None
            exchange = self._parse(raw)
        except (MalformedError, MisdirectedError) as error:
            rule = "host-mismatch" if isinstance(error, MisdirectedError) else "malformed"
            await self._turn_away(Decision(verdict="deny", rule=rule, reason=str(error)))
            return None
        answering = asyncio.ensure_future(self._desk.answer(exchange))
        try:
            await asyncio.wait({answering, self.inflow.broken}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
                await asyncio.wait({answering})
                raise GuestGoneError("the guest broke the connection off")
            answering.result()
        finally:
            if not answering.done():
                answering.cancel()
                await asyncio.wait({answering})
        rest = await exchange.settle()
        if rest:
            self.inflow.give_back(rest)
        return rest

    async def _read_head(self) -> bytes:
        """The bytes of the next head; empty when the guest has ended or says nothing."""
        loop = asyncio.get_running_loop()
        data = bytearray()
        deadline = loop.time() + IDLE_S
        try:
            while True:
                piece = await self.inflow.take(max(0.0, deadline - loop.time()))
                if not piece:
                    if data.strip(b"\r\n"):
                        raise MalformedError("the head was not finished")
                    return b""
                if not data:
                    deadline = loop.time() + HEAD_S
                searched = len(data)
                data += piece
                if searched < 2 and data.startswith(b"\r\n"):
                    del data[:2]  # one empty line before a request is no error (RFC 9112, section 2.2)
                    searched = 0
                end = find_end(data, searched)
                if end > 0:
                    self.inflow.give_back(bytes(data[end:]))
                    return bytes(data[:end])
                if len(data) > MAX_HEAD_BYTES:
                    raise MalformedError(f"the head has more than {MAX_HEAD_BYTES} bytes")
        except TimeoutError:
            if data:
                raise MalformedError(f"the head took longer than {HEAD_S:g} s") from None
            return b""

    def _parse(self, raw: bytes) -> Exchange1:
        if len(raw) > MAX_HEAD_BYTES:
            raise MalformedError(f"the head has more than {MAX_HEAD_BYTES} bytes")
        check_head(raw)
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        try:
            parser.receive_data(raw)
            request = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise MalformedError(str(error)) from error
        if not isinstance(request, h11.Request):
            raise MalformedError("this is no request")
        head = read_request(request, self._place)
        if request.method == b"CONNECT":
            raise MalformedError("CONNECT asks the server to open another way out")
        return Exchange1(self, head, parser, expects=parser.they_are_waiting_for_100_continue)

    async def _turn_away(self, decision: Decision) -> None:
        """Record and answer what could not be read; the connection ends with it."""
        await self._desk.turn_away(decision)
        status, headers, body = render(None, decision, 421 if decision.rule == "host-mismatch" else 400)
        parser = h11.Connection(h11.SERVER)
        framing = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        parts = [
            parser.send(h11.Response(status_code=status, headers=[*headers, *framing])),
            parser.send(h11.Data(data=body)),
            parser.send(h11.EndOfMessage()),
        ]
        with contextlib.suppress(OSError, GuestGoneError):  # TimeoutError, too
            await asyncio.wait_for(self._send_last(b"".join(part for part in parts if part)), _DRAIN_S)

    async def _send_last(self, data: bytes) -> None:
        await self.stream.send(data)
        await self.stream.finish()
        # Bytes left unread would turn the close into a reset, and the guest might never see the answer.
        drained = 0
        while drained < MAX_DRAIN_BYTES and (piece := await self.inflow.take()):
            drained += len(piece)
