"""Actions that wait for a person: asked for by the gateway, decided by a client of the node, denied when nobody does in time.

Covered: who decided is the kernel's word (peer credentials); a flood of one cell is denied without being asked, so that nobody
tires of looking; the request is on record before anybody sees it, and the decision before anything leaves. Not covered: every
process of the node's owner may decide; and a person who says yes without reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vallum.client import wire
from vallum.core import clock
from vallum.core.errors import CellGone, InvalidInput, VallumError
from vallum.core.events import ApprovalDecided, ApprovalRequested
from vallum.core.scope import Attribution, Scope
from vallum.core.text import show
from vallum.core.verdict import Decision, Verdict
from vallum.gateway.wire import Hold
from vallum.node.live import LiveCell
from vallum.node.questions import Questions
from vallum.rules.grants import Rule

MAX_PENDING = 16
"""Of one cell at once."""
MAX_A_MINUTE = 60
"""Requests of one cell that are put before a person."""
MAX_WHY_CHARS = 500
MAX_LIST_WAIT_S = 600.0
MAX_SUBJECT_CHARS = 1000
TOO_MANY = "too-many-holds"
"""The rule of what was denied because too much was waiting already."""


class RuleKeeper(Protocol):
    """Who knows the rules that hold, and can turn one into a grant."""

    def find_hold(self, live: LiveCell, rule: str) -> Rule | None:
        """The rule of that id, when it holds actions of the cell."""
        ...

    async def stop_asking(self, run: str, rule: Rule, cells: list[LiveCell]) -> None:
        """What the rule holds is granted in the run from now on."""
        ...


@dataclass
class Pending:
    """One held action."""

    info: wire.ApprovalInfo
    live: LiveCell
    scope: Scope
    attribution: Attribution
    rule: Rule | None
    asked_ns: int
    answer: asyncio.Future[tuple[Verdict, str, str]]
    """Verdict, who, why."""


@dataclass
class _Asked:
    """What one cell has asked for."""

    pending: int = 0
    recent: deque[int] = field(default_factory=deque)
    """When, in the last minute."""

    def may_ask(self, now_ns: int) -> bool:
        while self.recent and now_ns - self.recent[0] > 60_000_000_000:
            self.recent.popleft()
        return self.pending < MAX_PENDING and len(self.recent) < MAX_A_MINUTE


class Approvals:
    """What waits in this node. On one event loop."""

    def __init__(
        self,
        find: Callable[[str], LiveCell | None],
        cells: Callable[[], list[LiveCell]],
        questions: Questions,
        rules: RuleKeeper,
    ) -> None:
        self._find = find
        self._cells = cells
        self._questions = questions
        self._rules = rules
        self._pending: dict[str, Pending] = {}
        self._asked: dict[str, _Asked] = {}
        self._revision = 0
        self._changed = asyncio.Event()

    async def ask(self, hold: Hold) -> Decision:
        """Put it before a person and wait; cancelled when the guest has gone or the cell has ended.

        Raises:
            CellGone: there is no such cell.
            RecordError: it cannot be recorded; whoever asked denies.
        """
        live = self._find(hold.cell)
        if live is None or _is_ending(live):
            raise CellGone(f"cell {hold.cell} has ended")
        asked = self._asked.setdefault(live.id, _Asked())
        now = clock.mono_ns()
        if not asked.may_ask(now):
            reason = f"{show(hold.subject)}: this cell has had too much put before a person already ({MAX_PENDING} at once, {MAX_A_MINUTE} a minute)"
            return Decision(verdict="deny", rule=TOO_MANY, reason=reason)
        asked.recent.append(now)
        asked.pending += 1
        pending: Pending | None = None
        try:
            pending = await self._open(live, hold, now)
            verdict, who, why = await self._wait(pending)
        except asyncio.CancelledError:
            if pending is not None:
                by = "cell-closed" if _is_ending(live) else "guest-gone"
                self._record(pending, "deny", by, "nobody waits for it any more")
            raise
        finally:
            asked.pending -= 1
            if pending is not None:
                self._pending.pop(pending.info.id, None)
                self._announce()
            if not asked.pending and _is_ending(live):
                self._asked.pop(live.id, None)
        self._record(pending, verdict, who, why)
        said = f": {why}" if why else ""
        word = "allowed" if verdict == "allow" else "denied"
        reason = f"{show(hold.subject)} was {word} by {who}{show(said, MAX_WHY_CHARS)}"
        return Decision(verdict=verdict, rule=hold.rule, reason=reason)

    def end_cell(self, live: LiveCell) -> None:
        """Deny what waits in a cell that ends."""
        for pending in list(self._pending.values()):
            if pending.live is live:
                _settle(pending, "deny", "cell-closed", "")
        if live.id in self._asked and not self._asked[live.id].pending:
            del self._asked[live.id]

    async def list(self, request: wire.ListApprovals) -> wire.ApprovalPage:
        """What waits; returns when that is another than the client knows, or its time is up."""
        if request.seen == self._revision and request.wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(request.wait_s, MAX_LIST_WAIT_S))
        found = [one.info for one in self._pending.values() if request.sandbox in (None, one.live.id)]
        return wire.ApprovalPage(revision=self._revision, pending=found)

    async def decide(self, request: wire.Decide, who: str) -> wire.ApprovalInfo:
        """Decide one. With ``always`` its rule asks no more in this run, and what else of it waits is allowed too.

        Raises:
            InvalidInput: nothing of that id waits, or there is no rule that could stop asking.
        """
        pending = self._pending.get(request.approval)
        if pending is None or pending.answer.done():
            raise InvalidInput(
                f"nothing waits as {show(request.approval)!r}: it was decided, its time was up, or its cell has ended "
                "(`vallum approvals` lists what waits)"
            )
        why = request.why[:MAX_WHY_CHARS]
        if not request.always:
            _settle(pending, request.verdict, who, why)
            return pending.info
        rule = pending.rule
        if request.verdict != "allow" or rule is None:
            raise InvalidInput(
                f"rule {show(pending.info.rule)} cannot be told to stop asking: approve it once, without --always"
            )
        run = pending.live.book.run
        await self._rules.stop_asking(run, rule, [live for live in self._cells() if live.book.run == run])
        for other in list(self._pending.values()):
            if other.live.book.run == run and other.rule == rule:
                _settle(other, "allow", who, why or f"always, with {pending.info.id}")
        return pending.info

    async def _open(self, live: LiveCell, hold: Hold, now: int) -> Pending:
        scope, attribution = live.scope(), Attribution(method="netns")
        if hold.src is not None and hold.dst is not None:
            try:
                scope, attribution, _, _ = await self._questions.ask(
                    live.id, protocol="tcp", src=hold.src, dst=hold.dst
                )
            except (VallumError, OSError, LookupError, ValueError):
                attribution = Attribution(method="netns", confidence=0.5)  # asked all the same, charged to the episode
        timeout_s = hold.timeout_s
        rule = self._rules.find_hold(live, hold.rule)
        info = wire.ApprovalInfo(
            id=f"a{secrets.token_hex(4)}", sandbox=live.id, run=live.book.run, episode=live.episode, step=scope.step,
            subject=show(hold.subject, MAX_SUBJECT_CHARS), rule=hold.rule, flow=hold.flow, asked_ns=clock.wall_ns(),
            timeout_s=timeout_s, can_always=rule is not None,
        )  # fmt: skip
        answer: asyncio.Future[tuple[Verdict, str, str]] = asyncio.get_running_loop().create_future()
        pending = Pending(info, live, scope, attribution, rule, now, answer)
        live.emit(
            ApprovalRequested(
                t_ns=info.asked_ns, mono_ns=now, scope=scope, attribution=attribution, approval=info.id,
                subject=info.subject, rule=info.rule, flow=info.flow, timeout_s=timeout_s,
            )
        )  # fmt: skip
        self._pending[info.id] = pending
        self._announce()
        return pending

    async def _wait(self, pending: Pending) -> tuple[Verdict, str, str]:
        try:
            return await asyncio.wait_for(pending.answer, pending.info.timeout_s)
        except TimeoutError:
            return "deny", "timeout", f"nobody decided in {pending.info.timeout_s:g} s"

    def _record(self, pending: Pending, verdict: Verdict, who: str, why: str) -> None:
        now = clock.mono_ns()
        pending.live.emit(
            ApprovalDecided(
                t_ns=clock.wall_ns(), mono_ns=now, scope=pending.scope, attribution=pending.attribution,
                approval=pending.info.id, verdict=verdict, by=who, why=why, waited_ns=now - pending.asked_ns,
            )
        )  # fmt: skip

    def _announce(self) -> None:
        self._revision += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _is_ending(live: LiveCell) -> bool:
    return live.is_closing


def _settle(pending: Pending, verdict: Verdict, who: str, why: str) -> None:
    if not pending.answer.done():
        pending.answer.set_result((verdict, who, why))
