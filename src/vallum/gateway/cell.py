"""One cell as the gateway sees it: its doors, rules, names and open flows; and how it asks the node about them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol

import dns.rcode

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import AnyEvent, DnsQuery, ModelCall, Process
from vallum.core.scope import Attribution, Scope
from vallum.core.text import show
from vallum.core.verdict import Decision, fail_closed
from vallum.gateway import kit as kits
from vallum.gateway.dns import MAX_MESSAGE, Query, read_query, write_answer, write_failure, write_refusal
from vallum.gateway.door import (
    Datagram,
    Endpoint,
    endpoint,
    prepare_datagrams,
    receive_datagram,
    send_datagram,
    unpack_address,
)
from vallum.gateway.http.canaries import find_in_name
from vallum.gateway.kit import Kit, ServiceName
from vallum.gateway.names import CellNames, HostResolver, LookupTemporarilyFailedError, find_service, stand_ins_of
from vallum.gateway.tls.upstream import Vetting
from vallum.gateway.wire import Attributed, Failed, Frame, ProposedCall
from vallum.rules.facts import Asker
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.names import is_under, normalise_name
from vallum.rules.queries import QueryLoad, judge_query_load
from vallum.rules.verdicts import judge_query

MAX_FLOWS = 1024
"""Flows of one cell at once; further connections wait in the kernel's queue."""
ACCEPT_AT_ONCE = 16
"""Connections of one door that are taken before others have their turn."""
MAX_QUERIES = 64
"""DNS queries of one cell at once; further ones wait in the socket and are lost when it is full."""
GATEWAY_SERVICE = "gateway-service"
"""The rule of decisions on the gateway's own names and addresses."""

log = logging.getLogger(__name__)


def _asks_step(rule: Rule) -> bool:
    return (rule.selector is not None and rule.selector.steps is not None) or "step" in rule.when


class NodeGoneError(Exception):
    """The node did not answer, or said no. Whatever was waiting for it is denied."""


class Owner:
    """To whom a fact belongs, as the node said."""

    def __init__(
        self, scope: Scope, attribution: Attribution, process: Process | None, socket_step: int | None
    ) -> None:
        self.scope = scope
        self.attribution = attribution
        self.process = process
        self.socket_step = socket_step


class Charge:
    """A question to the node, who opened a socket. An event may be charged by it before it is answered."""

    def __init__(self, number: int, answer: asyncio.Future[Frame]) -> None:
        self.number = number
        self.answer = answer
        answer.add_done_callback(_mark_seen)

    def known(self) -> Owner | None:
        """Who it is, when the node has said so by now."""
        if not self.answer.done() or self.answer.cancelled() or self.answer.exception() is not None:
            return None
        found = self.answer.result()
        if not isinstance(found, Attributed):
            return None
        return Owner(found.scope, found.attribution, found.process, found.socket_step)

    async def owner(self) -> Owner:
        """Who it is.

        Raises:
            NodeGoneError: the node did not answer, or cannot say.
        """
        if not self.answer.done():
            await asyncio.wait([self.answer])
        if (owner := self.known()) is not None:
            return owner
        error = None if self.answer.cancelled() else self.answer.exception()
        if error is None and not self.answer.cancelled() and isinstance(failed := self.answer.result(), Failed):
            raise NodeGoneError(failed.error)
        raise NodeGoneError(str(error or "the node answered something else")) from error


def _mark_seen(answer: asyncio.Future[Frame]) -> None:
    """A question whose answer nobody needed any more is no error."""
    if not answer.cancelled():
        answer.exception()


