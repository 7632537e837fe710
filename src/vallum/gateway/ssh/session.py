"""One exec, shell or subsystem of a guest: judged, held, recorded, carried to the server, its end recorded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import asyncssh
import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import SshSession
from vallum.core.text import show
from vallum.core.verdict import Decision, fail_closed
from vallum.gateway.cell import NodeGoneError, Owner
from vallum.gateway.http.canaries import CanaryScanner, FoundError, scan_head
from vallum.gateway.http1 import RefusedError
from vallum.gateway.spending import FlowMeter, purse_of
from vallum.gateway.stream import PIECE
from vallum.rules.grants import Rule
from vallum.rules.sessions import SessionFacts, read_session
from vallum.rules.verdicts import judge_session

if TYPE_CHECKING:
    from vallum.gateway.ssh.door import SshDoor

MAX_COMMAND = 2000
_ENVIRON = re.compile(r"LANG|LC_[A-Z]{1,20}|GIT_PROTOCOL")
_VALUE = re.compile(r"[A-Za-z0-9_.:=@-]{0,100}")
REFUSED_STATUS = 126

log = logging.getLogger(__name__)


def choose_environ(wanted: Mapping[str, str]) -> dict[str, str]:
    """The variables that a guest may set at the server: language, and the version of git's protocol. Pure."""
    return {name: text for name, text in wanted.items() if _ENVIRON.fullmatch(name) and _VALUE.fullmatch(text)}


