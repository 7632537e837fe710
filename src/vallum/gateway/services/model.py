"""The model door of a cell, over HTTP: who may ask, what is asked, and the answer on its way.

Covered: a request without the cell's capability is refused and recorded before its body is read; the capability is
compared in constant time; it opens this cell's door only, since another cell has no way to it.
Not covered: what a provider itself keeps of the words it was sent.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell, Owner
from vallum.gateway.http.exchange import (
    BodyTooLargeError,
    Carrier,
    DeniedError,
    Exchange,
    Headers,
    RequestHead,
)
from vallum.gateway.model.answer import Answer
from vallum.gateway.model.calls import Asked, ModelCalls
from vallum.gateway.model.client import is_capable, read_agent
from vallum.gateway.model.count import count_tokens, list_models
from vallum.gateway.model.dialects import DIALECTS, find_route
from vallum.gateway.model.dialects.contract import Route
from vallum.gateway.model.dialects.fields import dump
from vallum.gateway.model.plan import RefusedError
from vallum.gateway.wire import MAX_FRAME, Served, ServeRequest

MAX_BODY_BYTES = 32 * 1024 * 1024
_JSON: Headers = ((b"content-type", b"application/json"),)

_cells: weakref.WeakKeyDictionary[GatewayCell, ModelCalls] = weakref.WeakKeyDictionary()


def calls_of(cell: GatewayCell) -> ModelCalls:
    """The model calls of a cell: one for all its flows."""
    calls = _cells.get(cell)
    if calls is None:
        calls = _cells[cell] = ModelCalls(cell)
        cell.at_close.append(calls.close)
    return calls


def make_service(carrier: Carrier) -> ModelService:
    """The service for one flow."""
    return ModelService(carrier)


class ModelService:
    """See :class:`~vallum.gateway.http.exchange.Service`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._calls = calls_of(carrier.cell)

    def close(self) -> None:
        """As :meth:`Service.close`."""

    async def serve(self, exchange: Exchange) -> None:
        """As :meth:`Service.serve`."""
        head, door = exchange.head, self._carrier.cell.kit.model
        if door is None:
            raise DeniedError(Decision(verdict="deny", rule="no-model-door", reason="this cell has no model"))
        path, _, query = head.target.partition("?")
        route = find_route(head.method, path)
        if route is None:
            # No call of a model, whoever asks: clients look whether anybody is there.
            reason = f"there is no {show(head.method)} {show(path)} here"
            await _send_error(exchange, route, 404, RefusedError(404, "no-such-api", reason))
            return
        owner = await self._carrier.owner()
        if not is_capable(head.headers, query, door.capability):
            reason = "the key is not the one that this cell was given for its model"
            error = RefusedError(401, "model-capability", reason)
            asked = Asked(
                route=route, body=b"", headers=(), agent=read_agent(head.headers), owner=owner, flow=self._carrier.id
            )
            await _send_error(exchange, route, await self._calls.deny(asked, _new_id(), error), error)
            return
        if (coding := head.header(b"content-encoding")) not in (None, b"", b"identity"):
            assert coding is not None
            await _send_error(
                exchange, route, 415, RefusedError(415, "malformed", "send the body without content-encoding")
            )
            return
        try:
            body = await exchange.read_body(MAX_BODY_BYTES)
        except BodyTooLargeError:
            reason = f"the request has more than {MAX_BODY_BYTES} bytes"
            await _send_error(exchange, route, 413, RefusedError(413, "malformed", reason))
            return
        answer = await _answer(
            self._calls, self._carrier.cell, head, route, body, owner, self._carrier.id, opened=exchange.opened
        )
        exchange.tally.bytes_out = len(body)
        exchange.tally.credential = door.credential
        answer.readers += 1
        try:
            await _give(exchange, answer)
        finally:
            answer.readers -= 1
            self._calls.release(answer)