class Node(Protocol):
    """What a cell needs of the node."""

    def attribute(self, cell: str, protocol: str, src: Endpoint, dst: Endpoint) -> Charge:
        """Ask who opened a socket; the question leaves with the next one, at the latest when the loop turns. Raises
        NodeGoneError."""
        ...

    def hurry(self) -> None:
        """Have questions leave now, where there is something else to do until they are answered."""
        ...

    async def append(self, cell: str, event: AnyEvent, charge: Charge | None = None, *, soon: bool = False) -> int:
        """Id of the event once it is written. With ``charge`` the node first fills in whose it is, and writes nothing when
        it cannot tell; a charge is used once. ``soon``: it may wait a millisecond for what else is to be said. Raises
        NodeGoneError when it was not written."""
        ...

    async def open_steps(
        self,
        cell: str,
        *,
        branch: str,
        model_call: str,
        calls: Sequence[ProposedCall],
        agent: str = "",
        pid: int | None = None,
        step: int | None = None,
        on_host: bool = False,
        closing: ModelCall | None = None,
    ) -> tuple[int, ...]:
        """See :class:`vallum.gateway.wire.OpenSteps`: a step for each call, in their order; ``closing`` is written by then.
        Raises NodeGoneError."""
        ...

    async def close_steps(self, cell: str, branch: str) -> None:
        """See :class:`vallum.gateway.wire.CloseSteps`. Raises NodeGoneError."""
        ...

    async def stop_agent(self, cell: str, reason: str) -> None:
        """Returns when the cell stands still (:class:`vallum.gateway.wire.StopAgent`). Raises NodeGoneError."""
        ...

    async def hold(
        self,
        cell: str,
        *,
        subject: str,
        rule: str,
        flow: str,
        timeout_s: float,
        src: Endpoint | None = None,
        dst: Endpoint | None = None,
    ) -> Decision:
        """Wait for a person's decision; a timeout denies. Cancelling it ends the hold. Raises NodeGoneError."""
        ...

    async def call_tool(self, cell: str, *, name: str, arguments: str, flow: str) -> str:
        """JSON of an MCP ``CallToolResult`` (:class:`vallum.gateway.wire.CallTool`). Raises NodeGoneError."""
        ...


class CutFlow(Protocol):
    """A flow that is open."""

    def rejudge(self) -> bool:
        """The rules have changed: end unless they still allow it. Whether it ends."""
        ...


