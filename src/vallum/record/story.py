"""What happened in a run, in the order and the unit a person asks for: episodes, their steps, what each step did.

A pure fold over records. ``show``, the HTML report and the summary of ``vallum run`` tell the same
story because they are given this one. Memory is bounded by the number of steps, not by what guests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vallum.core.events import (
    ContainmentAction,
    DnsQuery,
    EpisodeEnded,
    EpisodeStarted,
    Event,
    FileWrite,
    Finding,
    Flow,
    LedgerNote,
    PacketDropped,
    Process,
    ProcessExited,
    ProcessStarted,
    Record,
    ResourceSample,
    RunEnded,
    RunStarted,
    SensorStatus,
    StepClosed,
    StepOpened,
    ToolCall,
    ToolResult,
    VerdictGiven,
)
from vallum.record.calls import describe_call
from vallum.record.traffic import Entries, Span, Traffic, file_flow, file_packet, file_query

KEPT = 500
"""Processes, commands, files and the like of one step that are told one by one; all are counted."""

_SEVERITIES = ("critical", "high", "medium", "low", "info")


@dataclass
class CommandStory:
    """A tool call and how it ended."""

    id: int
    name: str
    text: str
    """As one line of a shell."""
    span: Span
    exit_code: int | None = None
    timed_out: bool = False
    error: str = ""
    output_bytes: int | None = None


@dataclass
class ProcessStory:
    """A process. One that executed several programs in turn is one, under the name of the last."""

    process: Process
    ppid: int
    sensor: str
    span: Span
    before: list[str] = field(default_factory=list)
    """Programs that it was before."""
    exit_code: int | None = None
    signal: int | None = None


@dataclass
class StepStory:
    """One step; ``index`` None gathers what could be charged to the cell only."""

    index: int | None
    span: Span
    tool_call: str | None = None
    cause: str = ""
    is_closed: bool = False
    exit_code: int | None = None
    cpu_ns: int | None = None
    memory_peak_bytes: int | None = None
    left_running: int | None = None
    last_ns: int = 0
    """When the last thing charged to it happened, also after it closed."""
    commands: list[CommandStory] = field(default_factory=list)
    processes: list[ProcessStory] = field(default_factory=list)
    process_count: int = 0
    entries: Entries = field(default_factory=dict)
    findings: list[FindingStory] = field(default_factory=list)
    files: list[FileWrite] = field(default_factory=list)
    actions: list[ContainmentAction] = field(default_factory=list)
    verdicts: list[VerdictGiven] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``step 3``, or that no step is known."""
        return f"step {self.index}" if self.index is not None else "no step known"

    @property
    def text(self) -> str:
        """What the step was, in a line."""
        if self.commands:
            return self.commands[0].text + (f"  (+{len(self.commands) - 1} more)" if len(self.commands) > 1 else "")
        return self.cause

    @property
    def denied(self) -> list[Traffic]:
        """Refused attempts, in the order of the first of each."""
        return [entry for entry in self.entries.values() if entry.is_denied]

    @property
    def denied_count(self) -> int:
        """How many attempts were refused."""
        return sum(entry.count for entry in self.denied)

    @property
    def allowed(self) -> list[Traffic]:
        """Connections that were permitted."""
        return [entry for entry in self.entries.values() if not entry.is_denied and entry.kind == "flow"]

    @property
    def queries(self) -> list[Traffic]:
        """DNS queries, refused and answered."""
        return [entry for entry in self.entries.values() if entry.kind == "dns"]


@dataclass
class FindingStory:
    """A finding with its number in the ledger and when it was made."""

    id: int
    at_ns: int
    event: Finding


@dataclass
class EpisodeStory:
    """The life of one cell."""

    id: str
    span: Span
    started: EpisodeStarted | None = None
    ended: EpisodeEnded | None = None
    steps: dict[int | None, StepStory] = field(default_factory=dict)
    cpu_ns: int | None = None
    memory_peak_bytes: int | None = None

    @property
    def told_steps(self) -> list[StepStory]:
        """Steps in order; what has no step comes last."""
        return sorted(self.steps.values(), key=lambda step: (step.index is None, step.index or 0))


