"""A live cell as the node knows it: whose it is, which steps it has, what runs in it."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field
from typing import Protocol

from vallum.core import clock
from vallum.core.errors import InvalidInput, VallumError
from vallum.core.events import AnyEvent, StepClosed, StepOpened
from vallum.core.limits import Limits
from vallum.core.scope import BY_NODE, Attribution, Scope
from vallum.node.agents import AgentSteps
from vallum.node.recorder import RunBook
from vallum.sandbox.base import Cell, Child, Usage
from vallum.sandbox.traced import TracedCell

log = logging.getLogger(__name__)

MAX_TOOL_CALL_CHARS = 512
"""It is written into every event of the step."""


@dataclass
class Step:
    """An agent's step in a cell."""

    index: int
    tool_call: str | None
    opened_ns: int
    is_block: bool
    """Opened for several commands; closed by its opener."""
    exit_code: int | None = None
    is_open: bool = True
    ended_ns: int | None = None
    """When it was to be closed; the record says so a moment later."""


@dataclass
class Shell:
    """A persistent shell."""

    id: str
    child: Child
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One command at a time."""
    _is_let_go: bool = False

    def let_go(self) -> None:
        """Close our ends of its pipes. A guest may end its shells as often as it likes: none may leave anything here."""
        if self._is_let_go:
            return
        self._is_let_go = True
        for fd in (self.child.stdin, self.child.stdout, self.child.stderr, *self.child.extra):
            if fd is not None:
                os.close(fd)


RECENT_NS = 2_000_000_000
CLOSE_AFTER_S = 0.001
"""How long the record of a step's end may wait for a pause of the node."""


class StepWatcher(Protocol):
    """Told of steps, so that sensors look at the right moments."""

    def step_opened(self, live: LiveCell, step: int) -> None:
        """A step has begun."""
        ...

    def was_replaced(self, pid: int) -> bool:
        """Whether a process that was started as one program is another now."""
        ...

    def settled_execs_of(self, pid: int) -> int:
        """How many programs a process has executed since its fork, surely; 0 when nobody can say."""
        ...

    def step_closing(self, live: LiveCell, step: int) -> Usage:
        """A step is about to be closed; what it has used."""
        ...

    def last_sample(self, live: LiveCell, step: int, usage: Usage) -> AnyEvent | None:
        """What is to be recorded of a step's use at its end."""
        ...