class GatewayCell:
    """Serves the doors of one cell."""

    def __init__(
        self,
        cell: str,
        *,
        run: str,
        episode: str | None,
        rules: Ruleset,
        kit: Kit,
        tcp: Sequence[socket.socket],
        dns: Sequence[socket.socket],
        node: Node,
        resolver: HostResolver,
        vetting: Vetting,
        serve: Callable[[GatewayCell, socket.socket, Endpoint], Coroutine[None, None, None]],
    ) -> None:
        """``serve`` takes an accepted connection and its peer, and closes it."""
        self.id = cell
        self.run = run
        self.episode = episode
        self.owner = Owner(Scope(run=run, episode=episode), Attribution(method="netns"), None, None)
        """The cell itself, for facts whose step the node could not tell."""
        self.rules = rules
        self.kit = kit
        self._take_rules(rules)
        self.node = node
        self.names = CellNames(resolver)
        self.vetting = vetting
        self.flows: set[CutFlow] = set()
        self.at_close: list[Callable[[], Coroutine[None, None, None]]] = []
        """What services keep for the cell beyond a flow is let go by these, after the last flow."""
        self._load = QueryLoad()
        self._serve = serve
        self._doors = [*tcp, *dns]
        self._queries = asyncio.Semaphore(MAX_QUERIES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._tcp = list(tcp)
        self._flow_count = 0
        self._is_full = False
        for door in tcp:
            door.setblocking(False)
            self._loop.add_reader(door.fileno(), self._accept, door)
        for door in dns:
            prepare_datagrams(door)
            self._loops.append(asyncio.create_task(self._receive(door)))

    def _take_rules(self, rules: Ruleset) -> None:
        every = (*rules.deny, *rules.hold, *rules.allow)
        self.rules = rules
        self.asks_step = any(map(_asks_step, every))
        """Whether some rule is for certain steps only, so that nothing can be judged before the step is known."""
        self.has_conditions = any(rule.when for rule in every)
        """Whether the same facts may be judged differently later."""
        self.has_budgets = any(rule.budget is not None for rule in every)

    def asker(self, owner: Owner | None = None) -> Asker:
        """Who asks, for rules that are for somebody. Without ``owner`` the step is not known."""
        return Asker(
            run=self.run,
            episode=self.episode or "",
            agent=self.kit.agent,
            step=owner.scope.step if owner is not None else None,
            phase=self.kit.phase,
        )

    def offers(self, service: ServiceName) -> bool:
        """Whether the cell has that service of the gateway's own."""
        if service == "model":
            return self.kit.model is not None
        return service == "tools" and bool(self.kit.tools)

    def update_rules(self, rules: Ruleset, kit: Kit | None = None) -> int:
        """Judge by ``rules`` (and ``kit``, None: the one there is) from now on, open flows too. How many of those were cut."""
        self._take_rules(rules)
        self.kit = kit or self.kit
        return sum(flow.rejudge() for flow in list(self.flows))

    async def close(self) -> None:
        """Close the doors, cut every flow, and return when each has said so to the record (at most 3 s)."""
        self._stop_accepting()
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for door in self._doors:
            door.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=3)
        for let_go in self.at_close:
            await let_go()

    def attribute(self, protocol: str, src: Endpoint, dst: Endpoint) -> Charge:
        """Ask the node. Raises NodeGoneError."""
        return self.node.attribute(self.id, protocol, src, dst)

    def _start(self, work: Coroutine[None, None, None], release: Callable[[], None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            release()
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("serving cell %s failed", self.id, exc_info=error)

        task.add_done_callback(ended)

    def _accept(self, door: socket.socket) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if self._flow_count >= MAX_FLOWS:
                self._is_full = True
                self._stop_accepting()
                return
            try:
                conn, peer = door.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, or a connection that has gone already: neither may end the loop.
                log.warning("cell %s: accept: %s", self.id, error.strerror)
                self._loop.remove_reader(door.fileno())
                self._loop.call_later(0.05, self._resume, door)
                return
            self._flow_count += 1
            self._start(self._serve(self, conn, endpoint(peer)), self._flow_ended)

    def _flow_ended(self) -> None:
        self._flow_count -= 1
        if self._is_full:
            self._is_full = False
            for door in self._tcp:
                self._resume(door)

    def _resume(self, door: socket.socket) -> None:
        if door.fileno() >= 0 and not self._is_full:
            self._loop.add_reader(door.fileno(), self._accept, door)

    def _stop_accepting(self) -> None:
        for door in self._tcp:
            self._loop.remove_reader(door.fileno())

    async def _receive(self, door: socket.socket) -> None:
        while True:
            await self._queries.acquire()
            try:
                datagram = await _next_datagram(door)
            except OSError:
                # An ICMP error of an earlier answer.
                self._queries.release()
                await asyncio.sleep(0)
                continue
            except asyncio.CancelledError:
                self._queries.release()
                raise
            if datagram is None:
                self._queries.release()
                continue
            self._start(self._answer_datagram(door, datagram), self._queries.release)

    async def _answer_datagram(self, door: socket.socket, datagram: Datagram) -> None:
        data, peer, asked = datagram
        answer = await self.answer_query(data, "udp", endpoint(peer), (unpack_address(asked), 53))
        if answer is not None:
            send_datagram(door, answer, peer, asked)

    async def answer_query(self, wire: bytes, transport: str, src: Endpoint, dst: Endpoint) -> bytes | None:
        """Judge, answer and record one DNS message. None: it is no query, and gets no answer."""
        started_ns = mono_ns()
        query = read_query(wire)
        if query is None:
            return None
        if query.rcode != dns.rcode.NOERROR:
            return write_failure(query, query.rcode)
        answers: list[str] = []
        try:
            charge = self.attribute(transport, src, dst)
            asker = self.asker(await charge.owner() if self.asks_step else None)
            decision = self._judge_own(query) or self._judge_query(query, asker)
            decision_ns = mono_ns() - started_ns
            if decision.verdict == "allow":
                decision, answers, answer = await self._resolve(query, decision, asker, udp=transport == "udp")
            else:
                answer = write_refusal(query, decision)
            await self._record_query(query, decision, answers, transport, charge, decision_ns)
        except NodeGoneError as error:
            log.warning("cell %s: query refused: %s", self.id, error)
            return write_failure(query, dns.rcode.SERVFAIL)
        except Exception:  # a judge that failed denies, whatever it failed of
            log.exception("cell %s: answering a query failed", self.id)
            decision = fail_closed("the gateway's resolver")
            with contextlib.suppress(NodeGoneError):
                await self._record_query(query, decision, [], transport, None, mono_ns() - started_ns)
            return write_failure(query, dns.rcode.SERVFAIL)
        return answer

    def _judge_query(self, query: Query, asker: Asker) -> Decision:
        decision = judge_query(self.rules, query.qname, query.qtype, asker)
        name = normalise_name(query.qname)
        if decision.verdict != "allow" or name is None or self.names.is_known(name):
            return decision  # what is known already is asked of nobody, so it carries nothing out
        if found := find_in_name(self.kit.canaries, name):
            reason = f"the canary {show(found)} was about to be sent in the name of a query"
            return Decision(verdict="deny", rule="canary", reason=reason)
        self._load, load = judge_query_load(self.rules, self._load, query.qname, mono_ns())
        return decision if load.verdict == "allow" else load

    def _judge_own(self, query: Query) -> Decision | None:
        """The verdict on a name of the gateway's own zone; None for every other name."""
        name = query.qname.lower()
        if name != kits.ZONE and not is_under(name, kits.ZONE):
            return None
        service = find_service(name)
        if service is not None and self.offers(service):
            return Decision(verdict="allow", rule=GATEWAY_SERVICE, reason=f"{name} is the gateway's own")
        return Decision(verdict="deny", rule=GATEWAY_SERVICE, reason=f"{show(name)} is not offered to this cell")

    async def _resolve(
        self, query: Query, decision: Decision, asker: Asker, *, udp: bool
    ) -> tuple[Decision, list[str], bytes]:
        if not query.wants_addresses:
            return decision, [], write_answer(query, [], exists=True, udp=udp)
        name = query.qname.lower()
        if (service := find_service(name)) is not None:
            own = stand_ins_of(service)
            family = [ip for ip in own if (":" in ip) == (query.qtype == "AAAA")]
            return decision, family, write_answer(query, own, exists=True, udp=udp)
        try:
            found = await self.names.resolve(name, self.rules, asker)
        except LookupTemporarilyFailedError as error:
            reason = f"{decision.reason}, but {error}"
            failed = Decision(verdict=decision.verdict, rule=decision.rule, reason=reason)
            return failed, [], write_failure(query, dns.rcode.SERVFAIL)
        if not found.addresses and found.dropped:
            return found.dropped[0], [], write_refusal(query, found.dropped[0])
        family = [ip for ip in found.addresses if (":" in ip) == (query.qtype == "AAAA")]
        return decision, family, write_answer(query, found.addresses, exists=found.exists, udp=udp)

    async def _record_query(
        self,
        query: Query,
        decision: Decision,
        answers: list[str],
        transport: str,
        charge: Charge | None,
        decision_ns: int,
    ) -> None:
        event = DnsQuery(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=self.owner.scope,
            attribution=self.owner.attribution,
            qname=query.qname,
            qtype=query.qtype,
            verdict=decision.verdict,
            rule=decision.rule,
            reason=decision.reason,
            answers=answers,
            transport="tcp" if transport == "tcp" else "udp",
            process=None,
            decision_ns=decision_ns,
        )
        await self.node.append(self.id, event, charge)


async def _next_datagram(door: socket.socket) -> Datagram | None:
    """Wait for a datagram. Raises OSError as the socket does."""
    while True:
        try:
            return receive_datagram(door, MAX_MESSAGE + 1)
        except BlockingIOError:
            await _wait_readable(door)


async def _wait_readable(door: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(door.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(door.fileno())
