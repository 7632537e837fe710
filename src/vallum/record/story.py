"""What happened in a run, in the order and the unit a person asks for: episodes, their steps, what each step did.

A pure fold over records. ``show``, the HTML report and the summary of ``vallum run`` tell the same
story because they are given this one. Memory is bounded by the number of steps, not by what guests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vallum.core.events import (
    ContainmentAction,
    DnsQuery,
    EpisodeEnded,
    EpisodeStarted,
    Event,
    FileChanged,
    FilesCompared,
    FileWrite,
    Finding,
    Flow,
    HttpRequest,
    LedgerNote,
    McpCall,
    ModelCall,
    PackageFetched,
    PacketDropped,
    ProcessExited,
    ProcessStarted,
    Record,
    ResourceSample,
    RunEnded,
    RunStarted,
    SensorStatus,
    SnapshotMade,
    SshSession,
    StepClosed,
    StepOpened,
    ToolCall,
    ToolResult,
    VerdictGiven,
)
from vallum.record.calls import describe_call
from vallum.record.chapters import CommandStory, EpisodeStory, FindingStory, ProcessStory, RunStory, StepStory
from vallum.record.traffic import Refused, Span, Traffic, file_flow, file_packet, file_query, file_refusal

KEPT = 500
"""Processes, commands, files and the like of one step that are told one by one; all are counted."""


def fold(records: Iterable[Record]) -> RunStory:
    """Tell the story of a run from its records, given in their order."""
    teller = StoryTeller()
    for record in records:
        teller.take(record)
    return teller.story


class StoryTeller:
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
            HttpRequest: self._refusal,
            SshSession: self._refusal,
            ModelCall: self._refusal,
            McpCall: self._refusal,
            PackageFetched: self._package,
            DnsQuery: self._query,
            PacketDropped: self._packet,
            FileWrite: self._file,
            SnapshotMade: self._snapshot,
            FileChanged: self._change,
            FilesCompared: self._comparison,
            ResourceSample: self._sample,
            VerdictGiven: self._verdict,
            Finding: self._finding,
            ContainmentAction: self._action,
            SensorStatus: self._sensor,
            LedgerNote: self._note,
        }

    def take(self, record: Record) -> None:
        """Tell one record more; they come in their order."""
        event, story = record.event, self.story
        if story.records == 0:
            story.run, story.start_ns, self._mono_ns = event.scope.run, event.t_ns, event.mono_ns
        story.records += 1
        at_ns = self._since_start(event)
        story.end_ns = max(story.end_ns, at_ns)
        if (take := self._take.get(type(event))) is not None:
            take(record.id, event, at_ns)

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
        for command in step.commands:  # of calls that a model proposed nobody says how they ended
            if command.span.end_ns is None:
                command.span.end_ns = at_ns

    def _tool_call(self, number: int, event: ToolCall, at_ns: int) -> None:
        command = self._calls[number] = CommandStory(
            number, event.name, describe_call(event), Span(at_ns), source=event.source
        )
        commands = self._step(event, at_ns).commands
        if len(commands) < KEPT:
            commands.append(command)

    def _tool_result(self, number: int, event: ToolResult, at_ns: int) -> None:
        command = self._calls.pop(event.call, None)
        if command is not None:
            command.span.end_ns, command.exit_code, command.timed_out = at_ns, event.exit_code, event.timed_out
            command.error, command.output_bytes = event.error, event.output_bytes
            command.output_sha256 = event.output_sha256

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

    def _refusal(self, number: int, event: Refused, at_ns: int) -> None:
        if event.state == "denied":
            step = self._step(event, at_ns)
            file_refusal(step.entries, number, event, at_ns, is_late=_is_late(step, at_ns))

    def _package(self, number: int, event: PackageFetched, at_ns: int) -> None:
        packages = self._step(event, at_ns).packages
        if len(packages) < KEPT:
            packages.append(event)

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

    def _snapshot(self, number: int, event: SnapshotMade, at_ns: int) -> None:
        episode = self._episode(event, at_ns)
        if len(episode.snapshots) < KEPT:
            episode.snapshots.append(event)

    def _change(self, number: int, event: FileChanged, at_ns: int) -> None:
        changes = self._episode(event, at_ns).changes
        if len(changes) < KEPT:
            changes.append(event)

    def _comparison(self, number: int, event: FilesCompared, at_ns: int) -> None:
        comparisons = self._episode(event, at_ns).comparisons
        if len(comparisons) < KEPT:
            comparisons.append(event)

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