class LiveCell:
    """One cell, its book and its steps. Not safe for threads; the node has one loop."""

    def __init__(
        self, cell: Cell, book: RunBook, episode: str, client: int, limits: Limits, watcher: StepWatcher
    ) -> None:
        self._watcher = watcher
        self.cell = cell
        self.traced: TracedCell | None = cell if isinstance(cell, TracedCell) else None
        """The cell, where it has a kernel of its own."""
        self.book = book
        self.episode = episode
        self.client = client
        self.limits = limits
        self._exits: dict[int, int] = {}
        """Step -> when the last of its processes ended; a few processes more cannot make it forgotten."""
        self.shells: dict[str, Shell] = {}
        self.residents: set[int] = set()
        """Processes of servers, which go from step to step (:meth:`vallum.node.commands.CommandRunner.enter_step`)."""
        self.steps: dict[int, Step] = {}
        self._due: list[Step] = []
        self._closing: asyncio.TimerHandle | None = None
        self.contained: str | None = None
        """Why containment ended it."""
        self.is_closing = False
        self.agents = AgentSteps(self)
        self.environ: dict[str, str] = {}
        """Of every command, unless the caller sets the variable himself: what is this cell's alone (the image's is shared)."""

    @property
    def id(self) -> str:
        """Id of the cell."""
        return self.cell.id

    def scope(self, step: int | None = None) -> Scope:
        """Scope of the episode, or of one of its steps."""
        tool_call = self.steps[step].tool_call if step in self.steps else None
        return Scope(run=self.book.run, episode=self.episode, step=step, tool_call=tool_call)

    def emit(self, event: AnyEvent) -> int:
        """Append to the run's ledger."""
        return self.book.emit(event)

    async def open_step(self, cause: str, tool_call: str | None, *, is_block: bool = False) -> Step:
        """Begin the next step; its record is written before anything runs in it. For a tool call that a client on the host
        was given through the model door, it is the step that was opened then."""
        found = self.agents.find_host_step(tool_call)
        if found is not None:
            return found
        step, opening = await self.begin_step(cause, tool_call, is_block=is_block)
        self.emit(opening)
        return step

    async def begin_step(self, cause: str, tool_call: str | None, *, is_block: bool) -> tuple[Step, AnyEvent]:
        """Make the next step, and the event that has to be recorded before anything runs in it."""
        if self._due:  # the node has time for it as soon as this step's command runs
            asyncio.get_running_loop().call_soon(self.close_due)
        if tool_call is not None and len(tool_call) > MAX_TOOL_CALL_CHARS:
            raise InvalidInput(
                f"a tool call id of {len(tool_call)} characters is too long: at most {MAX_TOOL_CALL_CHARS}"
            )
        step = Step(index=len(self.steps), tool_call=tool_call, opened_ns=clock.mono_ns(), is_block=is_block)
        self.steps[step.index] = step
        cgroup_id = await self.cell.open_step(step.index)
        self._watcher.step_opened(self, step.index)
        return step, StepOpened(
            t_ns=clock.wall_ns(),
            mono_ns=step.opened_ns,
            scope=self.scope(step.index),
            attribution=BY_NODE,
            cause=cause,
            cgroup_id=cgroup_id,
        )

    async def enter_step(self, index: int | None, cause: str, tool_call: str | None) -> tuple[Step, list[AnyEvent]]:
        """The open step ``index``, or a new one when it is None, and what the caller must record before it runs anything.

        Raises:
            InvalidInput: there is no such step, or it is closed.
        """
        if index is None:
            joined = self.agents.find_host_step(tool_call)
            if joined is not None:
                return joined, []
            step, opening = await self.begin_step(cause, tool_call, is_block=False)
            return step, [opening]
        found = self.steps.get(index)
        if found is None or not found.is_open:
            state = "is closed" if found else "does not exist"
            raise InvalidInput(f"step {index} of cell {self.id} {state}: open one with `async with sb.step()`")
        return found, []

    def close_step_soon(self, step: Step, after_s: float = CLOSE_AFTER_S) -> None:
        """End a step, and say so in the record a moment later: when its command has been answered, and the next one, if it
        comes within ``after_s``, has been started. Any other request finds it in the record (:meth:`close_due`)."""
        step.is_open = False
        step.ended_ns = clock.mono_ns()
        if not self._due:
            self._closing = asyncio.get_running_loop().call_later(after_s, self.close_due)
        self._due.append(step)

    def settle(self) -> None:
        """Close the steps that are to be closed soon, now.

        Raises:
            RecordError: it could not be recorded.
        """
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        while self._due:
            self.close_step(self._due.pop(0))

    def close_due(self) -> None:
        """:meth:`settle`, for those who cannot do anything about an error."""
        if not self._due:
            return
        try:
            self.settle()
        except VallumError as error:
            # The recorder has told the node, which ends the cell.
            log.error("a step of cell %s could not be closed in the record: %s", self.id, error)

    def close_step(self, step: Step) -> None:
        """End a step. What it left running stays charged to it."""
        step.is_open = False
        self.agents.close_ended()
        usage = self._watcher.step_closing(self, step.index)
        running = set(self.cell.pids(step.index) if usage.pids != 0 else ())
        running -= {shell.child.pid for shell in self.shells.values()}
        running -= self.residents
        running = {pid for pid in running if not self.agents.is_runtime(pid)}
        now = clock.mono_ns()
        counted = self.book.tally(self.episode).processes_by_step.get(step.index)
        last = self._watcher.last_sample(self, step.index, usage)
        closed = StepClosed(
            t_ns=clock.wall_ns(),
            mono_ns=now,
            scope=self.scope(step.index),
            attribution=BY_NODE,
            duration_ns=(step.ended_ns or now) - step.opened_ns,
            exit_code=step.exit_code,
            cpu_ns=usage.cpu_ns,
            memory_peak_bytes=usage.memory_peak_bytes,
            processes=counted,
            left_running=len(running),
        )
        self.book.emit_all([closed] if last is None else [last, closed])

    def note_exit(self, step: int | None) -> None:
        """A process of ``step`` has ended just now."""
        if step is not None:
            self._exits[step] = clock.mono_ns()

    def only_active_step(self, asked_ns: int) -> int | None:
        """The step that is open, has a living process or had one a moment before ``asked_ns``, when there is exactly one.

        Those that have just ended count, so that a daemon cannot send, end, and have the step pay that is open then.
        """
        since = asked_ns - RECENT_NS
        active = {step.index for step in self.steps.values() if step.is_open}
        active.update(step for step, at in self._exits.items() if at >= since)
        shells = {shell.child.pid for shell in self.shells.values()}
        steps = (self.step_of_pid(pid)[0] for pid in self.cell.pids() if pid not in shells)
        active.update(step for step in steps if step is not None)
        return next(iter(active)) if len(active) == 1 else None

    def was_replaced(self, shell: Shell) -> bool:
        """Whether another program has taken the place of the shell."""
        return self._watcher.was_replaced(shell.child.pid)

    def settled_execs_of(self, pid: int) -> int:
        """How many programs a process has executed since its fork, surely; 0 when nobody can say."""
        return self._watcher.settled_execs_of(pid)

    # ------------------------------------------------------------------ vallum.sensors.base.CellView

    def pids(self, step: int | None = None) -> list[int]:
        """Host pids charged to the step, or of the whole cell."""
        return self.cell.pids(step)

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """(step, method, confidence) of a process: its group, and what the node knows of the agents in the cell."""
        step, method, confidence = self.cell.step_of_pid(pid)
        return (step, method, confidence) if step is None else self.agents.judge(pid, step, method, confidence)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Step that a cgroup v2 id is charged to."""
        place = self.cell.step_of_cgroup(cgroup_id)
        return None if place is None else self.agents.step_of_place(place)

    async def kill_step(self, step: int, *, spare: Child | None = None) -> None:
        """Kill what is charged to ``step``, and where agents were started in it, their calls' steps too."""
        await self.cell.kill_step(step, spare=spare)
        for each in self.agents.steps_of(step):
            await self.cell.kill_step(each)

    def charge_pid(self, pid: int) -> tuple[Scope, Attribution]:
        """Scope of a host process of this cell."""
        step, method, confidence = self.step_of_pid(pid)
        if step is None:
            return self.scope(), Attribution(method="netns", confidence=0.5)
        return self.scope(step), self.agents.attribute(pid, method, confidence)
