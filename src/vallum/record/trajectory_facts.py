"""What is charged to each step of a cell, summed up for trajectories. Pure.

Counts come from the story of the run (``record.story``), which is bounded whatever a guest does; what the story does not
keep (confidence, approvals, packages) is folded here, bounded as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vallum.core.events import ApprovalDecided, ApprovalRequested, Event, FileChanged, PackageFetched
from vallum.record.chapters import EpisodeStory, StepStory
from vallum.record.trajectory import ApprovalFact, CommandFact, Containment, Denial, FindingFact

KEPT = 50
"""Denials, files, commands and the like of one turn that are named; all are counted."""


@dataclass
class StepCharge:
    """What the story of a step does not say."""

    confidence: float = 1.0
    methods: set[str] = field(default_factory=set)
    approvals: dict[str, ApprovalFact] = field(default_factory=dict)
    packages: list[str] = field(default_factory=list)


class Charges:
    """All steps of one episode; None stands for what no step could be charged with."""

    def __init__(self) -> None:
        self.steps: dict[int | None, StepCharge] = {}

    def take(self, event: Event) -> None:
        """Count one event of the episode."""
        charge = self.steps.get(event.scope.step)
        if charge is None:
            charge = self.steps[event.scope.step] = StepCharge()
        charge.confidence = min(charge.confidence, event.attribution.confidence)
        charge.methods.add(event.attribution.method)
        if isinstance(event, ApprovalRequested) and len(charge.approvals) < KEPT:
            charge.approvals[event.approval] = ApprovalFact(event.approval, event.subject, event.rule)
        elif isinstance(event, ApprovalDecided):
            for one in self.steps.values():
                if (fact := one.approvals.get(event.approval)) is not None:
                    fact.verdict, fact.by, fact.why = event.verdict, event.by, event.why
        elif isinstance(event, PackageFetched) and len(charge.packages) < KEPT:
            charge.packages.append(f"{event.ecosystem}:{event.name}=={event.version} {event.digest}")

    def sum_up(self, episode: EpisodeStory | None, steps: Iterable[int | None]) -> Containment:
        """The facts of some steps together."""
        chosen = sorted(set(steps), key=lambda step: (step is None, step or 0))
        total = Containment(steps=[step for step in chosen if step is not None])
        methods: set[str] = set()
        for step in chosen:
            charge = self.steps.get(step)
            if charge is not None:
                if step is not None:
                    total.confidence = min(total.confidence, charge.confidence)
                methods |= charge.methods
                total.approvals += charge.approvals.values()
                total.packages += charge.packages
            story = episode.steps.get(step) if episode is not None else None
            if story is not None:
                _add_story(total, story)
        total.methods = sorted(methods)
        if episode is not None:
            total.files += [path for path in _changed(episode.changes, total.steps) if path not in total.files]
            del total.files[KEPT:]
        return total


def _add_story(total: Containment, step: StepStory) -> None:
    for entry in step.entries.values():
        if not entry.is_denied:
            if entry.kind == "flow":
                total.allowed += entry.count
            total.bytes_out += entry.bytes_out
            total.bytes_in += entry.bytes_in
            continue
        total.denied += entry.count
        total.denied_late += entry.late
        if len(total.denials) < KEPT:
            process = " ".join(entry.process.argv) or entry.process.exe if entry.process is not None else ""
            total.denials.append(
                Denial(
                    kind=entry.kind,
                    target=entry.target,
                    rule=entry.rule,
                    reason=entry.reason,
                    count=entry.count,
                    bytes_out=entry.bytes_out,
                    process=process,
                    first_event=entry.first_id,
                    late=entry.late,
                )
            )
    total.processes += step.process_count
    total.left_running += step.left_running or 0
    if step.cpu_ns is not None:
        total.cpu_ns = (total.cpu_ns or 0) + step.cpu_ns
    if step.memory_peak_bytes is not None:
        total.memory_peak_bytes = max(total.memory_peak_bytes or 0, step.memory_peak_bytes)
    total.findings += [
        FindingFact(one.id, one.event.detector, one.event.title, one.event.severity, one.event.attack)
        for one in step.findings
    ]
    total.actions += [f"{action.action}: {action.reason}" for action in step.actions[:KEPT]]
    total.files += [path for write in step.files[:KEPT] if (path := write.path) not in total.files]
    total.commands += [
        CommandFact(command.text, command.exit_code, command.timed_out, command.error)
        for command in step.commands[:KEPT]
        if command.source == "sdk"
    ]


def _changed(changes: list[FileChanged], steps: list[int]) -> list[str]:
    """Paths that changed in the steps; one that changed somewhere in a range of steps counts for each of them."""
    return [
        one.path
        for one in changes
        if one.first_step is not None
        and one.last_step is not None
        and any(one.first_step <= step <= one.last_step for step in steps)
    ]
