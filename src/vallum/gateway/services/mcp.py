"""Servers of the Model Context Protocol behind the door, over streamable HTTP: each message judged before it leaves.

Covered: a call of a tool that is not granted does not leave, and the agent is told by a JSON-RPC error; lists come back
with what is granted only; a server can ask the guest for nothing; a session is used by the cell that it was given to,
and by no other; a tool that is defined otherwise than at first is told in the record; canaries and credentials as in
any request (:mod:`vallum.gateway.services.forward`). What cannot be read is not sent.
Not covered: what a granted tool does with its arguments; text of a server that tries to steer the agent.
Source: MCP 2025-06-18, "Transports"; the older transport of two endpoints (HTTP+SSE) is refused.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell, Owner
from vallum.gateway.http.client1 import UpstreamError
from vallum.gateway.http.exchange import (
    BodyTooLargeError,
    Carrier,
    DeniedError,
    Exchange,
    Headers,
    NoUpgradeError,
    RequestHead,
    Tally,
)
from vallum.gateway.http.judging import read_request
from vallum.gateway.mcp.answers import Definitions, Passed, filter_message
from vallum.gateway.mcp.calls import CallRecord
from vallum.gateway.mcp.judging import Asked, RefusedMessageError, read_asked, strip_offers
from vallum.gateway.mcp.messages import (
    MAX_MESSAGE_BYTES,
    Message,
    MessageError,
    parse_message,
    write_denial,
    write_error,
    write_message,
)
from vallum.gateway.model.sse import SseError, SseEvent, SseReader, write_event
from vallum.gateway.services.forward import Forward
from vallum.gateway.stream import Stream
from vallum.rules.verdicts import judge_tool

MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_SESSIONS = 256
"""Of one cell; the one that was not used for the longest time is forgotten."""
JSON: Headers = ((b"content-type", b"application/json"),)
_DROPPED = frozenset(
    {
        b"content-type", b"content-length", b"accept-encoding", b"x-http-method-override", b"x-http-method",
        b"x-method-override",
    }
)  # fmt: skip
_SESSION = b"mcp-session-id"


@dataclass
class _Book:
    """What is remembered of the servers of one cell."""

    sessions: OrderedDict[tuple[str, int, bytes], None] = field(default_factory=OrderedDict)
    definitions: dict[tuple[str, int, str], Definitions] = field(default_factory=dict)


_books: weakref.WeakKeyDictionary[GatewayCell, _Book] = weakref.WeakKeyDictionary()


def make_service(carrier: Carrier) -> McpService:
    """The service for one flow."""
    return McpService(carrier)


class McpService:
    """See :class:`~vallum.gateway.http.exchange.Service`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._forward = Forward(carrier)
        self._book = _books.setdefault(carrier.cell, _Book())
        self._owner: Owner | None = None

    def close(self) -> None:
        """As :meth:`Service.close`."""
        self._forward.close()

    async def serve(self, exchange: Exchange) -> None:
        """As :meth:`Service.serve`."""
        head = exchange.head
        rule = self._carrier.cell.rules.find(exchange.decision.rule)
        if head.method != "POST" and (rule is None or rule.tools is None):
            # Only a denial of tools brought it here, and no tool can be called so.
            await self._forward.serve(exchange)
            return
        self._owner = await self._carrier.owner()
        if not self._is_session_ours(head):
            reason = "the session of this request was not given to this cell"
            raise DeniedError(Decision(verdict="deny", rule="mcp-session", reason=reason))
        if head.method == "POST":
            await self._serve_message(exchange)
        elif head.method in {"GET", "DELETE"} and not (head.streamed or head.length):
            await self._forward.serve(_Relayed(self, exchange, b"", None, None))
        else:
            raise _deny("malformed", f"{head.method} with a body is no request of MCP's streamable HTTP")

    async def _serve_message(self, exchange: Exchange) -> None:
        head = exchange.head
        kind = (head.header(b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json" or (head.header(b"content-encoding") or b"identity") != b"identity":
            raise _deny("malformed", "a message of MCP is application/json without a content-encoding")
        try:
            message = parse_message(await exchange.read_body(MAX_MESSAGE_BYTES))
            body = write_message(strip_offers(message))
        except (MessageError, BodyTooLargeError) as error:
            number = None
            failed = error if isinstance(error, MessageError) else MessageError(str(error))
            await self._tell_malformed(exchange, failed)
            await answer(exchange, 400, write_error(number, failed))
            return
        try:
            asked = read_asked(message)
        except RefusedMessageError as error:
            method = show(str(message.get("method", "")), 80)
            params = message.get("params", {})
            lost = Asked("request", message.get("id"), method, show(str(params.get("name", ""))), params)
            await self._deny(exchange, CallRecord(exchange, head.host, lost), error.decision)
            return
        record = CallRecord(exchange, head.host, asked) if asked.kind == "request" and asked.method != "ping" else None
        if asked.subject:
            assert record is not None
            decision = await self._settle(record, exchange, asked.subject)
            if decision.verdict == "deny":
                await self._deny(exchange, record, decision)
                return
            exchange.decision = decision
        if record is not None and asked.subject in self.definitions(head).changed:
            record.changed = [asked.subject]
        try:
            await self._forward.serve(_Relayed(self, exchange, body, asked, record))
        except DeniedError as error:
            if record is not None:
                await record.write(error.decision)
                record = None
            raise
        finally:
            if record is not None:
                await record.write(exchange.decision)

    async def _settle(self, record: CallRecord, exchange: Exchange, subject: str) -> Decision:
        """The verdict on a call, a person asked where it is held; approved is what was asked, not what is denied by now."""
        first = self.judge(exchange, subject)
        decision = await record.settle(first)
        if first.verdict != "hold" or decision.verdict != "allow":
            return decision
        again = self.judge(exchange, subject)
        if again.verdict == "allow" or (again.verdict == "hold" and again.rule == first.rule):
            return decision
        return Decision(verdict="deny", rule=again.rule, reason=again.reason)

    def judge(self, exchange: Exchange, subject: str) -> Decision:
        """The verdict on a tool, resource or prompt by the rules as they are now."""
        cell, facts = self._carrier.cell, self._carrier.facts
        _, request = read_request(exchange.head)
        return judge_tool(cell.rules, facts, request, subject, cell.asker(self._owner))

    def definitions(self, head: RequestHead) -> Definitions:
        """What is known of the tools of the server."""
        key = (head.host, head.port, head.path)
        if len(self._book.definitions) >= MAX_SESSIONS and key not in self._book.definitions:
            return Definitions()
        return self._book.definitions.setdefault(key, Definitions())

    def learn_session(self, head: RequestHead, headers: Headers) -> None:
        """The server has given the cell a session."""
        for name, value in headers:
            if name == _SESSION:
                self._book.sessions[head.host, head.port, value] = None
                if len(self._book.sessions) > MAX_SESSIONS:
                    self._book.sessions.popitem(last=False)

    def _is_session_ours(self, head: RequestHead) -> bool:
        named = [value for name, value in head.headers if name == _SESSION]
        if not named:
            return True
        key = (head.host, head.port, named[0])
        if len(named) > 1 or key not in self._book.sessions:
            return False
        self._book.sessions.move_to_end(key)
        return True

    async def _tell_malformed(self, exchange: Exchange, error: MessageError) -> None:
        asked = Asked("request", None, "", "", {})
        decision = Decision(verdict="deny", rule="malformed", reason=str(error))
        await CallRecord(exchange, exchange.head.host, asked).write(decision)

    async def _deny(self, exchange: Exchange, record: CallRecord, decision: Decision) -> None:
        """Record, then tell the agent in a form that its client hands on."""
        await record.write(Decision(verdict="deny", rule=decision.rule, reason=decision.reason))
        if record.asked.id is None:
            await exchange.refuse(decision)
        else:
            await answer(exchange, 200, write_denial(record.asked.id, decision))


def _deny(rule: str, reason: str) -> DeniedError:
    return DeniedError(Decision(verdict="deny", rule=rule, reason=reason))


async def answer(exchange: Exchange, status: int, body: bytes) -> None:
    """Answer with JSON of our own."""
    await exchange.start(status, JSON, length=len(body))
    await exchange.send(body)
    await exchange.end()


class _Relayed:
    """The exchange as :class:`Forward` sees it: the body is what was judged, and the answer is filtered on its way back."""

    def __init__(
        self, service: McpService, outer: Exchange, body: bytes, asked: Asked | None, record: CallRecord | None
    ) -> None:
        self._service = service
        self._outer = outer
        self._body = body
        self._asked = asked
        self._record = record
        self._definitions = service.definitions(outer.head)
        self._mode: Literal["plain", "json", "events"] = "plain"
        self._status = 200
        self._headers: Headers = ()
        self._kept = bytearray()
        self._reader = SseReader(MAX_ANSWER_BYTES)
        self.id = outer.id
        self.carrier = outer.carrier
        self.decision = outer.decision
        self.tally: Tally = outer.tally
        self.opened = outer.opened
        own = (*JSON,) if body else ()
        headers = tuple(pair for pair in outer.head.headers if pair[0] not in _DROPPED)
        self.head = msgspec.structs.replace(
            outer.head,
            headers=(*headers, *own, (b"accept-encoding", b"identity")),
            length=len(body) if body else None,
            streamed=False,
            upgrade="",
        )

    async def body(self) -> AsyncIterator[bytes]:
        """As :meth:`Exchange.body`."""
        if self._body:
            yield self._body

    async def read_body(self, limit: int) -> bytes:
        """As :meth:`Exchange.read_body`."""
        if len(self._body) > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes")
        return self._body

    async def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """As :meth:`Exchange.start`."""
        found = dict(headers)
        if found.get(b"content-encoding", b"identity") != b"identity":
            raise UpstreamError("the server compressed its answer although it was asked not to")
        kind = found.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self._status, self._headers = status, headers
        self._service.learn_session(self.head, headers)
        is_content = self.head.method != "DELETE" and status not in {202, 204, 304} and length != 0
        if is_content and kind == b"application/json":
            self._mode = "json"
        elif is_content and kind == b"text/event-stream" and status == 200:
            self._mode = "events"
            await self._outer.start(status, self._without_length(), length=None)
        elif is_content and status < 400:
            raise UpstreamError(
                f"the server answers with {show(kind.decode('latin-1'))}, which is not MCP's streamable HTTP"
            )
        else:
            await self._outer.start(status, headers, length=length)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """As :meth:`Exchange.answer`."""
        await self.start(status, headers, length=len(body))
        await self.send(body)
        await self.end()

    async def send(self, data: bytes) -> None:
        """As :meth:`Exchange.send`."""
        if self._mode == "plain":
            await self._outer.send(data)
        elif self._mode == "json":
            self._kept += data
            if len(self._kept) > MAX_ANSWER_BYTES:
                raise UpstreamError(f"the server's answer has more than {MAX_ANSWER_BYTES} bytes")
        elif data:
            try:
                events = self._reader.feed(data)
            except SseError as error:
                raise UpstreamError(f"the server's answer is malformed: {error}") from error
            for event in events:
                await self._send_event(event)

    async def end(self) -> None:
        """As :meth:`Exchange.end`."""
        if self._mode == "json":
            data = self._filter_json()
            await self._outer.start(self._status, self._without_length(), length=len(data))
            await self._outer.send(data)
        await self._outer.end()

    async def switch(self, headers: Headers) -> Stream:
        """As :meth:`Exchange.switch`."""
        raise NoUpgradeError("MCP's streamable HTTP has no upgrade")

    async def left(self) -> None:
        """As :meth:`Exchange.left`."""
        await self._outer.left()

    async def abort(self, reason: str) -> None:
        """As :meth:`Exchange.abort`."""
        await self._outer.abort(reason)

    async def refuse(self, decision: Decision, status: int = 403) -> None:
        """As :meth:`Exchange.refuse`."""
        await self._outer.refuse(decision, status)

    def _without_length(self) -> Headers:
        return tuple(pair for pair in self._headers if pair[0] != b"content-length")

    def _filter_json(self) -> bytes:
        data = bytes(self._kept)
        try:
            passed = self._filter(parse_message(data))
        except MessageError as error:
            if self._status >= 400:
                return data  # an error of its own form, which is no list and no result
            raise UpstreamError(f"the server's answer is no message of MCP: {error}") from error
        if passed is None:
            raise UpstreamError("the server answers with a question, which this client does not take")
        return passed

    async def _send_event(self, event: SseEvent) -> None:
        if event.name == "endpoint":
            decision = Decision(
                verdict="deny", rule="mcp-transport",
                reason="the server speaks MCP's older transport (HTTP+SSE of 2024-11-05): use its streamable HTTP endpoint",
            )  # fmt: skip
            await self._outer.send(write_event(write_denial(None, decision), "message"))
            raise DeniedError(decision)
        prefix = f"id: {event.id}\n".encode() if event.id else b""
        if not event.data:
            await self._outer.send(prefix + b"data:\n\n" if prefix else b"")
            return
        try:
            passed = self._filter(parse_message(event.data.encode()))
        except MessageError as error:
            raise UpstreamError(f"the server's answer is no message of MCP: {error}") from error
        if passed is not None:
            await self._outer.send(prefix + write_event(passed, event.name))

    def _filter(self, message: Message) -> bytes | None:
        asked = self._asked
        is_answer = asked is not None and "method" not in message and message.get("id") == asked.id
        method = asked.method if is_answer and asked is not None else None
        passed = filter_message(message, method, self._admits, self._definitions)
        if passed.message is None:
            return None
        data = write_message(passed.message)
        self._note(message if is_answer else None, passed, len(data))
        return data

    def _note(self, response: Message | None, passed: Passed, size: int) -> None:
        record = self._record
        if record is None or response is None:
            return
        result = response.get("result")
        record.result_bytes = size
        record.is_error = "error" in response or (isinstance(result, dict) and result.get("isError") is True)
        record.hidden = passed.hidden
        record.changed = record.changed or passed.changed

    def _admits(self, subject: str) -> bool:
        return self._service.judge(self._outer, subject).verdict != "deny"
