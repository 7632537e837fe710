"""Every request's way: judged, perhaps held for a person, recorded, answered by a service, and its end recorded.

Covered: nothing of a request reaches a service before ``http.request`` opened is acknowledged; rules that change while
it is held or answered are applied to it; a judge that fails denies; every opened request is closed in the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import Literal

import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import HttpRequest
from vallum.core.verdict import Decision, fail_closed
from vallum.gateway.cell import NodeGoneError, Owner
from vallum.gateway.http.exchange import Carrier, DeniedError, Exchange, GuestGoneError, RequestHead, Service
from vallum.gateway.http.head import Place
from vallum.gateway.http.judging import Judgement, judge
from vallum.gateway.http.redaction import redact_target
from vallum.gateway.kit import ServiceName
from vallum.gateway.services import NoServiceError, make_service
from vallum.gateway.spending import purse_of
from vallum.gateway.tls.termination import HandshakeError
from vallum.rules.budgets import Usage

WAITING: frozenset[str] = frozenset({"model"})
"""Services that wait for :attr:`Exchange.opened` themselves, before anything leaves: they ask the node in the same moment."""
MAX_CLOSING = 16
"""Requests of one flow whose end is being recorded, before the next has to wait."""
_GONE = Decision(verdict="deny", rule="internal-error", reason="the node did not answer, so nothing was sent")

log = logging.getLogger(__name__)


class OpenRequest:
    """A request that a service is answering: cut when the rules change against it. In ``GatewayCell.flows``."""

    def __init__(
        self, desk: RequestDesk, exchange: Exchange, owner: Owner, task: asyncio.Task[None], approved: str
    ) -> None:
        """``approved``: the rule that held it and that a person let it pass; empty when none did."""
        self._approved = approved
        self._desk = desk
        self._exchange = exchange
        self._owner = owner
        self._task = task
        self.cut: Decision | None = None

    def rejudge(self) -> bool:
        """As :meth:`vallum.gateway.cell.CutFlow.rejudge`."""
        if self.cut is not None:
            return False
        decision = self._desk.judge(self._exchange.head, self._owner).decision
        if decision.verdict == "allow" or (decision.verdict == "hold" and decision.rule == self._approved):
            return False
        # Too late to ask: it is on its way.
        self.cut = msgspec.structs.replace(decision, verdict="deny")
        self._task.cancel()
        return True


class RequestDesk:
    """The desk of one flow. See :class:`~vallum.gateway.http.exchange.Desk`."""

    def __init__(self, carrier: Carrier, place: Place) -> None:
        self._carrier = carrier
        self._place = place
        self._services: dict[ServiceName, Service] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """The flow is over. Returns when the end of each request has been recorded."""
        for service in self._services.values():
            service.close()
        if self._closing:
            await asyncio.wait(tuple(self._closing))

    def judge(self, head: RequestHead, owner: Owner) -> Judgement:
        """The verdict by the rules as they are now; a judge that fails denies."""
        cell = self._carrier.cell
        try:
            return judge(cell.rules, self._carrier.facts, head, cell.asker(owner))
        except Exception:  # a judge that failed denies, whatever it failed of
            log.exception("cell %s: judging a request failed", cell.id)
            return Judgement(decision=fail_closed("judging the request"), head=head)

    async def turn_away(self, decision: Decision) -> None:
        """As :meth:`Desk.turn_away`."""
        with contextlib.suppress(NodeGoneError):
            owner = await self._owner()
            await self._record("denied", "", None, decision, owner)

    async def answer(self, exchange: Exchange) -> None:
        """As :meth:`Desk.answer`."""
        try:
            await self._answer(exchange)
        except (OSError, GuestGoneError):
            raise
        except Exception:  # whatever failed, nothing more of it may leave
            log.exception("cell %s: answering a request failed", self._carrier.cell.id)
            await exchange.refuse(fail_closed("answering the request"), 500)

    async def _answer(self, exchange: Exchange) -> None:
        owner = await self._owner()
        judgement, approved = self.judge(exchange.head, owner), ""
        try:
            if judgement.decision.verdict == "hold":
                approved = judgement.decision.rule
                judgement = await self._hold(exchange, judgement, owner)
            judgement = self._charge(judgement)
            exchange.head, exchange.decision = judgement.head, judgement.decision
            if judgement.decision.verdict != "allow":
                await self._record("denied", exchange.id, exchange, judgement.decision, owner)
                await exchange.refuse(judgement.decision, judgement.status)
                return
            try:
                await self._open(exchange, judgement, owner)
            except asyncio.CancelledError:
                # It may have been written: then its end has to be, too.
                await self._close(exchange, judgement.decision, owner, judgement.service)
                raise
        except NodeGoneError as error:
            log.warning("cell %s: request refused: %s", self._carrier.cell.id, error)
            await exchange.refuse(_GONE, 503)
            return
        await self._serve(exchange, judgement, owner, approved)

    async def _open(self, exchange: Exchange, judgement: Judgement, owner: Owner) -> None:
        if judgement.service not in WAITING:
            await self._record("opened", exchange.id, exchange, judgement.decision, owner, service=judgement.service)
            return
        recording = self._record(
            "opened", exchange.id, exchange, judgement.decision, owner, service=judgement.service, soon=True
        )
        exchange.opened = asyncio.ensure_future(recording)
        exchange.opened.add_done_callback(_mark_seen)

    def _charge(self, judgement: Judgement) -> Judgement:
        """Count an allowed request against the budget of its grant; denied when that is used up."""
        if judgement.decision.verdict != "allow":
            return judgement
        usage = Usage(requests=1, request_bytes=judgement.head.length or 0)
        denial = purse_of(self._carrier.cell).spend(judgement.rule, usage)
        return judgement if denial is None else msgspec.structs.replace(judgement, decision=denial, status=429)

    async def _serve(self, exchange: Exchange, judgement: Judgement, owner: Owner, approved: str) -> None:
        """Let a service answer what was recorded as opened; record its end whatever comes."""
        decision = judgement.decision
        serving = asyncio.ensure_future(self._run_service(exchange, judgement))
        open_request = OpenRequest(self, exchange, owner, serving, approved)
        flows = self._carrier.cell.flows
        flows.add(open_request)
        try:
            if open_request.rejudge():
                pass  # the rules changed while it was being recorded
            await asyncio.wait({serving})
            if open_request.cut is not None:
                decision = open_request.cut
                await self._record("denied", exchange.id, exchange, decision, owner, service=judgement.service)
                await exchange.refuse(decision)
            elif not serving.cancelled() and (error := serving.exception()) is not None:
                decision = await self._conclude(exchange, decision, error)
        finally:
            flows.discard(open_request)
            serving.cancel()
            try:
                await asyncio.wait({serving})
            finally:  # a stream that is reset on a connection that ends is cancelled twice
                await self._close(exchange, decision, owner, judgement.service)

    async def _close(self, exchange: Exchange, decision: Decision, owner: Owner, service: str) -> None:
        """Record a request's end, without making the next one wait for it; few at once, so that none gets lost in a heap."""

        async def record() -> None:
            with contextlib.suppress(NodeGoneError):
                await self._record("closed", exchange.id, exchange, decision, owner, service=service, soon=True)

        task = asyncio.create_task(record())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        if len(self._closing) > MAX_CLOSING:
            await asyncio.wait(tuple(self._closing), return_when=asyncio.FIRST_COMPLETED)

    async def _run_service(self, exchange: Exchange, judgement: Judgement) -> None:
        name = judgement.service
        service = self._services.get(name)  # type: ignore[call-overload]
        if service is None:
            service = self._services[name] = make_service(name, self._carrier)  # type: ignore[index, arg-type]
        await service.serve(exchange)

    async def _conclude(self, exchange: Exchange, decision: Decision, error: BaseException) -> Decision:
        """Tell the guest that a service failed, and what the record says of it."""
        if isinstance(error, DeniedError | HandshakeError):
            await self._record("denied", exchange.id, exchange, error.decision, await self._owner())
            await exchange.refuse(error.decision, 403 if isinstance(error, DeniedError) else 502)
            return error.decision
        if isinstance(error, GuestGoneError):
            await exchange.abort(str(error))
        elif isinstance(error, OSError | NodeGoneError | NoServiceError):
            why = str(error) or type(error).__name__
            await exchange.refuse(Decision(verdict="deny", rule="upstream", reason=why), status_of(error))
            return Decision(
                verdict=decision.verdict, rule=decision.rule, reason=f"{decision.reason}; it ended with: {why}"
            )
        else:
            log.error("cell %s: serving a request failed", self._carrier.cell.id, exc_info=error)
            await exchange.refuse(fail_closed("answering the request"), 500)
        return Decision(
            verdict=decision.verdict, rule=decision.rule, reason=f"{decision.reason}; it ended with: {error}"
        )

    async def _hold(self, exchange: Exchange, judgement: Judgement, owner: Owner) -> Judgement:
        """Wait for a person. The guest's leaving cancels this, and with it the hold.

        Raises:
            NodeGoneError: nobody can be asked.
        """
        cell, decision = self._carrier.cell, judgement.decision
        head = exchange.head
        asked = asyncio.ensure_future(
            cell.node.hold(
                cell.id,
                subject=f"{self._shown(head.method)} {head.scheme}://{head.host}{self._shown(head.target)}",
                rule=decision.rule,
                flow=self._carrier.id,
                timeout_s=cell.kit.approval_timeout_s,
            )
        )
        left = asyncio.ensure_future(exchange.left())
        try:
            await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                reason = f"{decision.reason}; the guest left before it was decided"
                gone = Decision(verdict="deny", rule=decision.rule, reason=reason)
                return msgspec.structs.replace(judgement, decision=gone)
            given = asked.result()
        finally:
            asked.cancel()
            left.cancel()
        refused = Decision(verdict="deny", rule=decision.rule, reason=given.reason)
        if given.verdict != "allow":
            return msgspec.structs.replace(judgement, decision=refused)
        # The rules may have changed meanwhile: approved is what was asked, not what they deny by now.
        again = self.judge(exchange.head, owner)
        if again.decision.verdict == "hold" and again.decision.rule == decision.rule:
            allowed = Decision(verdict="allow", rule=decision.rule, reason=given.reason)
            return msgspec.structs.replace(again, decision=allowed)
        if again.decision.verdict == "hold":
            return msgspec.structs.replace(again, decision=msgspec.structs.replace(again.decision, verdict="deny"))
        return again

    async def _owner(self) -> Owner:
        try:
            return await self._carrier.owner()
        except NodeGoneError as error:
            log.warning("cell %s: not attributed: %s", self._carrier.cell.id, error)
            return self._carrier.cell.owner

    def _shown(self, text: str) -> str:
        kit = self._carrier.cell.kit
        return redact_target(text, [*(c.secret for c in kit.credentials), *(c.value for c in kit.canaries)])

    async def _record(
        self,
        state: Literal["opened", "closed", "denied"],
        request: str,
        exchange: Exchange | None,
        decision: Decision,
        owner: Owner,
        *,
        service: str = "gateway",
        soon: bool = False,
    ) -> None:
        """Append the request's event and wait until it is written.

        Raises:
            NodeGoneError: it was not.
        """
        cell, facts = self._carrier.cell, self._carrier.facts
        head = exchange.head if exchange is not None else None
        tally = exchange.tally if exchange is not None else None
        event = HttpRequest(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=owner.scope,
            attribution=owner.attribution,
            state=state,
            flow=self._carrier.id,
            request=request,
            verdict=decision.verdict,
            rule=decision.rule,
            reason=decision.reason,
            method=self._shown(head.method) if head is not None else "",
            scheme="https" if self._place.scheme == "https" else "http",
            host=head.host if head is not None else facts.server_name or facts.dst_ip,
            port=facts.dst_port,
            path=self._shown(head.target) if head is not None else "",
            service=service,
            phase=cell.kit.phase,
            **({} if tally is None or state == "opened" else dataclasses.asdict(tally)),
        )
        await cell.node.append(cell.id, event, soon=soon)


def _mark_seen(recorded: asyncio.Future[None]) -> None:
    """Whoever waits for it is told; nobody may be left."""
    if not recorded.cancelled():
        recorded.exception()


def status_of(error: BaseException) -> int:
    """The status that tells a guest why the server behind the gateway gave no answer."""
    if isinstance(error, TimeoutError):
        return 504
    if isinstance(error, NodeGoneError | NoServiceError):
        return 503
    return 502
