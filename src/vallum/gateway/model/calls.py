"""The model calls of one cell: judged, recorded, answered. The shell around the pure parts of this package.

Order, which nothing may change: clean and judge the request; record it; call the upstream; open a step for each tool
call of the reply and wait until that is acknowledged; record the reply; only then let its tool calls and its end go.

Covered: a failure of node, upstream or parser lets no tool call through; retries make one call; a cell that goes on
asking after refusals is frozen before it is told to stop. Not covered: what a provider does with words it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import hashlib
import logging
import secrets
from collections import OrderedDict
from typing import Any

import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import InvalidInput
from vallum.core.events import ModelCall
from vallum.core.messages import Message, Part, Reply, Text, ToolResult, encode
from vallum.core.text import show
from vallum.core.verdict import Verdict
from vallum.gateway.cell import GatewayCell, NodeGoneError, Owner
from vallum.gateway.http.exchange import Headers
from vallum.gateway.kit import ModelDoor
from vallum.gateway.model.answer import Answer, KeptAnswers
from vallum.gateway.model.branches import Branches
from vallum.gateway.model.budget import Spend
from vallum.gateway.model.dialects import DIALECTS
from vallum.gateway.model.dialects.contract import DialectError, Json, Route
from vallum.gateway.model.dialects.fields import dump
from vallum.gateway.model.dialects.responses import items_of, output_items
from vallum.gateway.model.fetch import Fetched, fetch
from vallum.gateway.model.outcome import MAX_RECORD_CHARS, add_usage, explain, fail, told
from vallum.gateway.model.plan import Plan, RefusedError, make_plan
from vallum.gateway.model.relay import rejection
from vallum.gateway.model.upstreams.http import HttpServer
from vallum.gateway.model.upstreams.replay import Replay, digest_request
from vallum.gateway.model.upstreams.scripted import Scripted
from vallum.gateway.model.upstreams.told import Teller, UpstreamRefusedError
from vallum.gateway.wire import ProposedCall

MAX_CALLS = 256
"""Calls of one cell at once."""
MAX_KEPT_BYTES = 16 * 1024 * 1024
"""Answers and conversations of one cell kept for retries and ``previous_response_id``."""
_ITEM_BYTES = 16
MAX_REGENERATIONS = 3
MAX_REFUSALS = 12
"""So many refused calls in a row, and the agent is stopped."""
ABANDONED_S = 10.0
"""How long a call goes on when nobody waits for it: a retry may come."""
MAX_OPEN_STEPS = 192
"""Steps of one cell that wait for their branch to go on; beyond it the oldest are closed."""
ALLOWED = "model-door"
_FINAL = frozenset({"model-budget", "model-hold", "canary"})
"""Refusals that asking again does not change."""

log = logging.getLogger(__name__)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was found to be allowed to ask."""

    route: Route
    body: bytes
    headers: Headers
    agent: str
    owner: Owner
    flow: str
    wants_events: bool = True
    """A stream is to be one of events (Gemini's may be a JSON list otherwise)."""
    on_host: bool = False
    opened: asyncio.Future[None] | None = None
    """The record of the request that brought it, see :attr:`Exchange.opened`; nothing leaves before."""