async def serve_host_request(cell: GatewayCell, frame: ServeRequest) -> Served:
    """Answer a request of a client on the host as if it had come through the cell's own model door.

    The node has let it ask, so no capability is looked for. Steps of its tool calls are opened for commands that the
    host will send into the cell.
    """
    calls = calls_of(cell)
    path = frame.target.partition("?")[0]
    route = find_route(frame.method, path)
    if route is None:
        error = DIALECTS["chat"].write_error(404, f"there is no {show(frame.method)} {show(path)} here", "no-such-api")
        return Served(seq=frame.seq, status=404, headers=_JSON, body=dump(error).encode())
    headers = tuple((name.lower(), value) for name, value in frame.headers)
    head = RequestHead(
        method=frame.method,
        scheme="http",
        host="model",
        port=80,
        target=frame.target,
        headers=headers,
        version="1.1",
    )
    answer = await _answer(calls, cell, head, route, frame.body, cell.owner, "host", on_host=True)
    answer.readers += 1
    try:
        async for _ in answer.pieces():
            pass
    finally:
        answer.readers -= 1
        calls.release(answer)
    body = answer.body()
    if answer.failure or len(body) > MAX_FRAME - 1024 * 1024:
        reason = answer.failure or "the answer is too large for a client on the host"
        error = DIALECTS[route.dialect].write_error(502, reason, "model-upstream")
        return Served(seq=frame.seq, status=502, headers=_JSON, body=dump(error).encode())
    return Served(seq=frame.seq, status=answer.status, headers=answer.headers, body=body)


async def _answer(
    calls: ModelCalls,
    cell: GatewayCell,
    head: RequestHead,
    route: Route,
    body: bytes,
    owner: Owner,
    flow: str,
    *,
    on_host: bool = False,
    opened: asyncio.Future[None] | None = None,
) -> Answer:
    query = head.target.partition("?")[2]
    asked = Asked(
        route=route,
        body=body,
        headers=head.headers,
        agent=read_agent(head.headers),
        owner=owner,
        flow=flow,
        wants_events=route.dialect != "gemini" or not route.stream or "alt=sse" in query.split("&"),
        on_host=on_host,
        opened=opened,
    )
    if route.operation == "generate":
        return await calls.ask(asked)
    answer = Answer(_new_id())
    try:
        if route.operation == "count":
            status, raw = await count_tokens(cell.kit, calls, asked)
        else:
            status, raw = list_models(cell.kit, route)
        answer.begin(status, _JSON, is_stream=False)
        answer.write(dump(raw).encode())
    except RefusedError as error:
        status = await calls.deny(asked, answer.call, error)
        answer.begin(status, _JSON, is_stream=False)
        answer.write(dump(DIALECTS[route.dialect].write_error(status, error.reason, error.rule)).encode())
    answer.end()
    return answer


async def _give(exchange: Exchange, answer: Answer) -> None:
    await answer.begun()
    if not answer.has_begun:
        await exchange.abort(answer.failure)
        return
    # What is not streamed is written in one go with its head.
    await _opened(exchange)
    if answer.is_over and not answer.failure and not answer.is_stream:
        await exchange.answer(answer.status, answer.headers, answer.body())
        return
    await exchange.start(answer.status, answer.headers, length=None if answer.is_stream else answer.size)
    async for piece in answer.pieces():
        await exchange.send(piece)
    if answer.failure:
        await exchange.abort(answer.failure)
    else:
        await exchange.end()


async def _send_error(exchange: Exchange, route: Route | None, status: int, error: RefusedError) -> None:
    dialect = DIALECTS[route.dialect if route is not None else "chat"]
    body = dump(dialect.write_error(status, error.reason, error.rule)).encode()
    headers = (*_JSON, (b"x-vallum-rule", error.rule.encode()), (b"x-should-retry", b"false"))
    await _opened(exchange)
    await exchange.answer(status, headers, body)


async def _opened(exchange: Exchange) -> None:
    """Wait for the record of the request. Raises NodeGoneError."""
    if exchange.opened is not None:
        await asyncio.shield(exchange.opened)


def _new_id() -> str:
    return f"m{secrets.token_hex(6)}"
