"""HTTP/2 towards a guest: every stream becomes an exchange, many at once, over one connection.

Frames, header compression and the states of streams are h2's; what a stream may hold in memory is bounded by its
window, which only grows when a service has taken the bytes.

Covered: rapid reset, floods of SETTINGS, PING, PRIORITY, WINDOW_UPDATE and empty frames (each costs; who spends more
than requests and data earn is disconnected), CONTINUATION without end, heads that inflate, windows that never open.
Not covered: server push and extended CONNECT (RFC 8441); neither is offered. Trailers are dropped.

Source: RFC 9113, RFC 7541.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator
from typing import ClassVar

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings

from vallum.core.verdict import Decision
from vallum.gateway.http.exchange import (
    MAX_HEAD_BYTES,
    Carrier,
    Desk,
    GuestGoneError,
    Headers,
    MalformedFlowError,
    NoUpgradeError,
    RequestHead,
    Tally,
    collect_body,
)
from vallum.gateway.http.head import MalformedError, MisdirectedError, Place, read_request2
from vallum.gateway.http.refusal import render
from vallum.gateway.http.server1 import BODY_IDLE_S, IDLE_S, SEND_STALL_S
from vallum.gateway.stream import PIECE, Stream

MAX_STREAMS = 100
MAX_TASKS = 200
"""Streams that are being answered, or were reset and are being wound down."""
STREAM_WINDOW = 64 * 1024
CONNECTION_WINDOW = 1024 * 1024
SERVER_STALL_S = 300.0

log = logging.getLogger(__name__)


class Allowance:
    """What frames that cost us more than their sender may come to. Pure.

    Requests and data earn, everything else costs; it begins with enough for any client that means well.
    """

    START = 2000
    COSTS: ClassVar[dict[type[h2.events.Event], int]] = {
        h2.events.StreamReset: 20,
        h2.events.RemoteSettingsChanged: 20,
        h2.events.PingReceived: 10,
        h2.events.PriorityUpdated: 5,
        h2.events.WindowUpdated: 1,
    }
    EARNS_REQUEST = 10
    EARNS_DATA = 4

    def __init__(self) -> None:
        self.left = self.START

    def charge(self, event: h2.events.Event) -> bool:
        """Whether the connection may go on after this event."""
        if isinstance(event, h2.events.RequestReceived):
            self.earn(self.EARNS_REQUEST)
        elif isinstance(event, h2.events.DataReceived):
            if event.data:
                self.earn(self.EARNS_DATA)
            else:
                self.left -= 10
        else:
            self.left -= self.COSTS.get(type(event), 1)
        return self.left > 0

    def earn(self, points: int) -> None:
        """Something of use was done."""
        self.left = min(self.START, self.left + points)


class Exchange2:
    """See :class:`~vallum.gateway.http.exchange.Exchange`."""

    def __init__(self, server: Server2, stream_id: int, head: RequestHead, *, is_complete: bool) -> None:
        self.id = secrets.token_hex(6)
        self.head = head
        self.carrier = server.carrier
        self.decision = Decision(verdict="deny", rule="internal-error", reason="it was not judged")
        self.tally = Tally()
        self.opened: asyncio.Future[None] | None = None
        self.stream_id = stream_id
        self.gone = asyncio.Event()
        """Set when the guest reset the stream, or its connection ended."""
        self.window = asyncio.Event()
        """Set when the guest may have made room for more of the answer."""
        self._server = server
        self._pieces: deque[tuple[bytes, int]] = deque()
        self._came = asyncio.Event()
        self._is_complete = is_complete
        self._started = False
        self._ended = False

    def feed(self, data: bytes, size: int) -> None:
        """A piece of the body came; ``size`` is what it takes of the window."""
        self._pieces.append((data, size))
        self._came.set()

    def complete(self) -> None:
        """The body is complete."""
        self._is_complete = True
        self._came.set()

    def lose(self) -> None:
        """The guest has gone."""
        self.gone.set()
        self._came.set()
        self.window.set()

    async def body(self) -> AsyncIterator[bytes]:
        """As :meth:`Exchange.body`."""
        while True:
            if self.gone.is_set():
                raise GuestGoneError("the guest reset the stream")
            if self._pieces:
                data, size = self._pieces.popleft()
                if data:
                    yield data
                await self._server.acknowledge(self.stream_id, size)
                continue
            if self._is_complete:
                return
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), BODY_IDLE_S)
            except TimeoutError:
                raise GuestGoneError(f"nothing of the body came for {BODY_IDLE_S:g} s") from None

    async def read_body(self, limit: int) -> bytes:
        """As :meth:`Exchange.read_body`."""
        return await collect_body(self, limit)

    async def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """As :meth:`Exchange.start`."""
        framing: Headers = () if length is None else ((b"content-length", b"%d" % length),)
        self._started = True
        self.tally.status = status
        await self._server.send_head(self, ((b":status", b"%d" % status), *headers, *framing))

    async def send(self, data: bytes) -> None:
        """As :meth:`Exchange.send`."""
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            await self._server.send_data(self, piece)
            self.tally.bytes_in += len(piece)

    async def end(self) -> None:
        """As :meth:`Exchange.end`."""
        self._ended = True
        await self._server.end_stream(self, is_body_complete=self._is_complete)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """As :meth:`Exchange.answer`."""
        await self.start(status, headers, length=len(body))
        if self.head.method != "HEAD":
            await self.send(body)
        await self.end()

    async def switch(self, headers: Headers) -> Stream:
        """As :meth:`Exchange.switch`."""
        raise NoUpgradeError("HTTP/2 has no upgrade; ask with HTTP/1.1")

    async def left(self) -> None:
        """As :meth:`Exchange.left`."""
        await self.gone.wait()

    async def abort(self, reason: str) -> None:
        """As :meth:`Exchange.abort`."""
        if not self._ended:
            self._ended = True
            await self._server.reset(self)

    async def refuse(self, decision: Decision, status: int = 403) -> None:
        """As :meth:`Exchange.refuse`."""
        if self._started:
            await self.abort(decision.reason)
            return
        status, headers, body = render(self.head, decision, status)
        await self.answer(status, headers, body)

    def drop_rest(self) -> int:
        """Forget what was not read of the body: how much of the connection's window it takes."""
        size = sum(size for _, size in self._pieces)
        self._pieces.clear()
        return size


