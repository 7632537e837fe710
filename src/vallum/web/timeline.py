"""The timeline of an episode as shapes: one lane a step, time from left to right.

Pure geometry; the template draws it. A lane shows the step's own time, its commands, what it was
permitted and refused, and, dashed, how long what it left running went on: a connection that a
daemon dials three steps later lies in the lane of the step that started it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vallum.core.units import show_duration
from vallum.record.chapters import EpisodeStory, StepStory

WIDTH = 1120
GUTTER = 286
RIGHT = 26
TOP = 30
LANE = 40
NEAR = 9.0
"""Marks closer than this many units are drawn as one with a count."""
MAX_LANES = 120
MAX_MARKS = 160


@dataclass(frozen=True)
class Bar:
    """A stretch of time."""

    x: float
    width: float
    tip: str
    is_failed: bool = False


@dataclass(frozen=True)
class Mark:
    """A moment, or several that would lie upon each other."""

    x: float
    until: float
    """Where the last of them lies."""
    count: int
    tip: str
    is_late: bool = False


@dataclass
class Lane:
    """One step."""

    y: float
    label: str
    text: str
    tip: str
    span: Bar
    tail: Bar | None
    """From the end of the step to the last thing that what it left running did."""
    commands: list[Bar] = field(default_factory=list)
    allowed: list[Bar] = field(default_factory=list)
    denied: list[Mark] = field(default_factory=list)
    findings: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Tick:
    """A time on the axis."""

    x: float
    label: str


@dataclass(frozen=True)
class Timeline:
    """All shapes of one episode."""

    width: int
    height: float
    left: int
    lanes: list[Lane]
    ticks: list[Tick]
    omitted: int
    """Steps that were quiet and are not drawn, because there are too many."""


def draw_timeline(episode: EpisodeStory) -> Timeline:
    """The shapes of an episode. Bounded: of very many steps the quiet ones are left out."""
    steps = _choose(episode.told_steps)
    start = min([step.span.start_ns for step in steps], default=0)
    end = max([max(step.last_ns, step.span.end_ns or 0) for step in steps], default=0)
    scale = _Scale(start, max(end - start, 1_000_000))
    lanes = [_draw_lane(step, TOP + LANE * number, scale, end) for number, step in enumerate(steps)]
    return Timeline(
        width=WIDTH,
        height=TOP + LANE * len(lanes) + 6,
        left=GUTTER,
        lanes=lanes,
        ticks=[Tick(scale.x(start + at), show_duration(at) if at else "0") for at in choose_ticks(scale.length_ns)],
        omitted=len(episode.steps) - len(steps),
    )


class _Scale:
    def __init__(self, start_ns: int, length_ns: int) -> None:
        self.start_ns = start_ns
        self.length_ns = length_ns

    def x(self, at_ns: int) -> float:
        share = min(1.0, max(0.0, (at_ns - self.start_ns) / self.length_ns))
        return round(GUTTER + share * (WIDTH - GUTTER - RIGHT), 1)

    def bar(self, start_ns: int, end_ns: int, tip: str, *, is_failed: bool = False, least: float = 2.5) -> Bar:
        x = self.x(start_ns)
        return Bar(x, round(max(least, self.x(end_ns) - x), 1), tip, is_failed)


def _choose(steps: list[StepStory]) -> list[StepStory]:
    if len(steps) <= MAX_LANES:
        return steps
    loud = sorted(steps, key=lambda step: (-len(step.findings), -step.denied_count))[:MAX_LANES]
    kept = {id(step) for step in loud}
    return [step for step in steps if id(step) in kept]


def _draw_lane(step: StepStory, y: float, scale: _Scale, now_ns: int) -> Lane:
    end = step.span.end_ns if step.span.end_ns is not None else max(step.last_ns, step.span.start_ns)
    lane = Lane(
        y=y,
        label=str(step.index) if step.index is not None else "?",
        text=step.text if step.index is not None else "charged to the cell, no step known",
        tip=f"{step.name}: {step.text}",
        span=scale.bar(step.span.start_ns, end, f"{step.name}, {show_duration(end - step.span.start_ns)}"),
        tail=None,
    )
    for command in step.commands[:MAX_MARKS]:
        command_end = command.span.end_ns if command.span.end_ns is not None else now_ns
        ended = "not over" if command.span.end_ns is None else f"exit {command.exit_code}"
        tip = f"{command.text}\n{ended}, {show_duration(command_end - command.span.start_ns)}"
        lane.commands.append(scale.bar(command.span.start_ns, command_end, tip, is_failed=command.exit_code != 0))
    late_until = max(
        [span.start_ns for entry in step.entries.values() if entry.late for span in entry.spans], default=0
    )
    if step.index is not None and late_until > end:
        lane.tail = scale.bar(end, late_until, f"left running by {step.name}, and charged to it")
    for entry in step.allowed:
        for span in entry.spans[:MAX_MARKS]:
            tip = f"permitted: {entry.target}\n{entry.rule}"
            lane.allowed.append(scale.bar(span.start_ns, span.end_ns or now_ns, tip, least=4))
    moments = [
        # Of very many attempts only the first have a time; the last of them stands for the others.
        (
            span.start_ns,
            f"denied: {entry.protocol} {entry.target}\n{entry.rule}",
            span.start_ns > end and step.index is not None,
            1 + (entry.count - len(entry.spans) if span is entry.spans[-1] else 0),
        )
        for entry in step.denied
        for span in entry.spans
    ]
    lane.denied = _cluster(moments, scale)
    lane.findings = _cluster([(finding.at_ns, finding.event.title, False, 1) for finding in step.findings], scale)
    return lane


def _cluster(moments: list[tuple[int, str, bool, int]], scale: _Scale) -> list[Mark]:
    """Moments as marks, those near each other joined. The first names the mark."""
    marks: list[Mark] = []
    for at_ns, tip, is_late, count in sorted(moments):
        x = scale.x(at_ns)
        if marks and x - marks[-1].until < NEAR and marks[-1].is_late == is_late:
            before = marks[-1]
            marks[-1] = Mark(before.x, x, before.count + count, before.tip, is_late)
        elif len(marks) < MAX_MARKS:
            marks.append(Mark(x, x, count, tip, is_late))
    return marks


def choose_ticks(length_ns: int) -> list[int]:
    """Round times from 0 on that divide ``length_ns`` into four to nine parts."""
    raw = length_ns / 7
    power = 10 ** math.floor(math.log10(raw)) if raw >= 1 else 1
    step = int(next((power * factor for factor in (1, 2, 5, 10) if power * factor >= raw), power * 10))
    if step > 10**9:
        # Seconds and more are read in sixties.
        nice = (2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
        step = (
            next((seconds for seconds in nice if seconds * 10**9 >= raw), math.ceil(raw / 10**9 / 86400) * 86400)
            * 10**9
        )
    return list(range(0, length_ns + 1, max(1, step)))