@dataclass
class Totals:
    """The run in numbers."""

    episodes: int = 0
    steps: int = 0
    commands: int = 0
    processes: int = 0
    denied: int = 0
    denied_bytes_out: int = 0
    """Payload of refused attempts that left all the same: 0 when the walls held."""
    late_denied: int = 0
    """Refused attempts by what an earlier step had left running."""
    denied_by_rule: dict[str, int] = field(default_factory=dict)
    allowed: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    queries: int = 0
    findings: dict[str, int] = field(default_factory=dict)
    """By severity, the worst first."""
    decision_ns: int | None = None
    """Median time from an attempt to its refusal."""
    slowest_ns: int | None = None
    cpu_ns: int | None = None
    memory_peak_bytes: int | None = None


@dataclass
class RunStory:
    """The whole run."""

    run: str = ""
    start_ns: int = 0
    """Wall clock of the first record."""
    end_ns: int = 0
    """Nanoseconds from the first record to the last."""
    records: int = 0
    started: RunStarted | None = None
    ended: RunEnded | None = None
    episodes: dict[str, EpisodeStory] = field(default_factory=dict)
    findings: list[FindingStory] = field(default_factory=list)
    sensors: list[tuple[int, SensorStatus]] = field(default_factory=list)
    actions: list[ContainmentAction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[tuple[EpisodeStory, StepStory]]:
        """Every step of every episode, in order."""
        return [(episode, step) for episode in self.episodes.values() for step in episode.told_steps]

    def count(self) -> Totals:
        """Add everything up."""
        totals = Totals(episodes=len(self.episodes))
        decisions: list[int] = []
        for _, step in self.steps:
            totals.steps += step.index is not None
            totals.commands += len(step.commands)
            totals.processes += step.process_count
            for entry in step.entries.values():
                if entry.is_denied:
                    totals.denied += entry.count
                    totals.denied_bytes_out += entry.bytes_out
                    totals.late_denied += entry.late
                    totals.denied_by_rule[entry.rule] = totals.denied_by_rule.get(entry.rule, 0) + entry.count
                    decisions += entry.decisions_ns
                elif entry.kind == "flow":
                    totals.allowed += entry.count
                totals.bytes_out += entry.bytes_out
                totals.bytes_in += entry.bytes_in
                totals.queries += entry.count if entry.kind == "dns" else 0
        for severity in _SEVERITIES:
            if number := sum(finding.event.severity == severity for finding in self.findings):
                totals.findings[severity] = number
        if decisions:
            totals.decision_ns, totals.slowest_ns = sorted(decisions)[len(decisions) // 2], max(decisions)
        used = [_used(episode) for episode in self.episodes.values()]
        totals.cpu_ns = _total([cpu for cpu, _ in used])
        totals.memory_peak_bytes = max((peak for _, peak in used if peak is not None), default=None)
        return totals


def _used(episode: EpisodeStory) -> tuple[int | None, int | None]:
    """CPU time and peak of memory: the cell's own account, or the steps' where that says more."""
    cpu = _total([step.cpu_ns for step in episode.steps.values()])
    peaks = [step.memory_peak_bytes for step in episode.steps.values()] + [episode.memory_peak_bytes]
    return (
        max((value for value in (cpu, episode.cpu_ns) if value is not None), default=None),
        max((peak for peak in peaks if peak is not None), default=None),
    )


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def fold(records: Iterable[Record]) -> RunStory:
    """Tell the story of a run from its records, given in their order."""
    teller = _Teller()
    for record in records:
        teller.take(record)
    return teller.story


class _Teller:
    """The state of the fold: the story so far, and what is not over yet."""

    def __init__(self) -> None:
        self.story = RunStory()
        self._mono_ns = 0
        self._calls: dict[int, CommandStory] = {}
        self._live: dict[int, ProcessStory] = {}
        self._flows: dict[str, tuple[Traffic, Span]] = {}
        self._take: dict[type[Event], Callable[[int, Any, int], None]] = {
            RunStarted: self._run_started,
            RunEnded: self._run_ended,
            EpisodeStarted: self._episode_started,
            EpisodeEnded: self._episode_ended,
            StepOpened: self._step_opened,
            StepClosed: self._step_closed,
            ToolCall: self._tool_call,
            ToolResult: self._tool_result,
            ProcessStarted: self._process_started,
            ProcessExited: self._process_exited,
            Flow: self._flow,
            DnsQuery: self._query,
            PacketDropped: self._packet,
            FileWrite: self._file,
            ResourceSample: self._sample,
            VerdictGiven: self._verdict,
            Finding: self._finding,
            ContainmentAction: self._action,
            SensorStatus: self._sensor,
            LedgerNote: self._note,
        }

    def take(self, record: Record) -> None:
        event, story = record.event, self.story
        if story.records == 0:
            story.run, story.start_ns, self._mono_ns = event.scope.run, event.t_ns, event.mono_ns
        story.records += 1
        at_ns = self._since_start(event)
        story.end_ns = max(story.end_ns, at_ns)
        self._take[type(event)](record.id, event, at_ns)

    def _since_start(self, event: Event) -> int:
        """The monotonic clock is the truth within one boot; after a resume on another boot the wall clock has to do."""
        mono, wall = event.mono_ns - self._mono_ns, event.t_ns - self.story.start_ns
        return max(0, mono if abs(mono - wall) < 3600 * 10**9 else wall)

    def _episode(self, event: Event, at_ns: int) -> EpisodeStory:
        name = event.scope.episode or ""
        episode = self.story.episodes.get(name)
        if episode is None:
            episode = self.story.episodes[name] = EpisodeStory(name, Span(at_ns))
        return episode

    def _step(self, event: Event, at_ns: int) -> StepStory:
        episode = self._episode(event, at_ns)
        step = episode.steps.get(event.scope.step)
        if step is None:
            step = episode.steps[event.scope.step] = StepStory(event.scope.step, Span(at_ns))
        step.last_ns = max(step.last_ns, at_ns)
        step.tool_call = step.tool_call or event.scope.tool_call
        return step

    def _run_started(self, number: int, event: RunStarted, at_ns: int) -> None:
        self.story.started = self.story.started or event
        self.story.ended = None

    def _run_ended(self, number: int, event: RunEnded, at_ns: int) -> None:
        self.story.ended = event

    def _episode_started(self, number: int, event: EpisodeStarted, at_ns: int) -> None:
        self._episode(event, at_ns).started = event

    def _episode_ended(self, number: int, event: EpisodeEnded, at_ns: int) -> None:
        episode = self._episode(event, at_ns)
        episode.ended, episode.span.end_ns = event, at_ns

    def _step_opened(self, number: int, event: StepOpened, at_ns: int) -> None:
        step = self._step(event, at_ns)
        step.cause, step.span.start_ns = event.cause, min(at_ns, step.span.start_ns)

    def _step_closed(self, number: int, event: StepClosed, at_ns: int) -> None:
        step = self._step(event, at_ns)
        step.is_closed, step.span.end_ns, step.exit_code = True, at_ns, event.exit_code
        step.left_running = event.left_running
        step.process_count = max(step.process_count, event.processes or 0)
        self._use(step, event.cpu_ns, event.memory_peak_bytes)

    def _tool_call(self, number: int, event: ToolCall, at_ns: int) -> None:
        command = self._calls[number] = CommandStory(number, event.name, describe_call(event), Span(at_ns))
        commands = self._step(event, at_ns).commands
        if len(commands) < KEPT:
            commands.append(command)

    def _tool_result(self, number: int, event: ToolResult, at_ns: int) -> None:
        command = self._calls.pop(event.call, None)
        if command is not None:
            command.span.end_ns, command.exit_code, command.timed_out = at_ns, event.exit_code, event.timed_out
            command.error, command.output_bytes = event.error, event.output_bytes

    def _process_started(self, number: int, event: ProcessStarted, at_ns: int) -> None:
        step, before = self._step(event, at_ns), self._live.get(event.process.pid)
        step.process_count += 1
        if before is not None and before.span.end_ns is None and before.ppid == event.ppid:
            step.process_count -= 1
            if len(before.before) < KEPT:
                before.before.append(" ".join(before.process.argv) or before.process.exe)
            before.process = event.process
            return
        process = self._live[event.process.pid] = ProcessStory(event.process, event.ppid, event.sensor, Span(at_ns))
        if len(step.processes) < KEPT:
            step.processes.append(process)

    def _process_exited(self, number: int, event: ProcessExited, at_ns: int) -> None:
        process = self._live.pop(event.pid, None)
        if process is not None:
            process.span.end_ns, process.exit_code, process.signal = at_ns, event.exit_code, event.signal

    def _flow(self, number: int, event: Flow, at_ns: int) -> None:
        step = self._step(event, at_ns)
        known = self._flows.pop(event.flow, None) if event.state == "closed" else None
        if known is None:
            entry, span = file_flow(step.entries, number, event, at_ns, is_late=_is_late(step, at_ns))
            if event.state == "opened":
                self._flows[event.flow] = entry, span
        else:
            entry, span = known
        if event.state != "opened":
            span.end_ns = at_ns
            entry.bytes_out += event.bytes_out
            entry.bytes_in += event.bytes_in

    def _query(self, number: int, event: DnsQuery, at_ns: int) -> None:
        step = self._step(event, at_ns)
        file_query(step.entries, number, event, at_ns, is_late=_is_late(step, at_ns))

    def _packet(self, number: int, event: PacketDropped, at_ns: int) -> None:
        step = self._step(event, at_ns)
        file_packet(step.entries, number, event, at_ns, is_late=_is_late(step, at_ns))

    def _file(self, number: int, event: FileWrite, at_ns: int) -> None:
        files = self._step(event, at_ns).files
        if len(files) < KEPT:
            files.append(event)

    def _sample(self, number: int, event: ResourceSample, at_ns: int) -> None:
        episode = self._episode(event, at_ns)
        # A sample is nothing the step did, so it makes no step and does not lengthen one.
        self._use(
            episode.steps.get(event.scope.step) if event.scope.step is not None else episode,
            event.cpu_ns,
            event.memory_peak_bytes,
        )

    def _use(self, of: StepStory | EpisodeStory | None, cpu_ns: int | None, memory_peak_bytes: int | None) -> None:
        if of is None:
            return
        if cpu_ns is not None:
            of.cpu_ns = max(of.cpu_ns or 0, cpu_ns)
        if memory_peak_bytes is not None:
            of.memory_peak_bytes = max(of.memory_peak_bytes or 0, memory_peak_bytes)

    def _verdict(self, number: int, event: VerdictGiven, at_ns: int) -> None:
        verdicts = self._step(event, at_ns).verdicts
        if len(verdicts) < KEPT:
            verdicts.append(event)

    def _finding(self, number: int, event: Finding, at_ns: int) -> None:
        finding = FindingStory(number, at_ns, event)
        self.story.findings.append(finding)
        self._step(event, at_ns).findings.append(finding)

    def _action(self, number: int, event: ContainmentAction, at_ns: int) -> None:
        self.story.actions.append(event)
        self._step(event, at_ns).actions.append(event)

    def _sensor(self, number: int, event: SensorStatus, at_ns: int) -> None:
        if len(self.story.sensors) < KEPT:
            self.story.sensors.append((at_ns, event))

    def _note(self, number: int, event: LedgerNote, at_ns: int) -> None:
        self.story.notes.append(event.note)


def _is_late(step: StepStory, at_ns: int) -> bool:
    return step.is_closed and step.span.end_ns is not None and at_ns > step.span.end_ns
