"""The report of a run as one HTML file.

Its content is hostile: argument vectors, host names, file names and first bytes are the guest's.

Covered: everything passes ``core.text.show`` (control and bidirectional characters) and HTML
escaping, by construction of the environment and not place by place; a content security policy in
the file forbids scripts, frames, forms, and loading anything from anywhere; there is no link to follow.
Not covered: a guest may write words that mislead a reader; what it wrote stands in a fixed-width face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jinja2

from vallum.core.text import show
from vallum.core.units import show_bytes, show_duration
from vallum.record.chapters import EpisodeStory, ProcessStory, RunStory, StepStory, Totals
from vallum.record.traffic import Traffic
from vallum.record.trajectory import EpisodeTrajectories
from vallum.record.verify import Verified
from vallum.web.conversation import cut_lines, describe_facts, view_conversations
from vallum.web.timeline import draw_timeline

MAX_TIMELINES = 24
MAX_ROWS = 400
MAX_SHOWN = 2000
"""Characters of one text of a guest."""


@dataclass(frozen=True)
class Tile:
    """One figure at the top."""

    label: str
    figure: str
    note: str
    tone: str
    """``good``, ``bad``, ``warn`` or ``plain``."""


@dataclass(frozen=True)
class TreeRow:
    """A process in the tree of its step."""

    depth: int
    process: ProcessStory


def render_report(
    story: RunStory, verified: Verified | None = None, episodes: Sequence[EpisodeTrajectories] = ()
) -> str:
    """The report as one self-contained HTML document.

    Args:
        story: of :func:`vallum.record.story.fold`.
        verified: of :func:`vallum.record.verify.verify`; None when the record was not checked, and the report says so.
        episodes: of :func:`vallum.record.trajectory_fold.fold_trajectories`: the conversations of the run.
    """
    conversations, more_conversations = view_conversations(episodes)
    totals = story.count()
    told = sorted(
        story.episodes.values(), key=lambda episode: -sum(step.denied_count for step in episode.steps.values())
    )[:MAX_TIMELINES]
    drawn = [episode for episode in story.episodes.values() if episode in told and episode.steps]
    denied = [(episode, step, entry) for episode, step in story.steps for entry in step.denied]
    return _template().render(
        story=story,
        totals=totals,
        verified=verified,
        headline=write_headline(totals),
        summary=write_summary(story, totals),
        tiles=choose_tiles(story, totals, verified),
        timelines=[(episode, draw_timeline(episode)) for episode in drawn],
        untold=len([episode for episode in story.episodes.values() if episode.steps]) - len(drawn),
        several=len(story.episodes) > 1,
        denied=denied[:MAX_ROWS],
        denied_omitted=max(0, len(denied) - MAX_ROWS),
        steps=[(episode, step) for episode, step in story.steps if step.index is not None or step.processes][:MAX_ROWS],
        allowed=[(episode, step, entry) for episode, step in story.steps for entry in step.allowed][:MAX_ROWS],
        queries=[(episode, step, entry) for episode, step in story.steps for entry in step.queries][:MAX_ROWS],
        packages=[(episode, step, one) for episode, step in story.steps for one in step.packages][:MAX_ROWS],
        tiers=sorted(
            (story.started.tiers if story.started else {}).items(), key=lambda tier: (tier[1] == "enforced", tier[0])
        ),
        span_ms=story.end_ns / 1e6,
        conversations=conversations,
        more_conversations=more_conversations,
    )


def write_headline(totals: Totals) -> str:
    """What was attempted and what came of it, in a few words."""
    if not totals.denied:
        return "Nothing tried to get out without a grant."
    tried = f"{_number(totals.denied, 'attempt')} to get out, "
    return tried + (
        "not one byte delivered."
        if totals.denied_bytes_out == 0
        else f"{show_bytes(totals.denied_bytes_out)} delivered."
    )


def write_summary(story: RunStory, totals: Totals) -> str:
    """The same with its circumstances, in a few sentences."""
    tried = sum(1 for _, step in story.steps if step.denied_count and step.index is not None)
    sentences = []
    if totals.denied:
        sentences.append(
            f"{tried} of {_number(totals.steps, 'step')} tried what no rule grants"
            + (
                f"; {_number(totals.late_denied, 'attempt')} came from what a step had left running."
                if totals.late_denied
                else "."
            )
        )
    if totals.denied and totals.denied_bytes_out == 0:
        sentences.append(
            f"Each was refused before its first byte left, half of them within {show_duration(totals.decision_ns)}."
        )
    if totals.allowed:
        sentences.append(
            f"{_number(totals.allowed, 'permitted connection')} carried {show_bytes(totals.bytes_out)} out and {show_bytes(totals.bytes_in)} in."
        )
    return (
        " ".join(sentences)
        or f"{_number(totals.steps, 'step')}, {_number(totals.processes, 'process', 'processes')}, no connection."
    )


def choose_tiles(story: RunStory, totals: Totals, verified: Verified | None) -> list[Tile]:
    """The figures at the top, the verdict first."""
    worst = next(iter(totals.findings), "")
    tiles = [
        Tile(
            "Denied attempts",
            f"{totals.denied:,}",
            _number(len(totals.denied_by_rule), "rule") + " gave the verdict",
            "bad" if totals.denied else "plain",
        ),
        Tile(
            "Delivered by them",
            show_bytes(totals.denied_bytes_out),
            "payload past the gateway",
            "bad" if totals.denied_bytes_out else "good",
        ),
        Tile(
            "Time to denial",
            show_duration(totals.decision_ns),
            f"median; slowest {show_duration(totals.slowest_ns)}",
            "plain",
        ),
        Tile(
            "Findings",
            str(len(story.findings)),
            ", ".join(f"{count} {severity}" for severity, count in totals.findings.items()) or "none",
            {"critical": "bad", "high": "bad", "": "plain"}.get(worst, "warn"),
        ),
        Tile(
            "Steps",
            f"{totals.steps:,}",
            f"{_number(totals.processes, 'process', 'processes')}, {_number(totals.commands, 'command')}",
            "plain",
        ),
        Tile(
            "CPU time",
            show_duration(totals.cpu_ns),
            f"in {show_duration(story.end_ns)}; memory peak {show_bytes(totals.memory_peak_bytes)}",
            "plain",
        ),
    ]
    if verified is None:
        tiles.append(Tile("Record", "unchecked", f"{story.records:,} events", "warn"))
    else:
        tiles.append(
            Tile(
                "Record",
                "intact" if verified.closed else "open",
                f"{verified.count:,} chained events",
                "good" if verified.closed else "warn",
            )
        )
    return tiles


def grow_tree(processes: list[ProcessStory]) -> list[TreeRow]:
    """Processes below their parents, in the order they began; what has no parent here stands at the root."""
    rows: list[TreeRow] = []
    depth_of: dict[int, tuple[int, int]] = {}
    for process in processes:
        parent = depth_of.get(process.ppid)
        depth = min(12, parent[0] + 1) if parent else 0
        place = len(rows)
        if parent:
            place = parent[1] + 1
            while place < len(rows) and rows[place].depth > parent[0]:
                place += 1
        rows.insert(place, TreeRow(depth, process))
        for pid, (level, at) in depth_of.items():
            if at >= place:
                depth_of[pid] = (level, at + 1)
        depth_of[process.process.pid] = (depth, place)
    return rows


def describe_process(entry: Traffic) -> str:
    """The command line of who did it, or what is known instead."""
    if entry.process is None:
        return "not known: the packet died in the kernel" if entry.kind == "packet" else "not known"
    return " ".join(entry.process.argv) or entry.process.exe or "gone before it could be read"


def name_technique(technique: str) -> str:
    """Where a MITRE ATT&CK id is explained, as text: a report has no links."""
    return "attack.mitre.org/techniques/" + technique.replace(".", "/")


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _when(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _step_label(episode: EpisodeStory, step: StepStory, several: bool) -> str:
    name = str(step.index) if step.index is not None else "?"
    return f"{episode.id} / {name}" if several else name


def _safe(value: Any) -> Any:
    """Every expression of the template comes through here, before it is escaped."""
    return show(value, MAX_SHOWN) if isinstance(value, str) and not hasattr(value, "__html__") else value


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vallum.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=show_duration, bytes=show_bytes, when=_when, technique=name_technique, brief=show, lines=cut_lines
    )
    environment.globals.update(
        tree=grow_tree, who=describe_process, step_label=_step_label, describe_facts=describe_facts
    )
    return environment.get_template("report.html.j2")
