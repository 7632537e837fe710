"""The life of one TCP connection of a guest: whose is it, where to, what is it, may it, then relayed and counted.

Covered: nothing of the guest leaves before the first bytes are identified, the rules have said allow and the record
has acknowledged ``opened``; a refusal is recorded before it is given. Not covered: a server that speaks first is
connected to before the guest's bytes are known (they are still held back), where the grant admits that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from typing import Any, Literal

import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import Flow, Protocol
from vallum.core.text import keep, show
from vallum.core.verdict import Decision, fail_closed
from vallum.gateway.cell import GATEWAY_SERVICE, Charge, GatewayCell, NodeGoneError, Owner
from vallum.gateway.conversation import answer_403, is_address, serve_dns
from vallum.gateway.door import (
    Endpoint,
    connect_within,
    endpoint,
    has_left,
    keep_alive,
    original_destination,
    receive,
    reset,
)
from vallum.gateway.http.canaries import CanaryGuard
from vallum.gateway.http.inspection import inspect
from vallum.gateway.http1 import Http1Watch, RefusedError
from vallum.gateway.kit import SERVICE_PORT, ServiceName
from vallum.gateway.names import Pinned, host_of, service_at
from vallum.gateway.own import is_own
from vallum.gateway.relay import Counters, Guard, HoldingGuard, Meter, OpenGuard, UnknownGuard, relay
from vallum.gateway.sniff import MAX_BYTES, Sniffed, Sniffer
from vallum.gateway.spending import FlowMeter, purse_of
from vallum.gateway.tls.termination import HandshakeError
from vallum.rules.budgets import Usage
from vallum.rules.facts import Asker, FlowFacts, Pin
from vallum.rules.verdicts import admits_server_first, judge_flow, reads_requests, reads_sessions

EVIDENCE_GRACE_S = 0.005
"""How long a refusal waits for the guest's first bytes: evidence, and how to phrase it."""
EVIDENCE_LIMIT_S = 0.1
"""The longest it waits for them where it takes that long to learn whose the connection is."""
SERVER_FIRST_GRACE_S = 0.2
"""Silence of the guest after which the server may speak first, where a grant admits it."""
SNIFF_TIMEOUT_S = 10.0
FREE_PIECES = 8
DRIP_S = 0.005
"""How much longer each further piece of a beginning is waited for before it is read."""
CONNECT_TIMEOUT_S = 10.0
GUEST_GONE_CHECK_S = 0.5
MAX_EVIDENCE_BYTES = 128

log = logging.getLogger(__name__)


async def serve_connection(cell: GatewayCell, conn: socket.socket, peer: Endpoint) -> None:
    """Serve one accepted connection to its end, and close it."""
    try:
        conn.setblocking(False)
        flow = GatewayFlow(cell, conn, peer)
    except BaseException:
        reset(conn)
        raise
    try:
        await flow.serve()
    except asyncio.CancelledError:
        # The cell is being closed before there was a verdict: the attempt is a fact all the same.
        if not flow.is_recorded:
            with contextlib.suppress(NodeGoneError):
                reason = "the cell was closed before its first bytes were judged"
                await flow.record("denied", Decision(verdict="deny", rule="cell-closed", reason=reason))
        raise
    except Exception:  # a judge that failed denies, whatever it failed of
        log.exception("cell %s: a flow failed", cell.id)
        with contextlib.suppress(NodeGoneError):
            await flow.record("denied", fail_closed("the gateway"))
    finally:
        flow.end()