class Server2:
    """Serves one connection."""

    def __init__(self, stream: Stream, carrier: Carrier, place: Place, desk: Desk) -> None:
        self.carrier = carrier
        self._stream = stream
        self._place = place
        self._desk = desk
        self._conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self._conn.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
            },
        )
        self._exchanges: dict[int, Exchange2] = {}
        self._tasks: dict[asyncio.Task[None], Exchange2] = {}
        self._unsent = asyncio.Event()
        self._sent = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._allowance = Allowance()

    async def serve(self) -> None:
        """Until the guest or the protocol ends it.

        Raises:
            MalformedFlowError: what came can no longer be read, or is a flood. The guest was told.
            OSError: the connection broke.
        """
        self._conn.initiate_connection()
        self._conn.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._writer = asyncio.create_task(self._write())
        try:
            await self._flush()
            while data := await self._receive(self._writer):
                try:
                    events = self._conn.receive_data(data)
                except h2.exceptions.ProtocolError as error:
                    await self._flush()
                    raise MalformedFlowError(f"this is not HTTP/2 ({error})") from error
                for event in events:
                    await self._take(event)
                await self._flush()
        except GuestGoneError:
            if self._writer.done():
                self._writer.result()  # why, as documented
        finally:
            await self._end()

    async def _receive(self, writer: asyncio.Task[None]) -> bytes:
        """Some bytes of the guest; empty when it ended or has been idle for long. Raises OSError, also of the writer."""
        reading = asyncio.ensure_future(self._stream.recv())
        try:
            while not reading.done():
                await asyncio.wait({reading, writer}, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if writer.done():
                    writer.result()
                if not reading.done() and not self._tasks:
                    return b""
            return reading.result()
        finally:
            reading.cancel()

    async def _end(self) -> None:
        for exchange in self._exchanges.values():
            exchange.lose()
        ending = [*self._tasks]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        if self._writer is not None:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await self._writer

    async def _take(self, event: h2.events.Event) -> None:
        if not self._allowance.charge(event) or len(self._tasks) > MAX_TASKS:
            self._conn.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            await self._flush()
            raise MalformedFlowError("a flood of frames that ask for nothing (HTTP/2)")
        if isinstance(event, h2.events.RequestReceived):
            await self._open(event)
        elif isinstance(event, h2.events.DataReceived):
            exchange = self._exchanges.get(event.stream_id or 0)
            size = event.flow_controlled_length or 0
            if exchange is not None:
                exchange.feed(bytes(event.data or b""), size)
            else:
                await self.acknowledge(event.stream_id or 0, size)
        elif isinstance(event, h2.events.StreamEnded):
            if (exchange := self._exchanges.get(event.stream_id or 0)) is not None:
                exchange.complete()
        elif isinstance(event, h2.events.StreamReset):
            self._lose(event.stream_id or 0)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            for exchange in self._exchanges.values():
                exchange.window.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            for exchange in self._exchanges.values():
                exchange.lose()

    async def _open(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id or 0
        is_complete = event.stream_ended is not None
        try:
            head = read_request2(event.headers or (), self._place, has_body=not is_complete)
        except (MalformedError, MisdirectedError) as error:
            rule = "host-mismatch" if isinstance(error, MisdirectedError) else "malformed"
            await self._turn_away(stream_id, Decision(verdict="deny", rule=rule, reason=str(error)))
            return
        exchange = Exchange2(self, stream_id, head, is_complete=is_complete)
        self._exchanges[stream_id] = exchange
        task = asyncio.create_task(self._answer(exchange))
        self._tasks[task] = exchange
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        exchange = self._tasks.pop(task)
        self._exchanges.pop(exchange.stream_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("answering a stream failed", exc_info=error)

    async def _answer(self, exchange: Exchange2) -> None:
        try:
            await self._desk.answer(exchange)
        except (GuestGoneError, OSError):
            return
        finally:
            rest = exchange.drop_rest()
            if rest and not exchange.gone.is_set():
                await self.acknowledge(exchange.stream_id, rest)

    def _lose(self, stream_id: int) -> None:
        exchange = self._exchanges.pop(stream_id, None)
        if exchange is None:
            return
        exchange.lose()
        for task, answered in self._tasks.items():
            if answered is exchange:
                task.cancel()

    async def _turn_away(self, stream_id: int, decision: Decision) -> None:
        await self._desk.turn_away(decision)
        status, headers, body = render(None, decision, 421 if decision.rule == "host-mismatch" else 400)
        fields = ((b":status", b"%d" % status), *headers, (b"content-length", b"%d" % len(body)))
        try:
            self._conn.send_headers(stream_id, fields)
            if self._conn.local_flow_control_window(stream_id) >= len(body):
                self._conn.send_data(stream_id, body, end_stream=True)
            else:
                self._conn.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
        except h2.exceptions.ProtocolError:
            return  # it was reset in the same breath
        await self._flush()

    # -- what exchanges send -----------------------------------------------------------------------------

    async def send_head(self, exchange: Exchange2, fields: Headers) -> None:
        """Raises GuestGoneError when the stream has ended, OSError when the connection broke."""
        try:
            self._conn.send_headers(exchange.stream_id, fields)
        except h2.exceptions.ProtocolError as error:
            raise GuestGoneError(f"the stream has ended ({error})") from error
        await self._flush()

    async def send_data(self, exchange: Exchange2, data: bytes) -> None:
        """As :meth:`send_head`; waits while the guest makes no room."""
        at = 0
        while at < len(data):
            if exchange.gone.is_set():
                raise GuestGoneError("the guest reset the stream")
            exchange.window.clear()
            try:
                while at < len(data) and (room := self._conn.local_flow_control_window(exchange.stream_id)) > 0:
                    size = min(room, self._conn.max_outbound_frame_size, len(data) - at)
                    self._conn.send_data(exchange.stream_id, data[at : at + size])
                    at += size
                    self._allowance.earn(2)
            except h2.exceptions.ProtocolError as error:
                raise GuestGoneError(f"the stream has ended ({error})") from error
            await self._flush()
            if at < len(data):
                await asyncio.wait_for(exchange.window.wait(), SEND_STALL_S)

    async def end_stream(self, exchange: Exchange2, *, is_body_complete: bool) -> None:
        """The answer is complete. What of the body has not come by now is not wanted (RFC 9113, section 8.1)."""
        try:
            self._conn.end_stream(exchange.stream_id)
            if not is_body_complete:
                self._conn.reset_stream(exchange.stream_id, ErrorCodes.NO_ERROR)
        except h2.exceptions.ProtocolError as error:
            raise GuestGoneError(f"the stream has ended ({error})") from error
        await self._flush()

    async def reset(self, exchange: Exchange2) -> None:
        """Cut a stream off."""
        try:
            self._conn.reset_stream(exchange.stream_id, ErrorCodes.INTERNAL_ERROR)
        except h2.exceptions.ProtocolError:
            return  # it has ended already
        await self._flush()

    async def acknowledge(self, stream_id: int, size: int) -> None:
        """Open the window again by what was taken."""
        if size:
            try:
                self._conn.acknowledge_received_data(size, stream_id)
            except h2.exceptions.ProtocolError:
                return  # the stream, or the connection, has ended
            await self._flush()

    async def _flush(self) -> None:
        """Return when all that h2 has to say is on its way. Cancelling it loses nothing."""
        if self._writer is None or self._writer.done():
            raise GuestGoneError("the guest's connection broke")
        self._sent.clear()
        self._unsent.set()
        await self._sent.wait()

    async def _write(self) -> None:
        """Send what h2 has to say. The only one who writes: a piece cut off in the middle would end the connection."""
        try:
            while True:
                await self._unsent.wait()
                self._unsent.clear()
                while data := self._conn.data_to_send():
                    async with asyncio.timeout(SEND_STALL_S):
                        await self._stream.send(data)
                self._sent.set()
        finally:
            for exchange in self._exchanges.values():
                exchange.lose()
            self._sent.set()
