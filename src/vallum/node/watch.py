"""The sensors of the node's cells: which are on, what they are told, and what they may ask."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vallum.core.clock import mono_ns
from vallum.core.errors import ControlMissing, RecordError
from vallum.core.events import AnyEvent, Process, ProcessExited
from vallum.core.scope import Attribution, Scope
from vallum.node.live import LiveCell
from vallum.node.questions import Questions
from vallum.node.recorder import Recorder
from vallum.sandbox.base import Usage
from vallum.sensors.attribution import Answer, SocketAttributor
from vallum.sensors.gvisor_trace import GvisorTrace
from vallum.sensors.nflog import NflogReader
from vallum.sensors.proc_connector import ProcConnector
from vallum.sensors.proc_poll import ProcPoll
from vallum.sensors.resources import ResourceSampler
from vallum.sensors.socket_owner import Asked

log = logging.getLogger(__name__)


ONLY_STEP_CONFIDENCE = 0.8
"""Of charging what nobody owns any more to the only step of the cell that is open or has a living process."""


class Watch:
    """Every sensor of the node. The sensors' hooks (``vallum.sensors.base.Hooks``) are its methods."""

    def __init__(
        self, recorder: Recorder, find: Callable[[str], LiveCell | None], on_blind: Callable[[LiveCell, str], None]
    ) -> None:
        self._recorder = recorder
        self._find = find
        self._on_blind = on_blind
        self._connector: ProcConnector | None = None
        self._poll: ProcPoll | None = None
        self._sockets = SocketAttributor()
        self.questions = Questions(self._answer, self._sockets.rest_s)
        """What the gateway asks."""
        self._traced = GvisorTrace(self)
        self._resources = ResourceSampler(self)
        self._packets: dict[str, NflogReader] = {}
        self._by_scope: dict[tuple[str, str | None], LiveCell] = {}

    def start(self) -> dict[str, str]:
        """Turn on what this machine permits; says how good it is."""
        connector = ProcConnector(self)
        try:
            connector.start()
        except ControlMissing as error:
            self._poll = ProcPoll(self, str(error))
            return {
                "sensor.process": f"degraded: {error}; /proc is polled, and a process that lives less than 100 ms may be missed; run as root"
            }
        self._connector = connector
        return {"sensor.process": "enforced"}

    def stop(self) -> None:
        """Turn everything off."""
        for sensor in (self._connector, self._poll, self._resources):
            if sensor is not None:
                sensor.stop()
        for reader in self._packets.values():
            reader.stop()
        self._packets.clear()

    def add(self, live: LiveCell) -> None:
        """Watch a cell from before its first command."""
        cell, scope = live.cell, live.scope()
        self._by_scope[live.book.run, live.episode] = live
        traced = live.traced
        if traced is not None:
            traced.listen(self._traced.watch(cell.id, scope, lambda: traced.dropped))
        else:
            self._watch_host(live, scope)
        if cell.doors.packets is not None:
            reader = self._packets[cell.id] = NflogReader(self, cell.id, cell.doors.packets, scope, self)
            reader.start()
        self._resources.watch(cell.id, cell.usage, live.scope)
        cell.expect_command(len(live.steps))

    def _watch_host(self, live: LiveCell, scope: Scope) -> None:
        """A cell whose processes are the host kernel's: that one tells of them."""
        cell = live.cell
        self._sockets.watch(cell.id, live, root_pid=cell.pid, diag=cell.doors.diag, scope_of_step=live.scope)
        if self._connector is not None:
            self._connector.watch(cell.pid, cell.id, scope, is_new=True)
        if self._poll is not None:
            self._poll.watch(cell.pid, cell.id, scope, cell.pids)

    def _drain(self, live: LiveCell) -> None:
        """Take what a cell's own kernel has told so far."""
        if live.traced is not None:
            live.traced.drain()

    def remove(self, live: LiveCell) -> None:
        """Forget a cell, after taking what was still on its way."""
        self._drain(live)
        self._traced.unwatch(live.id)
        if self._connector is not None:
            self._connector.drain()
            self._connector.unwatch(live.id)
        if self._poll is not None:
            self._poll.unwatch(live.id)
        reader = self._packets.pop(live.id, None)
        if reader is not None:
            reader.stop()
        self._resources.unwatch(live.id)
        self._sockets.unwatch(live.id)
        self._by_scope.pop((live.book.run, live.episode), None)

    def step_opened(self, live: LiveCell, step: int) -> None:
        """A step has begun."""
        if self._poll is not None:
            self._poll.start_polling(live.id)
        self._resources.open_step(live.id, step)

    def was_replaced(self, pid: int) -> bool:
        """Whether a process that we started has executed another program since. False where the kernel does not tell
        (``/proc`` is polled): what could be read there instead, the guest can forge."""
        return self._connector is not None and self._connector.execs_of(pid) > 1

    def settled_execs_of(self, pid: int) -> int:
        """How many programs a process has executed; 0 when more may come at once, and where ``/proc`` is polled."""
        return 0 if self._connector is None else self._connector.settled_execs_of(pid)

    def step_closing(self, live: LiveCell, step: int) -> Usage:
        """A step is about to be closed: what it did is told before. What it has used."""
        self._drain(live)
        if self._connector is not None:
            self._connector.drain()
        if self._poll is not None:
            self._poll.stop_polling(live.id)
        reader = self._packets.get(live.id)
        if reader is not None:
            reader.settle()
        return live.cell.usage(step)

    def last_sample(self, live: LiveCell, step: int, usage: Usage) -> AnyEvent | None:
        """The last sample of a step; None when the cell is not sampled any more."""
        return self._resources.close_step(live.id, step, usage)

    # ------------------------------------------------------------------ asked by the gateway and the packet log

    def attribute(
        self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]
    ) -> tuple[Scope, Attribution, Process | None, int | None]:
        """``vallum.core.ports.Attributor``, at once: for the packet log. Where the cell has used up its share of the node's
        time, the processes are not looked through and the answer is less certain."""
        return self._answer(cell, [Asked(protocol, src, dst)], mono_ns())[0]

    def _answer(self, cell: str, asked: list[Asked], since_ns: int) -> list[Answer]:
        live = self._find(cell)
        if live is not None and live.agents.is_used and self._connector is not None:
            self._connector.drain()  # children that can be told apart are put into their steps first
        answers = self._look_up(cell, asked, since_ns)
        if live is None or not live.agents.is_used:
            return answers
        return [live.agents.refine(answer, one.dst[0]) for answer, one in zip(answers, asked, strict=True)]

    def _look_up(self, cell: str, asked: list[Asked], since_ns: int) -> list[Answer]:
        traced = self._find(cell) if self._traced.has(cell) else None
        if traced is not None:
            self._drain(traced)
            answers = [self._traced.attribute(cell, protocol=one.protocol, dst=one.dst) for one in asked]
        else:
            if self._poll is not None:
                self._poll.sweep(cell)
            answers = self._sockets.attribute_many(cell, asked)
        if self._connector is None or all(scope.step is not None for scope, *_ in answers):
            return answers
        live = self._find(cell)
        self._connector.drain()
        only = live.only_active_step(since_ns) if live is not None else None
        if live is None or only is None:
            return answers
        guess = live.scope(only), Attribution(method="netns", confidence=ONLY_STEP_CONFIDENCE)
        return [answer if answer[0].step is not None else (*guess, *answer[2:]) for answer in answers]

    # ------------------------------------------------------------------ hooks of the sensors

    def emit(self, event: AnyEvent) -> int:
        """Append to the ledger of the run.

        Raises:
            RecordError: it cannot be written, or the run has ended.
        """
        if isinstance(event, ProcessExited):
            live = self._by_scope.get((event.scope.run, event.scope.episode))
            if live is not None:
                live.note_exit(event.scope.step)
        return self._recorder.emit(event)

    def scope_of_pid(self, cell: str, pid: int) -> tuple[Scope, Attribution]:
        """Whose a host process is now."""
        live = self._find(cell)
        if live is None:
            raise RecordError(f"cell {cell} has ended")
        return live.charge_pid(pid)

    def record_failed(self, cell: str, error: RecordError) -> None:
        """A fact could not be written: the cell is ended, not watched on blindly."""
        live = self._find(cell)
        if live is not None:
            self._on_blind(live, f"stopped because its record cannot be written: {error}")