class GatewayFlow:
    """One connection."""

    def __init__(self, cell: GatewayCell, conn: socket.socket, peer: Endpoint) -> None:
        self.cell = cell
        self.conn = conn
        self.peer = peer
        self.id = secrets.token_hex(6)
        self.accepted_ns = mono_ns()
        self.decision_ns = 0
        wanted = original_destination(conn)
        self.is_led_here = wanted is not None
        self.dst = wanted or endpoint(conn.getsockname())
        self.service = service_at(self.dst[0])
        """The gateway's own service that is meant, if one is."""
        self.pinned: Pinned = cell.names.pinned(self.dst[0])
        if self.service is not None:
            name = host_of(self.service)
            self.pinned = Pinned(self.dst[0], {name: Pin(name=name, local=True)})
        self.facts = FlowFacts(
            dst_ip=self.pinned.upstream,
            dst_port=self.dst[1],
            names=tuple(self.pinned.names.values()),
            own=is_own(self.pinned.upstream),
        )
        self.seen = Sniffed("unknown")
        self.head = b""
        self.counters = Counters()
        self.is_recorded = False
        self.is_inspected = False
        self._charge = cell.attribute("tcp", peer, self.dst)
        self._is_charged = False
        self._judged: tuple[tuple[object, ...], Decision] | None = None
        self._judged_host: tuple[object, str | None, Decision] | None = None
        self._server: socket.socket | None = None
        self._cut: Decision | None = None
        self._approved = ""
        """Rule that held it, and that a person let it pass."""
        self._task = asyncio.current_task()

    def end(self) -> None:
        """Close what is still open, with RST."""
        self.cell.flows.discard(self)
        reset(self.conn)
        if self._server is not None:
            reset(self._server)

    @property
    def asker(self) -> Asker:
        """Who asks; with the step where that is known by now."""
        return self.cell.asker(self._charge.known())

    async def owner(self) -> Owner:
        """Who opened it.

        Raises:
            NodeGoneError: nobody can say.
        """
        return await self._charge.owner()

    def rejudge(self) -> bool:
        """The rules have changed: cut it unless they still allow it. Whether it is cut."""
        refusal = self._refusal(self._judge())
        if refusal is not None and self._task is not None and self._cut is None:
            self._cut = refusal
            self._task.cancel()
            return True
        return False

    def _judge(self) -> Decision:
        if self.service is not None:
            return self._judge_service(self.service)
        # Opening a flow judges the same facts by the same rules several times, as the world may have changed meanwhile.
        basis = (self.cell.rules, self.cell.kit, self.facts, self._charge.answer.done())
        if self._judged is None or any(a is not b for a, b in zip(basis, self._judged[0], strict=True)):
            self._judged = basis, judge_flow(self.cell.rules, self.facts, self.asker)
        return self._pass_approved(self._judged[1])

    def _pass_approved(self, decision: Decision) -> Decision:
        if decision.verdict != "hold" or decision.rule != self._approved:
            return decision
        return Decision(verdict="allow", rule=decision.rule, reason=f"{decision.reason}: it was given")

    def _refusal(self, decision: Decision) -> Decision | None:
        """What ends a flow that is open, or None. Nobody is asked about it any more; of what is read each request is judged."""
        if decision.verdict == "deny":
            return decision
        if decision.verdict == "hold" and not self.is_inspected:
            return Decision(verdict="deny", rule=decision.rule, reason=decision.reason)
        if self.facts.protocol is not None and not self.is_inspected and self._must_read():
            reason = "by the rules that hold now its requests have to be read, and its beginning went by unread: open a new connection"
            return Decision(verdict="deny", rule="not-inspectable", reason=reason)
        return None

    def _judge_service(self, service: ServiceName) -> Decision:
        name = host_of(service)
        if not self.cell.offers(service) or self.dst[1] != SERVICE_PORT:
            reason = f"{name}:{self.dst[1]} is not offered to this cell"
        elif self.facts.protocol not in {None, "http", "http2"}:
            reason = f"{name} is plain HTTP on port {SERVICE_PORT}, and this is {self.facts.protocol}"
        else:
            return Decision(verdict="allow", rule=GATEWAY_SERVICE, reason=f"{name} is the gateway's own")
        return Decision(verdict="deny", rule=GATEWAY_SERVICE, reason=reason)

    async def serve(self) -> None:
        """From the first question to the last byte."""
        if not self.is_led_here:
            reason = "this is the gateway's own door, which only redirected connections may use"
            await self._refuse(Decision(verdict="deny", rule="gateway-door", reason=reason))
            return
        if self.dst[1] == 53:
            await self._serve_dns()
            return
        decision = self._judge()  # nothing is known of the first bytes: whether any rule could allow it
        if decision.verdict == "deny":
            self.cell.node.hurry()
            self._decided()
            await self._collect_evidence()
            await self._refuse(decision)
            return
        sniffed, server_first = await self._sniff()
        if server_first:
            if decision.verdict == "hold":
                self._decided()
                decision = await self._hold(decision)
                if decision.verdict != "allow":
                    await self._refuse(decision)
                    return
            await self._open(decision, HoldingGuard(self._admit), b"")
        elif not self.head:
            self._decided()
            silent = Decision(verdict="allow", rule=decision.rule, reason="no byte came from the guest")
            await self.record("closed", silent)
        else:
            await self._judge_and_open(sniffed)

    async def _judge_and_open(self, sniffed: Sniffed) -> None:
        try:
            guard = self._admit(sniffed)
        except RefusedError as error:
            self._decided()
            await self._refuse(error.decision)
            return
        self._decided()
        decision = self._judge()
        if decision.verdict == "hold" and not self.is_inspected:
            decision = await self._hold(decision)
            if decision.verdict != "allow":
                await self._refuse(decision)
                return
        await self._open(decision, guard, self.head)

    async def _hold(self, decision: Decision) -> Decision:
        """Wait for a person, who may be quicker than the guest is patient: a guest that has gone ends the wait."""
        await self.owner()
        asked = asyncio.create_task(
            self.cell.node.hold(
                self.cell.id,
                subject=f"{self.facts.protocol} connection: {decision.reason}",
                rule=decision.rule,
                flow=self.id,
                timeout_s=self.cell.kit.approval_timeout_s,
                src=self.peer,
                dst=self.dst,
            )
        )
        try:
            while not asked.done():
                await asyncio.wait([asked], timeout=GUEST_GONE_CHECK_S)
                if not asked.done() and has_left(self.conn):
                    reason = f"{decision.reason}; the guest left before it was decided"
                    return Decision(verdict="deny", rule=decision.rule, reason=reason)
            given = asked.result()
            if given.verdict == "allow":
                self._approved = decision.rule
            return Decision(
                verdict="allow" if given.verdict == "allow" else "deny", rule=decision.rule, reason=given.reason
            )
        finally:
            asked.cancel()

    def _decided(self) -> None:
        self.decision_ns = mono_ns() - self.accepted_ns

    # -- what is it --------------------------------------------------------------------------------------

    async def _sniff(self) -> tuple[Sniffed, bool]:
        """What the guest's first bytes are; or that the server may speak first. ``self.head`` keeps the bytes."""
        loop = asyncio.get_running_loop()
        sniffer = Sniffer()
        deadline = loop.time() + SNIFF_TIMEOUT_S
        try:
            try:
                data = self.conn.recv(MAX_BYTES)
            except BlockingIOError:
                is_first = self._may_server_speak_first()
                try:
                    data = await receive(self.conn, MAX_BYTES, SERVER_FIRST_GRACE_S if is_first else SNIFF_TIMEOUT_S)
                except TimeoutError:
                    if is_first:
                        return self.seen, True
                    raise
            pieces = 0
            while data:
                found = sniffer.feed(data)
                self.head = bytes(sniffer.data)
                if found is not None:
                    return found, False
                pieces += 1
                # A beginning comes in one piece or few. Who drips it byte by byte into hundreds of flows waits, and others
                # do not wait for a gateway that is busy with bytes.
                await asyncio.sleep(max(0, pieces - FREE_PIECES) * DRIP_S)
                data = await receive(self.conn, MAX_BYTES, max(0.0, deadline - loop.time()))
        except (TimeoutError, ConnectionError):
            pass  # judged as it stands: unfinished
        return sniffer.finish(), False

    def _may_server_speak_first(self) -> bool:
        if self.service is not None or not admits_server_first(self.cell.rules, self.facts, self.asker):
            return False
        # A server that speaks before its requests are read would answer nobody's.
        return not reads_requests(self.cell.rules, self.facts, self.asker)

    def _admit(self, sniffed: Sniffed) -> Guard:
        """The guard for what the flow is. Raises RefusedError when the rules say no."""
        self.seen = sniffed
        self.facts = msgspec.structs.replace(
            self.facts,
            protocol=sniffed.protocol,
            server_name=sniffed.server_name,
            name_hidden=sniffed.name_hidden,
            refused=sniffed.refused,
        )
        decision = self._judge()
        if decision.verdict == "deny":
            raise RefusedError(decision)
        self.is_inspected = self._must_read()
        if self.is_inspected and self._server is not None:
            reason = "the guest was silent for so long that its server was connected to, and now it has to be read; try again"
            raise RefusedError(Decision(verdict="deny", rule="not-inspectable", reason=reason))
        if self.is_inspected:
            return OpenGuard()
        if self._server is not None and (refusal := self._refusal(decision)) is not None:
            raise RefusedError(refusal)  # connected already, as the server was to speak first: too late to ask
        # It is connected already where the guest was silent for so long that the server might have spoken first.
        if self._server is not None and not self._is_vetted():
            reason = (
                f"{self.facts.server_name}: TLS came too late for the server's certificate to be seen first; try again"
            )
            raise RefusedError(Decision(verdict="deny", rule="upstream-certificate", reason=reason))
        guard: Guard = UnknownGuard() if sniffed.protocol == "unknown" else OpenGuard()
        if sniffed.protocol == "http":
            guard = Http1Watch(self._judge_host, {self.dst[0], *self.pinned.names})
        is_clear = sniffed.protocol not in {"tls", "ssh"}
        return CanaryGuard(guard, self.cell.kit.canaries) if is_clear and self.cell.kit.canaries else guard

    def _must_read(self) -> bool:
        """Whether its requests have to be read one by one. HTTP/2 always: its frames cannot be watched in passing."""
        protocol = self.facts.protocol
        if self.service is not None or protocol == "http2":
            return True
        if protocol == "ssh":
            return reads_sessions(self.cell.rules, self.facts, self.asker)
        return protocol in {"http", "tls"} and reads_requests(self.cell.rules, self.facts, self.asker)

    def _name_to_vet(self) -> str | None:
        """The granted name that the server has to show a certificate for, before what the guest says in TLS is relayed."""
        if self.facts.protocol != "tls" or not self.cell.kit.verify_upstream:
            return None
        rule = self.cell.rules.find(self._judge().rule)
        return self.facts.server_name if rule is not None and rule.host is not None else None

    def _is_vetted(self) -> bool:
        name = self._name_to_vet()
        return name is None or self.cell.vetting.knows(
            name, self.pinned.upstream, self.dst[1], self.cell.kit.upstream_roots
        )

    async def _vet(self) -> None:
        name = self._name_to_vet()
        if name is None:
            return
        try:
            roots = self.cell.kit.upstream_roots
            await self.cell.vetting.vet(name, self.pinned.upstream, self.dst[1], roots_pem=roots)
        except HandshakeError as error:
            raise RefusedError(error.decision) from error

    def _judge_host(self, host: str | None) -> Decision:
        if host == self.facts.server_name and not self.cell.has_conditions:
            return self._judge()
        facts = msgspec.structs.replace(self.facts, protocol="http", server_name=host)
        return self._pass_approved(judge_flow(self.cell.rules, facts, self.asker))

    # -- refused -----------------------------------------------------------------------------------------

    async def _collect_evidence(self) -> None:
        """What a guest that is refused says first. Waited for a moment, and for as long as it takes to learn who it is:
        the refusal cannot be recorded before that anyway."""
        sniffer = Sniffer()
        try:
            self.head = await receive(self.conn, MAX_BYTES, EVIDENCE_GRACE_S)
        except TimeoutError:
            await self._wait_for_evidence()
        except OSError:
            pass
        self.seen = (sniffer.feed(self.head) if self.head else None) or sniffer.finish()

    async def _wait_for_evidence(self) -> None:
        said = asyncio.ensure_future(receive(self.conn, MAX_BYTES, EVIDENCE_LIMIT_S))
        try:
            waited: list[asyncio.Future[Any]] = [said, self._charge.answer]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if said.done():
                with contextlib.suppress(OSError):
                    self.head = said.result()
        finally:
            said.cancel()

    async def _refuse(self, decision: Decision) -> None:
        """Record it, then tell the guest: HTTP in words, everything else by a reset."""
        await self.record("denied", decision)
        if self.seen.protocol == "http" and not self.counters.bytes_in:
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(answer_403(self.conn, decision), 1.0)

    # -- allowed -----------------------------------------------------------------------------------------

    async def _open(self, decision: Decision, guard: Guard, head: bytes) -> None:
        if not self.decision_ns:
            self._decided()
        rule = self.cell.rules.find(decision.rule) if self.cell.has_budgets else None
        purse = purse_of(self.cell)
        denial = purse.spend(rule, Usage(connections=1))
        if denial is not None:
            await self._refuse(denial)
            return
        try:
            # Of what is read, each request is counted for its own grant.
            is_metered = rule is not None and rule.budget is not None and not self.is_inspected
            await self._carry(decision, guard, head, FlowMeter(purse, rule) if rule and is_metered else None)
        finally:
            purse.spend(rule, Usage(connections=-1))

    async def _carry(self, decision: Decision, guard: Guard, head: bytes, meter: Meter | None) -> None:
        try:
            await self.record("opened", decision)
        except NodeGoneError as error:
            log.warning("cell %s: flow refused: %s", self.cell.id, error)
            return
        self.cell.flows.add(self)
        final = decision
        try:
            refusal = self._refusal(self._judge())
            if refusal is not None:
                raise RefusedError(refusal)  # the rules changed while it was being recorded
            keep_alive(self.conn)
            if self.is_inspected:
                await inspect(self, self.seen, head)
            else:
                await self._vet()
                self._server = await self.connect()
                await relay(self.conn, self._server, guard, self.counters, head, meter)
            self._close_gently()
        except RefusedError as error:
            final = error.decision
            self.head = error.evidence or self.head
            await self._refuse(final)
        except OSError as error:
            reason = f"{decision.reason}; it ended with: {error.strerror or str(error) or 'timeout'}"
            final = Decision(verdict=decision.verdict, rule=decision.rule, reason=reason)
        except asyncio.CancelledError:
            if self._cut is None:
                self._cut = Decision(verdict=decision.verdict, rule=decision.rule, reason="the cell was closed")
            final = self._cut
            if final.verdict != "allow":
                await self.record("denied", final)
        finally:
            self.cell.flows.discard(self)
            with contextlib.suppress(NodeGoneError):
                await self.record("closed", final)

    def _close_gently(self) -> None:
        """Both directions have ended properly: no reset."""
        self.conn.close()
        if self._server is not None:
            self._server.close()
            self._server = None

    async def connect(self) -> socket.socket:
        """A connection to the server that the guest meant; non-blocking, the caller's to close.

        Raises:
            OSError: it cannot be had (TimeoutError: not within :data:`CONNECT_TIMEOUT_S`).
        """
        server = await connect_within(self.pinned.upstream, self.dst[1], CONNECT_TIMEOUT_S)
        keep_alive(server)
        return server

    # -- DNS over TCP ------------------------------------------------------------------------------------

    async def _serve_dns(self) -> None:
        """Answer queries, whichever server was meant. What is no DNS is refused as a flow."""
        self.head = await serve_dns(
            self.conn, lambda wire: self.cell.answer_query(wire, "tcp", self.peer, self.dst), SNIFF_TIMEOUT_S
        )
        if self.head:
            self._decided()
            self.seen = Sniffer().feed(self.head) or Sniffed("unknown")
            reason = "port 53 is answered by the gateway, and this is no DNS query"
            await self._refuse(Decision(verdict="deny", rule="protocol-mismatch", reason=reason))

    # -- recorded ----------------------------------------------------------------------------------------

    async def record(self, state: Literal["opened", "closed", "denied"], decision: Decision) -> None:
        """Append the flow's event and wait until it is written.

        Raises:
            NodeGoneError: it was not (for ``opened``: also when nobody can say whose it is).
        """
        charge = None if self._is_charged else self._charge
        if charge is not None:
            # The node fills in whose it is, and says so before it says that it is written.
            self._is_charged = True
            try:
                await self._append(state, decision, self.cell.owner, charge)
            except NodeGoneError as error:
                if state == "opened":
                    raise
                # A refusal or an end is recorded even so, for the cell as a whole.
                log.warning("cell %s: not attributed: %s", self.cell.id, error)
            else:
                return
        await self._append(state, decision, self._charge.known() or self.cell.owner, None)

    async def _append(
        self, state: Literal["opened", "closed", "denied"], decision: Decision, owner: Owner, charge: Charge | None
    ) -> None:
        names = self.pinned.names
        host = self.seen.server_name or next(iter(names), None)
        if host is not None and is_address(host):
            host = next(iter(names), None)  # `Host: 10.0.0.7` asks for no name
        protocol: Protocol = self.seen.protocol
        event = Flow(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=owner.scope,
            attribution=owner.attribution,
            state=state,
            flow=self.id,
            verdict=decision.verdict,
            rule=decision.rule,
            reason=decision.reason,
            dst_ip=self.dst[0],
            dst_port=self.dst[1],
            dst_host=host,
            protocol=protocol,
            bytes_out=self.counters.bytes_out,
            bytes_in=self.counters.bytes_in,
            process=owner.process,
            decision_ns=self.decision_ns or mono_ns() - self.accepted_ns,
            first_bytes=show(keep(self.head[:MAX_EVIDENCE_BYTES]), 4 * MAX_EVIDENCE_BYTES) if state == "denied" else "",
            socket_step=owner.socket_step,
            phase=self.cell.kit.phase,
            ja4=self.seen.ja4,
            alpn=list(self.seen.alpn),
            inspected=self.is_inspected,
        )
        await self.cell.node.append(self.cell.id, event, charge, soon=state == "closed")
        self.is_recorded = True
