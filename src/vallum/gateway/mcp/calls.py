"""Calls of MCP tools at a cell's door: judged, perhaps held for a person, and recorded."""

from __future__ import annotations

import asyncio
import json

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import McpCall
from vallum.core.text import show
from vallum.core.verdict import Decision, Verdict
from vallum.gateway.cell import GatewayCell
from vallum.gateway.http.exchange import Exchange
from vallum.gateway.mcp.judging import Asked

MAX_ARGUMENTS = 8000


class CallRecord:
    """One request of a guest, from its judgement to its end in the record."""

    def __init__(self, exchange: Exchange, server: str, asked: Asked) -> None:
        self._exchange = exchange
        self._server = server
        self.asked = asked
        self._started_ns = mono_ns()
        self.is_error = False
        self.result_bytes = 0
        self.hidden = 0
        self.changed: list[str] = []

    async def settle(self, decision: Decision) -> Decision:
        """Ask a person where the verdict is ``hold``; the verdict then. The guest's leaving denies.

        Raises:
            NodeGoneError: nobody can be asked.
        """
        if decision.verdict != "hold":
            return decision
        carrier = self._exchange.carrier
        cell = carrier.cell
        subject = f"call {show(self.asked.subject, 120)} of {show(self._server)} with {self._arguments()[:400]}"
        asked = asyncio.ensure_future(
            cell.node.hold(
                cell.id, subject=subject, rule=decision.rule, flow=carrier.id, timeout_s=cell.kit.approval_timeout_s
            )
        )
        left = asyncio.ensure_future(self._exchange.left())
        try:
            await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return Decision(verdict="deny", rule=decision.rule, reason="the guest left before it was decided")
            given = asked.result()
        finally:
            asked.cancel()
            left.cancel()
        verdict: Verdict = "allow" if given.verdict == "allow" else "deny"
        return Decision(verdict=verdict, rule=decision.rule, reason=given.reason)

    async def write(self, decision: Decision) -> None:
        """Record how it was decided and what came of it.

        Raises:
            NodeGoneError: it was not recorded.
        """
        carrier = self._exchange.carrier
        owner = await carrier.owner()
        event = McpCall(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=owner.scope,
            attribution=owner.attribution,
            state="closed" if decision.verdict == "allow" else "denied",
            server=self._server,
            tool=self.asked.subject,
            method=self.asked.method,
            arguments=self._arguments(),
            verdict=decision.verdict,
            rule=decision.rule,
            reason=decision.reason,
            flow=carrier.id,
            is_error=self.is_error,
            result_bytes=self.result_bytes,
            duration_ns=mono_ns() - self._started_ns,
            hidden=self.hidden,
            changed=tuple(self.changed[:64]),
        )
        await carrier.cell.node.append(carrier.cell.id, event)

    def _arguments(self) -> str:
        if not self.asked.subject:
            return ""
        return redact(self._exchange.carrier.cell, json.dumps(self.asked.arguments))[:MAX_ARGUMENTS]


def redact(cell: GatewayCell, text: str) -> str:
    """Without secrets of credentials, nor canaries."""
    for name, value in [
        *((one.name, one.secret) for one in cell.kit.credentials),
        *((one.name, one.value) for one in cell.kit.canaries),
    ]:
        for form in {value.decode("latin-1"), value.decode("utf-8", "replace")}:
            for written in {form, json.dumps(form)[1:-1]}:
                if len(written) >= 4:
                    text = text.replace(written, f"[{name}]")
    return text