class ModelCalls:
    """All calls of one cell, and what has to be known between them."""

    def __init__(self, cell: GatewayCell) -> None:
        self._cell = cell
        self._branches = Branches()
        self._spend = Spend()
        self._running: dict[bytes, Answer] = {}
        self._tasks: dict[Answer, asyncio.Task[None]] = {}
        self._last = KeptAnswers(MAX_KEPT_BYTES)
        self._said: OrderedDict[str, tuple[list[Json], int]] = OrderedDict()
        self._said_bytes = 0
        self._tools: OrderedDict[str, bytes] = OrderedDict()
        self._open: OrderedDict[str, int] = OrderedDict()
        """Branches with open steps, and how many; the oldest first."""
        self._refusals = 0
        self._stopped = ""
        self._upstream: tuple[tuple[object, ...], Teller | HttpServer] | None = None

    def upstream(self, door: ModelDoor) -> Teller | HttpServer:
        """Where the door leads.

        Raises:
            InvalidInput: it cannot be used.
        """
        key = (door.upstream, door.script, self._cell.kit.upstream_roots)
        if self._upstream is None or self._upstream[0] != key:
            made: Teller | HttpServer
            if door.upstream == "scripted":
                made = Scripted(door.script)
            elif door.upstream == "replay":
                made = Replay(door.script)
            else:
                made = HttpServer(door.upstream, self._cell.kit.upstream_roots)
            if self._upstream is not None and isinstance(old := self._upstream[1], HttpServer):
                old.close()
            self._upstream = (key, made)
        return self._upstream[1]

    async def close(self) -> None:
        """The cell has ended: end every call, with its record, and let go of the upstream (in at most 3 s)."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=3)
        if self._upstream is not None and isinstance(upstream := self._upstream[1], HttpServer):
            upstream.close()

    async def ask(self, asked: Asked) -> Answer:
        """The answer to a request, which may be one that is under way or was given before.

        Raises:
            NodeGoneError: a retry could not be recorded.
        """
        path = f"{asked.route.dialect} {asked.route.model} {asked.route.stream} {asked.agent}\n"
        key = hashlib.sha256(path.encode() + asked.body).digest()
        earlier = self._running.get(key) or self._last.find(key)
        if earlier is not None:
            reason = "the answer to an earlier request was given again"
            call, status = f"m{secrets.token_hex(6)}", earlier.status or None
            await self._record(asked, "closed", call, reason=reason, retry_of=earlier.call, status=status)
            return earlier
        answer = Answer(f"m{secrets.token_hex(6)}")
        self._running[key] = answer
        task = asyncio.create_task(self._run(asked, answer, key))
        self._tasks[answer] = task
        task.add_done_callback(lambda _: self._tasks.pop(answer, None))
        return answer

    def release(self, answer: Answer) -> None:
        """Nobody reads it any more: if it stays so, the call is ended."""
        task = self._tasks.get(answer)
        if task is not None and answer.readers == 0:

            def end() -> None:
                if answer.readers == 0:
                    task.cancel()

            asyncio.get_running_loop().call_later(ABANDONED_S, end)

    async def deny(self, asked: Asked, call: str, error: RefusedError) -> int:
        """Record a call that is not made; the status that it is answered with. Freezes an agent that does not stop asking.

        Raises:
            NodeGoneError: it could not be recorded, or the cell could not be frozen.
        """
        await self._record(
            asked,
            "denied",
            call,
            "deny",
            rule=error.rule,
            reason=error.reason,
            status=error.status,
            stripped=error.stripped,
        )
        await self._count(error)
        return 404 if self._stopped else error.status

    async def _count(self, error: RefusedError) -> None:
        """An agent that does not mind refusals is stopped by the kernel, not by a status."""
        self._refusals += error.rule in _FINAL
        if self._refusals > MAX_REFUSALS and not self._stopped:
            await self.stop(f"the agent went on after {MAX_REFUSALS} refused model calls in a row: {error.reason}")

    async def stop(self, reason: str) -> None:
        """Freeze the cell; from then on every call is answered 404. Raises NodeGoneError."""
        await self._cell.node.stop_agent(self._cell.id, reason)
        self._stopped = reason

    async def _run(self, asked: Asked, answer: Answer, key: bytes) -> None:
        dialect = DIALECTS[asked.route.dialect]
        try:
            try:
                plan = self._prepare(asked, answer.call)
            except RefusedError as error:
                status = await self.deny(asked, answer.call, error)
                fail(answer, dialect, status, error.reason, error.rule)
                return
            await self._call(plan, asked, answer, key)
        except NodeGoneError as error:
            log.warning("cell %s: model call %s: %s", self._cell.id, answer.call, error)
            fail(answer, dialect, 503, f"nothing was passed on: {error}", "internal-error")
        except Exception:  # a judge that failed denies, whatever it failed of
            log.exception("cell %s: model call %s failed", self._cell.id, answer.call)
            fail(answer, dialect, 500, "nothing was passed on: the model gateway failed", "internal-error")
        finally:
            self._running.pop(key, None)
            answer.end("the call was ended")

    def _prepare(self, asked: Asked, call: str) -> Plan:
        kit = self._cell.kit
        if self._stopped:
            raise RefusedError(404, "model-stopped", self._stopped)
        if kit.model is None:
            raise RefusedError(404, "no-model-door", "this cell has no model")
        if len(self._running) > MAX_CALLS:
            raise RefusedError(429, "model-load", f"more than {MAX_CALLS} model calls are under way")
        try:
            upstream = self.upstream(kit.model)
        except InvalidInput as error:
            raise RefusedError(500, "model-upstream", str(error)) from error
        return make_plan(
            kit,
            kit.model,
            upstream,
            asked.route,
            asked.body,
            asked.headers,
            call,
            self._spend,
            self._said,
            asked.wants_events,
        )

    async def _call(self, plan: Plan, asked: Asked, answer: Answer, key: bytes) -> None:
        started_ns = mono_ns()
        request, call = plan.request, answer.call
        with_ids = asked.route.dialect != "gemini"
        place = self._branches.place(call, request.messages, seed=asked.agent, with_ids=with_ids)
        tools = encode(request.tools, MAX_RECORD_CHARS) if request.tools else ""
        known: dict[str, Any] = {"branch": place.branch, "parent": place.parent, "model": request.model}
        known |= {"model_used": plan.model, "upstream": plan.origin, "stream": request.stream}
        offered = hashlib.sha256(tools.encode()).digest()
        opening = self._make_event(
            asked,
            "opened",
            call,
            messages=encode(request.messages[place.known :], MAX_RECORD_CHARS),
            known=place.known,
            digest=digest_request(request),
            tools=tools if offered != self._tools.get(place.parent) else "",
            stripped=plan.stripped,
            **known,
        )
        # Everything that the node is asked leaves in one piece. The steps may go on ending while the upstream thinks.
        ending = asyncio.ensure_future(self._close_steps(place.goes_on))
        ending.add_done_callback(_mark_seen)
        try:
            await asyncio.ensure_future(self._cell.node.append(self._cell.id, opening))
            if asked.opened is not None:
                await asyncio.shield(asked.opened)
        except NodeGoneError:
            plan.give_back(self._spend)
            raise
        _remember(self._tools, call, offered, 4096)
        closing: dict[str, Any] = {**known, "finish": "error"}
        try:
            fetched = await self._decide(plan, asked, answer)
            self._refusals = 0
            reply = fetched.reply
            await ending
            self._branches.answered(place, call, Message("assistant", reply.parts), with_ids=with_ids)
            self._keep_said(plan, reply, asked)
            done = closing | told(reply) | {"status": 200}
            if reply.tool_calls:
                record = self._make_closing(plan, asked, call, done, started_ns)
                await self._open_steps(reply, asked, call, place.branch, record)
            else:
                await self._close(plan, asked, call, done, started_ns)
            answer.headers = ((b"x-vallum-call", call.encode()), *answer.headers)
            fetched.deliver(answer)
            self._last.keep(place.branch, key, answer)
        except RefusedError as error:
            closing |= {"verdict": "deny", "rule": error.rule, "reason": error.reason, "status": error.status}
            await self._close(plan, asked, call, closing, started_ns)
            await self._count(error)
            fail(answer, plan.dialect, 404 if self._stopped else error.status, error.reason, error.rule)
        except (UpstreamRefusedError, DialectError, OSError) as error:
            status, words, retry_after = explain(error, plan)
            closing |= {"reason": words, "status": status}
            await self._close(plan, asked, call, closing, started_ns)
            fail(answer, plan.dialect, status, words, "model-upstream", retry_after, cut=True)
        except asyncio.CancelledError:
            closing |= {"reason": "nobody waited for the answer any more"}
            await asyncio.shield(self._close(plan, asked, call, closing, started_ns))
            raise
        except NodeGoneError as error:
            closing |= {"finish": "error", "reason": f"nothing was passed on: {error}"}
            with contextlib.suppress(NodeGoneError):
                await self._close(plan, asked, call, closing, started_ns)
            raise

    async def _decide(self, plan: Plan, asked: Asked, answer: Answer) -> Fetched:
        """Fetch replies until one may be passed on: what a person refuses is told to the model, which answers anew."""
        for attempt in range(MAX_REGENERATIONS + 1):
            fetched = await fetch(plan, asked.agent, answer)
            plan.is_answering = False
            plan.used = add_usage(plan, fetched.reply)
            reasons = await self._review(plan, fetched.reply, asked)
            if not reasons:
                return fetched
            if attempt < MAX_REGENERATIONS:
                results: list[Part] = [
                    ToolResult(call, (Text(words),), is_error=True) for call, words in rejection(fetched.reply, reasons)
                ]
                plan.extend((Message("assistant", fetched.reply.parts), Message("tool", tuple(results))))
        raise RefusedError(
            403,
            "model-hold",
            f"{MAX_REGENERATIONS + 1} answers in a row were refused; the last: {next(iter(reasons.values()))}",
        )

    async def _review(self, plan: Plan, reply: Reply, asked: Asked) -> dict[str, str]:
        """Ask a person about the calls that have to wait; why some were refused, by id."""
        reasons: dict[str, str] = {}
        for call in reply.tool_calls:
            # An agent may find its tool in whatever case the model writes it.
            name = call.name.strip().casefold()
            if any(fnmatch.fnmatchcase(name, pattern.casefold()) for pattern in plan.door.hold_tools):
                began_ns = mono_ns()
                decision = await self._cell.node.hold(
                    self._cell.id,
                    subject=f"tool call {show(call.name, 80)} {show(call.arguments, 400)}",
                    rule=f"hold-tool:{show(call.name, 80)}",
                    flow=asked.flow,
                    timeout_s=self._cell.kit.approval_timeout_s,
                )
                plan.outside_ns += mono_ns() - began_ns
                if decision.verdict != "allow":
                    reasons[call.id] = f"refused by the operator ({decision.reason}); do something else"
        return reasons

    async def _close_steps(self, branch: str) -> None:
        """The branch has gone on: its steps are over, if it has any."""
        if self._open.pop(branch, 0):
            await self._cell.node.close_steps(self._cell.id, branch)

    async def _open_steps(self, reply: Reply, asked: Asked, call: str, branch: str, closing: ModelCall) -> None:
        """A step for each call of the reply, then the record of the reply, which names them."""
        calls = [ProposedCall(id=c.id, name=c.name, arguments=c.arguments) for c in reply.tool_calls]
        process = asked.owner.process
        self._open.pop(branch, 0)
        # Branches that nobody came back to would fill what the node keeps open.
        while self._open and sum(self._open.values()) + len(calls) > MAX_OPEN_STEPS:
            await self._close_steps(next(iter(self._open)))
        self._open[branch] = len(calls)
        await self._cell.node.open_steps(
            self._cell.id,
            branch=branch,
            model_call=call,
            calls=calls,
            agent=asked.agent,
            pid=process.pid if process is not None else None,
            step=asked.owner.scope.step,
            on_host=asked.on_host,
            closing=closing,
        )

    async def _close(self, plan: Plan, asked: Asked, call: str, closing: dict[str, Any], started_ns: int) -> None:
        await self._cell.node.append(self._cell.id, self._make_closing(plan, asked, call, closing, started_ns))

    def _make_closing(self, plan: Plan, asked: Asked, call: str, closing: dict[str, Any], started_ns: int) -> ModelCall:
        cost = plan.settle(self._spend)
        duration_ns = mono_ns() - started_ns
        verdict: Verdict = closing.pop("verdict", "allow")
        return self._make_event(
            asked,
            "closed",
            call,
            verdict,
            prompt_tokens=plan.used.prompt_tokens,
            completion_tokens=plan.used.completion_tokens,
            cached_tokens=plan.used.cached_tokens,
            cost_usd_micros=cost,
            duration_ns=duration_ns,
            overhead_ns=max(0, duration_ns - plan.outside_ns),
            **closing,
        )

    def _keep_said(self, plan: Plan, reply: Reply, asked: Asked) -> None:
        """What ``previous_response_id`` may name."""
        if asked.route.dialect != "responses" or not plan.may_be_named:
            return
        if reply.id not in self._said:
            said, items = output_items(reply), items_of(plan.raw)
            # What was said before is shared, but for the list that names it.
            size = len(asked.body) + len(dump(said)) + _ITEM_BYTES * len(items)
            self._said[reply.id] = ([*items, *said], size)
            self._said_bytes += size
        while self._said_bytes > MAX_KEPT_BYTES:
            _, (_, size) = self._said.popitem(last=False)
            self._said_bytes -= size

    async def _record(self, asked: Asked, state: Any, call: str, verdict: Verdict = "allow", **fields: Any) -> None:
        await self._cell.node.append(self._cell.id, self._make_event(asked, state, call, verdict, **fields))

    def _make_event(
        self,
        asked: Asked,
        state: Any,
        call: str,
        verdict: Verdict = "allow",
        *,
        rule: str = ALLOWED,
        reason: str = "",
        **fields: Any,
    ) -> ModelCall:
        return ModelCall(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=asked.owner.scope,
            attribution=asked.owner.attribution,
            state=state,
            call=call,
            verdict=verdict,
            rule=rule,
            reason=reason,
            dialect=asked.route.dialect,
            agent=asked.agent,
            **{"model": asked.route.model, **fields},
        )


def _mark_seen(ending: asyncio.Future[None]) -> None:
    """Steps that could not be closed are no error of a call that failed before it looked."""
    if not ending.cancelled():
        ending.exception()


def _remember(kept: OrderedDict[str, bytes], key: str, value: bytes, limit: int) -> None:
    kept[key] = value
    while len(kept) > limit:
        kept.popitem(last=False)
