"""One reply from the upstream, whichever it is; its words go to the agent while they come, if they may."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from vallum.core.clock import mono_ns
from vallum.core.messages import Reply
from vallum.gateway.http.client1 import UpstreamError
from vallum.gateway.http.exchange import Headers
from vallum.gateway.model.answer import Answer
from vallum.gateway.model.dialects.contract import DialectError, Json
from vallum.gateway.model.dialects.fields import dump, parse_object
from vallum.gateway.model.plan import Plan
from vallum.gateway.model.relay import PassThrough, Relay, Translation, name_calls, write_whole
from vallum.gateway.model.sse import SseError, SseReader
from vallum.gateway.model.upstreams.http import HttpAnswer, HttpServer
from vallum.gateway.model.upstreams.told import UpstreamRefusedError
from vallum.gateway.tls.termination import HandshakeError

MAX_REPLY_BYTES = 32 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
LAST_S = 0.1
_EVENTS: Headers = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_JSON: Headers = ((b"content-type", b"application/json"),)


class Fetched:
    """A reply that waits to be passed on."""

    def __init__(self, reply: Reply, deliver: Callable[[Answer], None]) -> None:
        self.reply = reply
        self.deliver = deliver
        """Gives the agent what it does not have yet, and ends the answer."""


async def fetch(plan: Plan, agent: str, answer: Answer) -> Fetched:
    """Ask the upstream once.

    Raises:
        RefusedError: what was to be sent must not be.
        UpstreamRefusedError: the upstream gave an error.
        DialectError, OSError: its answer cannot be used.
    """
    if isinstance(plan.upstream, HttpServer):
        return await _ask(plan, plan.upstream, answer)
    began_ns = mono_ns()
    try:
        reply = await plan.upstream.tell(plan.request, agent=agent)
    finally:
        plan.outside_ns += mono_ns() - began_ns
    return _whole(plan, name_calls(reply, plan.call, plan.model))


async def _ask(plan: Plan, server: HttpServer, answer: Answer) -> Fetched:
    target, headers, body = plan.target(), plan.all_headers(), plan.body()
    began_ns = mono_ns()
    try:
        got = await server.ask("POST", target, headers, body)
    except HandshakeError as error:
        raise UpstreamError(error.decision.reason) from error
    finally:
        plan.outside_ns += mono_ns() - began_ns
    try:
        if got.status != 200:
            raise await _read_error(got)
        plan.is_answering, plan.received_bytes = True, 0
        if not got.header(b"content-type").startswith(b"text/event-stream"):
            return await _read_whole(plan, got)
        if not plan.request.stream:
            raise DialectError("the upstream streams although it was not asked to")
        return await _read_stream(plan, got, answer)
    finally:
        got.close()


async def _read_error(got: HttpAnswer) -> UpstreamRefusedError:
    try:
        words = (await got.read(MAX_ERROR_BYTES)).decode("utf-8", "replace")
    except OSError:
        words = ""
    status = got.status if 400 <= got.status < 600 else 502
    return UpstreamRefusedError(
        status, f"the upstream answered {got.status}: {words}", got.header(b"retry-after").decode("latin-1")
    )


async def _read_whole(plan: Plan, got: HttpAnswer) -> Fetched:
    began_ns = mono_ns()
    try:
        body = await got.read(MAX_REPLY_BYTES)
        plan.received_bytes = len(body)
    finally:
        plan.outside_ns += mono_ns() - began_ns
    raw = parse_object(body, "the upstream's answer")
    reply = name_calls(plan.spoken.parse_reply(raw), plan.call, plan.model)
    if plan.request.stream or plan.spoken is not plan.dialect:
        return _whole(plan, reply)
    return Fetched(reply, lambda answer: _deliver_json(plan, raw, answer))


def _whole(plan: Plan, reply: Reply) -> Fetched:
    def deliver(answer: Answer) -> None:
        if not plan.request.stream:
            _deliver_json(plan, plan.dialect.write_reply(reply), answer)
            return
        if not answer.has_begun:
            answer.begin(200, (*_EVENTS, *answer.headers), is_stream=True)
        answer.write(write_whole(plan.dialect.make_writer(reply.id, reply.model), reply))
        answer.end()

    return Fetched(reply, deliver)


def _deliver_json(plan: Plan, raw: Json, answer: Answer) -> None:
    answer.begin(200, (*_JSON, *answer.headers), is_stream=False)
    answer.write(dump(raw if plan.wants_events else [raw]).encode())
    answer.end()


async def _read_stream(plan: Plan, got: HttpAnswer, answer: Answer) -> Fetched:
    assembler = plan.spoken.make_assembler(wants_usage=plan.wants_usage)
    relay: Relay
    if plan.spoken is plan.dialect:
        relay = PassThrough(assembler, hold_all=plan.holds_all)
    else:
        writer = plan.dialect.make_writer(plan.call, plan.model)
        relay = Translation(assembler, writer, hold_all=plan.holds_all)
    if not answer.has_begun:
        answer.begin(200, (*_EVENTS, (b"x-vallum-call", plan.call.encode())), is_stream=True)
    reader, pieces = SseReader(), got.pieces()
    try:
        async for piece in _timed(plan, pieces):
            plan.received_bytes += len(piece)
            if plan.received_bytes > MAX_REPLY_BYTES:
                raise UpstreamError(f"the upstream's answer has more than {MAX_REPLY_BYTES} bytes")
            for event in reader.feed(piece):
                answer.write(relay.feed(event))
            if relay.is_over:
                break
        reader.end()
        await _finish(pieces)
    except SseError as error:
        raise DialectError(f"the upstream's stream is broken: {error}") from error
    reply = name_calls(relay.finish(), plan.call, plan.model)

    def deliver(answer: Answer) -> None:
        answer.write(relay.tail(reply))
        answer.end()

    return Fetched(reply, deliver)


async def _finish(pieces: AsyncIterator[bytes]) -> None:
    """Wait a moment for the end of a stream whose last event has come: then the connection can be used again."""
    with contextlib.suppress(OSError, StopAsyncIteration):
        async with asyncio.timeout(LAST_S):
            await anext(pieces)


async def _timed(plan: Plan, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces; the time that each was waited for is not the gateway's own."""
    while True:
        began_ns = mono_ns()
        try:
            piece = await anext(pieces)
        except StopAsyncIteration:
            return
        finally:
            plan.outside_ns += mono_ns() - began_ns
        yield piece
