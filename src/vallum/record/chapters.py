"""The parts of a run's story: run, episodes, steps, and what a step did. Data, with the sums over it.

Times are nanoseconds since the run's first record, unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vallum.core.events import (
    ContainmentAction,
    EpisodeEnded,
    EpisodeStarted,
    FileChanged,
    FilesCompared,
    FileWrite,
    Finding,
    PackageFetched,
    Process,
    RunEnded,
    RunStarted,
    SensorStatus,
    SnapshotMade,
    VerdictGiven,
)
from vallum.record.traffic import Entries, Span, Traffic

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
    output_sha256: str = ""
    source: str = "sdk"
    """``sdk`` or ``model``: see ``vallum.core.events.ToolCall``."""


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
    packages: list[PackageFetched] = field(default_factory=list)

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
    snapshots: list[SnapshotMade] = field(default_factory=list)
    changes: list[FileChanged] = field(default_factory=list)
    """Files that were found changed when somebody compared: of the steps that each of them names."""
    comparisons: list[FilesCompared] = field(default_factory=list)
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