class GuestSession:
    """See the module."""

    def __init__(self, door: SshDoor, process: asyncssh.SSHServerProcess[bytes], *, is_full: bool) -> None:
        """``is_full``: the connection has too many sessions already."""
        self._door = door
        self._flow = door.flow
        self._process = process
        self._is_full = is_full
        self._id = secrets.token_hex(6)
        self._facts: SessionFacts = read_session(
            process.command, process.subsystem, terminal=process.term_type is not None
        )
        self._owner: Owner | None = None
        self._approved = ""
        self._credential = ""
        self._bytes_out = self._bytes_in = 0
        self._status: int | None = None
        self._carrying: asyncio.Task[None] | None = None
        self._cut: Decision | None = None

    async def serve(self) -> None:
        """From the verdict to the last byte. Whatever fails, the server hears nothing more."""
        try:
            await self._serve()
        except NodeGoneError as error:
            log.warning("cell %s: SSH session refused: %s", self._flow.cell.id, error)
            self._tell(fail_closed("the node did not answer, so SSH"))
        except (OSError, asyncssh.Error) as error:
            self._tell(Decision(verdict="deny", rule="upstream", reason=str(error) or type(error).__name__))
        except Exception:  # whatever failed, nothing more of it may leave
            log.exception("cell %s: an SSH session failed", self._flow.cell.id)
            self._tell(fail_closed("the SSH session"))

    async def _serve(self) -> None:
        self._owner = await self._flow.owner()
        decision = self._judge()
        if decision.verdict == "hold":
            decision = await self._hold(decision)
        if decision.verdict != "allow":
            await self._record("denied", decision)
            self._tell(decision)
            return
        rule = self._flow.cell.rules.find(decision.rule)
        if rule is None:
            raise LookupError(f"an SSH session was allowed by {decision.rule}, which is no rule")
        self._credential = rule.credential
        await self._record("opened", decision)
        self._carrying = asyncio.ensure_future(self._carry(rule))
        self._flow.cell.flows.add(self)
        try:
            self.rejudge()  # the rules may have changed while it was being recorded
            await asyncio.wait({self._carrying})
            decision = await self._conclude(decision)
        finally:
            self._flow.cell.flows.discard(self)
            self._carrying.cancel()
            self._door.note(self._close(self._carrying, decision))

    def rejudge(self) -> bool:
        """As :meth:`vallum.gateway.cell.CutFlow.rejudge`."""
        decision = self._judge()
        if decision.verdict == "allow" or self._cut is not None or self._carrying is None:
            return False
        self._cut = Decision(verdict="deny", rule=decision.rule, reason=decision.reason)
        self._carrying.cancel()
        return True

    def _judge(self) -> Decision:
        if self._is_full:
            return Decision(verdict="deny", rule="budget", reason="too many SSH sessions at once on one connection")
        facts = self._flow.facts
        if self._approved:
            facts = msgspec.structs.replace(facts, approved=(*facts.approved, self._approved))
        cell = self._flow.cell
        return judge_session(cell.rules, facts, self._facts, cell.asker(self._owner))

    async def _hold(self, decision: Decision) -> Decision:
        cell = self._flow.cell
        asked = asyncio.ensure_future(
            cell.node.hold(
                cell.id,
                subject=f"SSH {self._facts.describe()}: {decision.reason}",
                rule=decision.rule,
                flow=self._flow.id,
                timeout_s=cell.kit.approval_timeout_s,
            )
        )
        left = asyncio.ensure_future(self._process.channel.wait_closed())
        try:
            await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                reason = f"{decision.reason}; the guest left before it was decided"
                return Decision(verdict="deny", rule=decision.rule, reason=reason)
            given = asked.result()
        finally:
            asked.cancel()
            left.cancel()
        if given.verdict != "allow":
            return Decision(verdict="deny", rule=decision.rule, reason=given.reason)
        self._approved = decision.rule
        return self._judge()

    async def _conclude(self, decision: Decision) -> Decision:
        """What the record says of how it ended; tells the guest."""
        carrying = self._carrying
        assert carrying is not None
        error = None if carrying.cancelled() else carrying.exception()
        refusal = self._cut
        if isinstance(error, RefusedError | FoundError):
            refusal = error.decision
        if refusal is not None:
            await self._record("denied", refusal)
            self._tell(refusal)
            return refusal
        if error is None:
            return decision
        why = str(error) or type(error).__name__
        if not isinstance(error, OSError | asyncssh.Error):
            log.error("cell %s: an SSH session failed", self._flow.cell.id, exc_info=error)
            why = "an error of the gateway"
        self._tell(Decision(verdict="deny", rule="upstream", reason=why))
        return Decision(verdict="allow", rule=decision.rule, reason=f"{decision.reason}; it ended with: {show(why)}")

    def _tell(self, decision: Decision) -> None:
        """Tell the guest why, and end."""
        with contextlib.suppress(OSError, asyncssh.Error):
            if not self._process.is_closing():
                self._process.stderr.write(
                    f"vallum: blocked by rule {decision.rule}: {show(decision.reason, 400)}\n".encode()
                )
                self._process.exit(REFUSED_STATUS)

    # -- carried -----------------------------------------------------------------------------------------

    async def _carry(self, rule: Rule) -> None:
        process, facts = self._process, self._facts
        environ = choose_environ({str(name): str(value) for name, value in process.env.items()})
        canaries = self._flow.cell.kit.canaries
        said = (facts.command, self._door.user, process.term_type or "", *environ.values())
        scan_head(canaries, (text.encode() for text in said))
        meter = FlowMeter(purse_of(self._flow.cell), rule) if rule.budget is not None else None
        upstream = await self._door.upstream(rule)
        has_terminal = facts.terminal and facts.kind in {"shell", "exec"}
        remote: asyncssh.SSHClientProcess[bytes] = await upstream.create_process(
            command=facts.command if facts.kind in {"exec", "git-read", "git-write"} else None,
            subsystem=facts.command if facts.kind == "sftp" else None,
            env=environ,
            request_pty="force" if has_terminal else False,
            term_type=process.term_type if has_terminal else None,
            term_size=process.term_size if has_terminal else None,
            encoding=None,
        )
        inward = [
            asyncio.ensure_future(self._carry_in(remote.stdout, process.stdout, meter)),
            asyncio.ensure_future(self._carry_in(remote.stderr, process.stderr, meter)),
        ]
        outward = asyncio.ensure_future(self._carry_out(remote, CanaryScanner(canaries), meter))
        ended = asyncio.ensure_future(_all(inward))
        try:
            # A server that has ended needs no more of the guest; a guest that has broken off needs no more of the server.
            await asyncio.wait({outward, ended}, return_when=asyncio.FIRST_COMPLETED)
            if outward.done():
                outward.result()
            await ended
            await remote.wait_closed()
            self._finish(remote)
        finally:
            for task in (outward, ended, *inward):
                task.cancel()
            remote.close()
            await asyncio.gather(outward, ended, *inward, return_exceptions=True)

    def _finish(self, remote: asyncssh.SSHClientProcess[bytes]) -> None:
        self._status = remote.exit_status
        if remote.exit_signal is not None:
            name, dumped, text, lang = remote.exit_signal
            self._process.exit_with_signal(name, dumped, text, lang)
        else:
            self._process.exit(remote.exit_status if remote.exit_status is not None else 255)

    async def _carry_out(
        self, remote: asyncssh.SSHClientProcess[bytes], scanner: CanaryScanner, meter: FlowMeter | None
    ) -> None:
        async def send(ready: bytes) -> None:
            if not ready:
                return
            if meter is not None:
                meter.spend(bytes_out=len(ready))
            remote.stdin.write(ready)
            self._bytes_out += len(ready)
            self._flow.counters.count_out(len(ready))
            await remote.stdin.drain()

        while True:
            try:
                data = await self._process.stdin.read(PIECE)
            except asyncssh.TerminalSizeChanged as change:
                remote.change_terminal_size(*change.term_size)
                continue
            except asyncssh.SignalReceived as signal:
                remote.send_signal(signal.signal)
                continue
            except asyncssh.BreakReceived as pause:
                remote.send_break(pause.msec)
                continue
            if not data:
                break
            await send(scanner.feed(data))
        await send(scanner.finish())
        remote.stdin.write_eof()

    async def _carry_in(
        self, source: asyncssh.SSHReader[bytes], sink: asyncssh.SSHWriter[bytes], meter: FlowMeter | None
    ) -> None:
        while data := await source.read(PIECE):
            if meter is not None:
                meter.spend(bytes_in=len(data))
            sink.write(data)
            self._bytes_in += len(data)
            self._flow.counters.count_in(len(data))
            await sink.drain()

    async def _close(self, carrying: asyncio.Task[None], decision: Decision) -> None:
        """Record the end once nothing more can be sent. Raises NodeGoneError."""
        await asyncio.wait({carrying})
        await self._record("closed", decision)

    async def _record(self, state: Literal["opened", "closed", "denied"], decision: Decision) -> None:
        """Append ``ssh.session`` and wait until it is written. Raises NodeGoneError."""
        assert self._owner is not None
        cell, names = self._flow.cell, self._flow.facts.names
        event = SshSession(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=self._owner.scope,
            attribution=self._owner.attribution,
            state=state,
            flow=self._flow.id,
            session=self._id,
            verdict=decision.verdict,
            rule=decision.rule,
            reason=decision.reason,
            host=names[0].name if names else self._flow.facts.dst_ip,
            port=self._flow.dst[1],
            user=show(self._door.user, 100),
            wants=self._facts.kind,
            command=show(self._facts.command, MAX_COMMAND),
            terminal=self._facts.terminal,
            exit_status=self._status,
            bytes_out=self._bytes_out,
            bytes_in=self._bytes_in,
            credential=self._credential,
            phase=cell.kit.phase,
        )
        await cell.node.append(cell.id, event, None, soon=state == "closed")


async def _all(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        await task
