"""Steps of an agent that runs inside its cell: opened by its model's replies, charged by the kernel.

Before a reply with tool calls reaches the agent (write-ahead), each call gets a step, and the *runtime*, the process that
holds the model connection, is put where what it starts next will be charged to:

* one call of it open: into that call's step. Children are born in the step's cgroup and stay there for ever, so a daemon
  that acts two steps later is charged to the call that started it.
* several open (parallel calls, sub-agents in one runtime): into a *pool*, a group of its own for exactly this set of
  calls. A direct child whose command line is the text of one of them (:mod:`vallum.node.calltext`) is put into that
  call's step with what it has started so far (method ``argv``, confidence 0.9, or 0.6 where the shell had become the
  program of the command before it was seen). Whoever is not told apart stays in the
  pool: charged to the agent's own step, with the calls as ``candidates`` and a confidence of one over their number.
* none open: back into its own step, the one it was started in.

What the runtime does itself is charged where it stands; its connections to the model door always to its own step.

Covered: a process born in a call's step is never taken for a runtime, whatever it says to the model: it cannot have
itself charged elsewhere. Only the first program of a direct child is compared, once, and only when what was read is surely
of it: what a child executes later counts for nothing. What the guest says of itself (headers, ids) is not looked at.
Not covered: while several calls are open, a child that was not told apart may make a direct child of the runtime
(CLONE_PARENT) that runs another call's text and is charged to that call; processes of one user may ptrace each other, the
runtime too; whoever continues the runtime's own conversation ends its steps early (what is started then is charged to the
agent's own step); what a runtime starts late, when the call it is for is over; tools inside the runtime's own process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from vallum.core import clock
from vallum.core.errors import CellGone, InvalidInput, SandboxError
from vallum.core.events import AnyEvent, ContainmentAction, ToolCall
from vallum.core.scope import BY_NODE, Attribution, Method
from vallum.gateway.names import service_at
from vallum.gateway.wire import CloseSteps, OpenSteps, ProposedCall, StopAgent
from vallum.node.arguments import shorten_json
from vallum.node.calltext import find_calls, find_commands, read_texts
from vallum.sensors import procfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from vallum.node.live import LiveCell, Step
    from vallum.sensors.attribution import Answer

log = logging.getLogger(__name__)

MAX_CALLS = 64
"""Tool calls of one reply."""
MAX_OPEN = 256
"""Steps of one cell that replies have opened and nobody has closed."""
MAX_ASKED = 4096
MAX_ID_CHARS = 256
MAX_NAME_CHARS = 256
BY_TEXT_CONFIDENCE = 0.9
BY_WORDS_CONFIDENCE = 0.6
_POOLS = 1 << 20
"""Pools are groups of the cell like steps are, numbered from here: no step gets that far."""


Asker = Literal["runtime", "nested", "host", "unknown"]
"""Who asked the model: an agent's runtime, a process that is charged to a call itself (and goes on being so), a client on
the host, or somebody in the cell of whom the kernel did not tell."""


@dataclass(eq=False)
class Runtime:
    """A process that asks the model."""

    pid: int
    start_ticks: int
    home: int
    """Its own step: where it was started."""
    place: int
    """Step or pool that it is in now."""


@dataclass(eq=False)
class OpenCall:
    """A tool call whose step is open."""

    step: Step
    branch: str
    asker: Asker
    runtime: Runtime | None
    """Of an asker that is ``runtime``."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """Where a runtime stands while several of its calls are open."""

    runtime: Runtime
    candidates: tuple[int, ...]


@dataclass
class AgentSteps:
    """The agents of one cell. Not safe for threads."""

    live: LiveCell
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _open: list[OpenCall] = field(default_factory=list)
    _runtimes: dict[int, Runtime] = field(default_factory=dict)
    _pools: dict[int, Pool] = field(default_factory=dict)
    _numbers: dict[tuple[int, int, tuple[int, ...]], int] = field(default_factory=dict)
    """Pools by runtime (pid, start) and candidates."""
    _by_text: dict[int, float] = field(default_factory=dict)
    """Steps that a child was put into, and how sure that is."""
    _proposed: set[int] = field(default_factory=set)
    """Steps that replies have opened."""
    _asked: dict[tuple[int, int], None] = field(default_factory=dict)
    """Children (pid, start) whose first command line was compared."""
    _homes: dict[int, int] = field(default_factory=dict)
    """Step of a call -> own step of the runtime that it is of."""

    # ------------------------------------------------------------------ asked by the gateway

    async def open_steps(self, frame: OpenSteps) -> tuple[int, ...]:
        """Open a step for each call, record them, place the runtime. See :class:`vallum.gateway.wire.OpenSteps`.

        Raises:
            InvalidInput: more calls than an agent may have.
            SandboxError, RecordError: it could not be done; none of the steps is open.
        """
        async with self._turn:
            self._check_count(frame)
            asker, runtime = self._recognise(frame)
            self._close([c for c in self._open if (c.branch, c.asker, c.runtime) == (frame.branch, asker, runtime)])
            opened = [await self._begin(frame, call, asker, runtime) for call in frame.calls]
            try:
                self.live.book.emit_all([event for _, events in opened for event in events])
                self._open += [call for call, _ in opened]
                if runtime is not None:
                    self._place(runtime)
            except BaseException:
                self._close([call for call, _ in opened])
                raise
            return tuple(call.step.index for call, _ in opened)

    async def close_steps(self, frame: CloseSteps) -> None:
        """The branch has gone on: its steps are over. What they left running stays charged to them."""
        async with self._turn:
            self._close([call for call in self._open if call.branch == frame.branch])

    async def stop(self, frame: StopAgent) -> None:
        """Freeze the cell and record it."""
        since_ns = clock.mono_ns()
        await self.live.cell.freeze()
        now = clock.mono_ns()
        self.live.emit(
            ContainmentAction(
                t_ns=clock.wall_ns(),
                mono_ns=now,
                scope=self.live.scope(),
                attribution=BY_NODE,
                action="freeze_cell",
                target=self.live.id,
                reason=frame.reason,
                latency_ns=now - since_ns,
            )
        )

    # ------------------------------------------------------------------ asked by the node

    def find_host_step(self, tool_call: str | None) -> Step | None:
        """The open step of a call that a client on the host was given by the model; None when there is none."""
        for call in self._open:
            if call.asker == "host" and tool_call is not None and call.step.tool_call == tool_call:
                return call.step
        return None

    def was_proposed(self, step: int) -> bool:
        """Whether a model's reply opened the step."""
        return step in self._proposed

    def steps_of(self, home: int) -> list[int]:
        """Every step and pool of runtimes that were started in step ``home``, for who ends that step by force."""
        pools = [number for number, pool in self._pools.items() if pool.runtime.home == home]
        return [*pools, *(step for step, its in self._homes.items() if its == home)]

    def close_ended(self) -> None:
        """Close the steps of runtimes that have ended."""
        living = {pid: self.is_runtime(pid) for pid in {c.runtime.pid for c in self._open if c.runtime is not None}}
        self._close([c for c in self._open if c.runtime is not None and not living[c.runtime.pid]])

    def close_all(self) -> None:
        """The cell is about to end: every step of a call is over."""
        self._close(list(self._open))

    @property
    def is_used(self) -> bool:
        """Whether a model's reply has opened a step in the cell."""
        return bool(self._proposed)

    def refine(self, answer: Answer, dst: str) -> Answer:
        """Whose a socket is, as found by its holders: a runtime's connection to the model door is charged to its own step;
        of a process that was not told apart the candidates are named."""
        scope, attribution, process, socket_step = answer
        if process is None:
            return answer
        home = self.home_of(process.pid)
        if home is not None and attribution.method != "socket" and service_at(dst) == "model":
            return self.live.scope(home), Attribution(method="cgroup", confidence=1.0), process, socket_step
        found = self.candidates_of(process.pid)
        if not found or home is not None:
            return answer
        return scope, msgspec.structs.replace(attribution, candidates=found), process, socket_step

    def is_runtime(self, pid: int) -> bool:
        """Whether the process asks the model for itself."""
        runtime = self._runtimes.get(pid)
        return runtime is not None and self._start_of(pid) == runtime.start_ticks

    def home_of(self, pid: int) -> int | None:
        """The own step of a runtime."""
        return self._runtimes[pid].home if self.is_runtime(pid) else None

    def judge(self, pid: int, place: int, method: str, confidence: float) -> tuple[int, str, float]:
        """Step of a process that stands in ``place`` (what :meth:`Cell.step_of_pid` says); tells children apart."""
        pool = self._pools.get(place)
        if pool is None:
            if place in self._by_text and not self.is_runtime(pid):
                return place, "argv", min(confidence, self._by_text[place])
            doubts = self._doubts(pid, place)
            return place, method, confidence / (1 + len(doubts))
        # By lineage a move counts by time for whoever lost his parents: there only runtimes are moved.
        step = self._tell_apart(pid, place, pool) if method == "cgroup" else None
        if step is not None:
            return step, "argv", min(confidence, self._by_text[step])
        return pool.runtime.home, method, confidence / len(pool.candidates)

    def step_of_place(self, place: int) -> int:
        """Step that a group of the cell is charged to."""
        pool = self._pools.get(place)
        return place if pool is None else pool.runtime.home

    def candidates_of(self, pid: int) -> tuple[int, ...]:
        """Calls that a process may belong to; empty when there is no doubt."""
        if not self._proposed:
            return ()
        place = self.live.cell.step_of_pid(pid)[0]
        if place is None:
            return ()
        pool = self._pools.get(place)
        return self._doubts(pid, place) if pool is None else pool.candidates

    def _doubts(self, pid: int, place: int) -> tuple[int, ...]:
        """Open calls whose runtime is not known: whoever is in no call's step may act for one of them."""
        if place in self._proposed or self.is_runtime(pid):
            return ()
        return tuple(call.step.index for call in self._open if call.asker == "unknown")

    def attribute(self, pid: int, method: str, confidence: float) -> Attribution:
        """An attribution that names the candidates, where there are any."""
        found = self.candidates_of(pid)
        if not found:
            return Attribution(method=cast(Method, method), confidence=confidence)
        return Attribution(method=cast(Method, method), confidence=confidence, candidates=found)

    # ------------------------------------------------------------------ inner workings

    def _check_count(self, frame: OpenSteps) -> None:
        if len(frame.calls) > MAX_CALLS or len(self._open) + len(frame.calls) > MAX_OPEN:
            raise InvalidInput(
                f"a reply with {len(frame.calls)} tool calls while {len(self._open)} are open is refused: "
                f"at most {MAX_CALLS} a reply and {MAX_OPEN} at once"
            )

    def _recognise(self, frame: OpenSteps) -> tuple[Asker, Runtime | None]:
        """Who asks. A process charged to a call, or that could not be told apart, is no runtime."""
        if frame.on_host:
            return "host", None
        pid = frame.pid
        start = self._start_of(pid) if pid is not None else None
        known = self._runtimes.get(pid) if pid is not None else None
        if known is not None and known.start_ticks == start:
            return "runtime", known
        home = self.live.cell.step_of_pid(pid)[0] if pid is not None else None
        if frame.step is not None and frame.step in self._proposed and (home is None or start is None):
            return "nested", None  # nobody was seen holding it, and a call's process made it
        if pid is None or start is None or home is None:
            living = [one for one in self._runtimes.values() if self.is_runtime(one.pid)]
            return ("runtime", living[0]) if len(living) == 1 else ("unknown", None)
        if home in self._pools or home in self._proposed:
            return "nested", None
        runtime = self._runtimes[pid] = Runtime(pid, start, home, home)
        return "runtime", runtime

    async def _begin(
        self, frame: OpenSteps, call: ProposedCall, asker: Asker, runtime: Runtime | None
    ) -> tuple[OpenCall, list[AnyEvent]]:
        live = self.live
        name = call.id if 0 < len(call.id) <= MAX_ID_CHARS else f"sha256:{sha256(call.id.encode()).hexdigest()}"
        step, opening = await live.begin_step("tool_call", name, is_block=asker == "host")
        self._proposed.add(step.index)
        if runtime is not None:
            self._homes[step.index] = runtime.home
        made = ToolCall(
            t_ns=clock.wall_ns(),
            mono_ns=clock.mono_ns(),
            scope=live.scope(step.index),
            attribution=BY_NODE,
            name=call.name[:MAX_NAME_CHARS],
            arguments=shorten_json(call.arguments),
            source="model",
            model_call=frame.model_call,
        )
        texts = read_texts(call.arguments) if runtime is not None else ()
        return OpenCall(step, frame.branch, asker, runtime, texts), [opening, made]

    def _close(self, calls: Sequence[OpenCall]) -> None:
        for call in calls:
            if call in self._open:
                self._open.remove(call)
        runtimes = {id(call.runtime): call.runtime for call in calls if call.runtime is not None}
        for runtime in runtimes.values():
            self._place(runtime)
        for call in calls:
            if call.step.is_open:
                self.live.close_step(call.step)

    def _place(self, runtime: Runtime) -> None:
        """Put the runtime where what it starts next is to be charged.

        Raises:
            SandboxError: the kernel refuses.
        """
        if self._start_of(runtime.pid) != runtime.start_ticks:
            self._forget(runtime)
            return
        wanted = tuple(sorted(call.step.index for call in self._open if call.runtime is runtime))
        if len(wanted) < 2:
            place = wanted[0] if wanted else runtime.home
        else:
            place = self._numbers.setdefault((runtime.pid, runtime.start_ticks, wanted), _POOLS + len(self._pools))
            self._pools[place] = Pool(runtime, wanted)
        if place == runtime.place:
            return
        try:
            self.live.cell.charge(runtime.pid, step=place)
        except (SandboxError, CellGone):
            if self._start_of(runtime.pid) == runtime.start_ticks:
                raise
            self._forget(runtime)
            return
        runtime.place = place

    def _forget(self, runtime: Runtime) -> None:
        if self._runtimes.get(runtime.pid) is runtime:
            del self._runtimes[runtime.pid]

    def _tell_apart(self, pid: int, place: int, pool: Pool) -> int | None:
        """The call whose text the child runs: it is put into that step, with what it has started. None: not known.

        Asked once, about the first program that the child runs, when the kernel tells of it: what it executes or writes over
        its arguments later is its own doing. A shell that is given one simple command becomes that program at once; where
        the shell was missed, the words of the command are compared, which is worth less: the child may have chosen them.
        """
        if self.live.traced is not None or self.is_runtime(pid):
            return None
        stat = procfs.read_stat(pid)
        if stat is None or stat.ppid != pool.runtime.pid or not self.is_runtime(stat.ppid):
            return None
        argv = procfs.read_argv(pid)
        execs = self.live.settled_execs_of(pid)
        if not argv or execs not in (1, 2) or (pid, stat.start_ticks) in self._asked:
            return None
        if len(self._asked) >= MAX_ASKED:
            self._asked = {one: None for one in self._asked if self._start_of(one[0]) == one[1]}
            if len(self._asked) >= MAX_ASKED:
                return None
        self._asked[pid, stat.start_ticks] = None
        texts = {c.step.index: c.texts for c in self._open if c.runtime is pool.runtime}
        find = find_calls if execs == 1 else find_commands
        fits = [step for step in find(argv, texts) if step in pool.candidates]
        if len(fits) != 1:
            return None
        step = fits[0]
        try:
            for each in self._family(pid, place):
                self.live.cell.charge(each, step=step)
        except SandboxError as error:
            log.info("cell %s: %s", self.live.id, error)  # it ended meanwhile
            return None
        confidence = BY_TEXT_CONFIDENCE if execs == 1 else BY_WORDS_CONFIDENCE
        self._by_text[step] = min(confidence, self._by_text.get(step, 1.0))
        return step

    def _family(self, pid: int, place: int) -> list[int]:
        """The process and its descendants in the pool, itself first: who is born after that is born in the step."""
        parents = {one: stat.ppid for one in self.live.cell.pids(place) if (stat := procfs.read_stat(one)) is not None}
        family = [pid]
        for parent in family:
            family += [one for one, its in parents.items() if its == parent and one not in family]
        return family

    def _start_of(self, pid: int) -> int | None:
        if self.live.traced is not None:
            return 0 if self.live.cell.step_of_pid(pid)[0] is not None else None
        stat = procfs.read_stat(pid)
        return stat.start_ticks if stat is not None and not (stat.is_dead and not procfs.is_alive(pid)) else None


class AgentKeeper:
    """``vallum.node.answers.StepKeeper``: finds the cell of a frame."""

    def __init__(self, find: Callable[[str], LiveCell | None]) -> None:
        self._find = find

    def _agents(self, cell: str) -> AgentSteps:
        live = self._find(cell)
        if live is None or live.is_closing:
            raise CellGone(f"cell {cell} has ended")
        return live.agents

    async def open_steps(self, frame: OpenSteps) -> tuple[int, ...]:
        """See :meth:`AgentSteps.open_steps`. Raises CellGone as well."""
        return await self._agents(frame.cell).open_steps(frame)

    async def close_steps(self, frame: CloseSteps) -> None:
        """See :meth:`AgentSteps.close_steps`. A cell that has ended is no error: its steps are over."""
        live = self._find(frame.cell)
        if live is not None and not live.is_closing:
            await live.agents.close_steps(frame)

    async def stop_agent(self, frame: StopAgent) -> None:
        """See :meth:`AgentSteps.stop`. Raises CellGone as well."""
        await self._agents(frame.cell).stop(frame)
