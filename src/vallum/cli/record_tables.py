"""Runs, stories, events and incidents as a terminal shows them.

Guests name much of what is printed here: all of it passes ``core.text.show``, and none of it is read as markup.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vallum.core.events import Event, FileChanged, Process, Record
from vallum.core.text import show
from vallum.core.units import show_bytes, show_duration
from vallum.record.chapters import EpisodeStory, RunStory, StepStory, Totals
from vallum.record.index import FindingRow, RunRow
from vallum.sandbox.snapshots.store import Manifest

SHOWN_STEPS = 200
SHOWN_ATTEMPTS = 60
_TONES = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "cyan", "info": "dim"}
_STATES = {"finished": "green", "running": "cyan", "contained": "red", "changed": "bold red", "unreadable": "red"}
_CHANGES = {"added": "green", "changed": "yellow", "removed": "red"}
_RANKS = {name: rank for rank, name in enumerate(_TONES)}


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """The findings of one step of one run."""

    run: str
    episode: str | None
    step: int | None
    t_ns: int
    """Of the first."""
    severity: str
    """Of the worst."""
    attack: list[str]
    findings: list[FindingRow]


def join_findings(findings: list[FindingRow]) -> list[Incident]:
    """Findings with the same run, episode and step as one incident, in the order of their first."""
    joined: dict[tuple[str, str | None, int | None], list[FindingRow]] = {}
    for finding in findings:
        joined.setdefault((finding.run, finding.episode, finding.step), []).append(finding)
    return [
        Incident(
            run=run,
            episode=episode,
            step=step,
            t_ns=rows[0].t_ns,
            severity=min((row.severity for row in rows), key=lambda name: _RANKS.get(name, 99)),
            attack=sorted({technique for row in rows for technique in row.attack}),
            findings=rows,
        )
        for (run, episode, step), rows in joined.items()
    ]


def print_runs(rows: list[RunRow], runs: Path) -> None:
    """The list of runs."""
    if not rows:
        Console().print(Text(f"No runs in {show(str(runs))} yet: make one with 'vallum run -- CMD'."))
        return
    table = _table(
        "Run",
        "Began (UTC)",
        "Status",
        "Took",
        "Steps",
        "Processes",
        "Denied",
        "Findings",
        "CPU",
        "Command",
        numeric=(3, 4, 5, 6, 7, 8),
    )
    for row in rows:
        status = row.status + (f" ({row.exit_code})" if row.exit_code is not None else "")
        table.add_row(
            Text(row.run, no_wrap=True),
            _when(row.started_ns),
            Text(status, style=_STATES.get(row.status, "yellow")),
            show_duration(row.duration_ns),
            str(row.steps),
            str(row.processes),
            _count(row.denied, "red"),
            _count(row.findings, "yellow"),
            show_duration(row.cpu_ns),
            Text(show(row.detail or " ".join(row.command), 160), overflow="ellipsis", no_wrap=True),
        )
    _wide_console().print(table)


def print_story(story: RunStory) -> None:
    """One run."""
    console = _wide_console()
    totals = story.count()
    console.print(_title(story, totals))
    several = len(story.episodes) > 1
    steps = story.steps
    table = _table(
        "Step",
        "Command",
        "Exit",
        "Took",
        "CPU",
        "Memory",
        "Processes",
        "Denied",
        "Findings",
        numeric=(2, 3, 4, 5, 6, 7, 8),
    )
    for episode, step in steps[:SHOWN_STEPS]:
        table.add_row(*_step_row(episode, step, several))
    if steps:
        console.print(table)
    if len(steps) > SHOWN_STEPS:
        console.print(Text(f"... and {len(steps) - SHOWN_STEPS} more steps"), style="dim")
    _print_denied(console, story, several)
    _print_allowed(console, story, several)
    _print_packages(console, story, several)
    _print_files(console, story)
    for finding in story.findings[:SHOWN_ATTEMPTS]:
        event = finding.event
        console.print(
            Text.assemble(
                ("finding  ", _TONES.get(event.severity, "")), (f"{event.severity:8} ", _TONES.get(event.severity, "")),
                f"step {_step(event)}  ", (show(event.title, 120), "bold"), "  ", (show(" ".join(event.attack), 120), "dim"), "\n         ",
                (show(event.summary, 300), "dim"),
            )
        )  # fmt: skip
    for note in story.notes:
        console.print(Text(f"note     {show(note, 300)}", style="yellow"))


def print_incidents(incidents: list[Incident]) -> None:
    """Findings joined per run and step."""
    console = _wide_console()
    if not incidents:
        console.print(Text("No findings."))
        return
    table = _table("Run", "Step", "When (UTC)", "Severity", "Findings", "ATT&CK")
    for incident in incidents:
        table.add_row(
            Text(incident.run, no_wrap=True),
            Text("?" if incident.step is None else str(incident.step)),
            _when(incident.t_ns),
            Text(show(incident.severity, 20), style=_TONES.get(incident.severity, "")),
            Text("\n".join(_fold_titles(incident.findings))),
            Text(show(" ".join(incident.attack), 120)),
        )
    console.print(table)


def describe_event(record: Record, began_ns: int) -> str:
    """An event in a line."""
    event = record.event
    step = "-" if event.scope.step is None else str(event.scope.step)
    details = "  ".join(f"{name}={show(_value(value), 100)}" for name, value in _fields(event))
    return f"{record.id:>6}  +{(event.t_ns - began_ns) / 1e9:9.4f} s  step {step:>3}  {event.__struct_config__.tag!s:18} {details}"


def _title(story: RunStory, totals: Totals) -> Text:
    ended = story.ended.outcome if story.ended else "not ended"
    code = f", exit {story.ended.exit_code}" if story.ended and story.ended.exit_code is not None else ""
    text = Text()
    text.append(story.run, "bold").append(
        f"  {ended}{code}  {_when(story.start_ns)} UTC, {show_duration(story.end_ns)}\n"
    )
    if story.started:
        text.append(f"containment {show(story.started.containment)}  ", "dim").append(
            show(" ".join(story.started.command), 200) + "\n"
        )
    text.append(
        f"{_number(totals.steps, 'step')}, {_number(totals.processes, 'process', 'processes')}, cpu {show_duration(totals.cpu_ns)}, memory peak "
        f"{show_bytes(totals.memory_peak_bytes)}, permitted {_number(totals.allowed, 'connection')} ({show_bytes(totals.bytes_out)} out, {show_bytes(totals.bytes_in)} in)\n"
    )
    if totals.denied:
        rules = ", ".join(
            f"{show(rule, 60)} {count}"
            for rule, count in sorted(totals.denied_by_rule.items(), key=lambda item: -item[1])
        )
        text.append(f"{_number(totals.denied, 'attempt')} denied", "red").append(f" ({rules}); ")
        text.append(f"{show_bytes(totals.denied_bytes_out)} delivered", "red" if totals.denied_bytes_out else "green")
        text.append(f"; median time to denial {show_duration(totals.decision_ns)}")
    else:
        text.append("nothing denied", "green")
    return text


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _step_row(episode: EpisodeStory, step: StepStory, several: bool) -> list[str | Text]:
    return [
        Text(_name(episode, step, several), no_wrap=True),
        Text(show(step.text, 200), overflow="ellipsis", no_wrap=True),
        "-" if step.exit_code is None else str(step.exit_code),
        show_duration(step.span.end_ns - step.span.start_ns) if step.span.end_ns is not None else "open",
        show_duration(step.cpu_ns),
        show_bytes(step.memory_peak_bytes),
        str(step.process_count),
        _count(step.denied_count, "red"),
        _count(len(step.findings), "yellow"),
    ]


def _print_denied(console: Console, story: RunStory, several: bool) -> None:
    entries = [(episode, step, entry) for episode, step in story.steps for entry in step.denied]
    if not entries:
        return
    table = _table("Step", "Denied", "Protocol", "Rule", "Times", "To denial", "Out", "Process", numeric=(4, 5, 6))
    for episode, step, entry in entries[:SHOWN_ATTEMPTS]:
        table.add_row(
            Text(_name(episode, step, several) + (" (late)" if entry.late else ""), no_wrap=True),
            Text(show(entry.target, 90)),
            Text(show(entry.protocol, 40)),
            Text(show(entry.rule, 60), style="red"),
            str(entry.count),
            show_duration(entry.decision_ns),
            show_bytes(entry.bytes_out),
            Text(show(_who(entry.process), 200), overflow="ellipsis", no_wrap=True),
        )
    console.print(table)
    if len(entries) > SHOWN_ATTEMPTS:
        console.print(
            Text(f"... and {len(entries) - SHOWN_ATTEMPTS} more lines: vallum report {story.run}"), style="dim"
        )


def _print_files(console: Console, story: RunStory) -> None:
    for episode in story.episodes.values():
        for made in episode.snapshots[:SHOWN_ATTEMPTS]:
            after = "before the first step" if made.scope.step is None else f"after step {made.scope.step}"
            size = f"{made.entries} entries, {show_bytes(made.bytes)}, {show(made.digest, 30)}"
            console.print(Text.assemble(("snapshot ", "cyan"), f"{show(made.snapshot, 40)}  {after}  ", (size, "dim")))
        if episode.changes:
            print_changes(console, episode.changes[:SHOWN_ATTEMPTS])
        if len(episode.changes) > SHOWN_ATTEMPTS:
            console.print(Text(f"... and {len(episode.changes) - SHOWN_ATTEMPTS} more changes of files"), style="dim")


def print_changes(console: Console, changes: list[FileChanged]) -> None:
    """Files that were added, changed or removed."""
    table = _table("Steps", "Change", "Path", "Size", "SHA-256", numeric=(3,))
    for one in changes:
        steps = "?" if one.last_step is None else str(one.last_step)
        if one.last_step is not None and one.first_step != one.last_step:
            steps = f"{one.first_step}-{one.last_step}"
        word = "replaced" if one.replaced else one.change
        table.add_row(
            Text(steps), Text(word, style=_CHANGES.get(one.change, "")), Text(show(one.path, 160), overflow="fold"),
            show_bytes(one.bytes), Text(show(one.sha256[:17], 20), style="dim"),
        )  # fmt: skip
    console.print(table)


def print_snapshots(manifests: list[Manifest], directory: Path) -> None:
    """The snapshots of a home."""
    if not manifests:
        Console().print(Text(f"No snapshots in {show(str(directory))}: make one with sb.snapshot()."))
        return
    table = _table(
        "Snapshot", "Made (UTC)", "Run", "Episode", "Step", "Image", "Entries", "Size", "Lies on", numeric=(4, 6, 7)
    )
    for one in manifests:
        below = one.chain[1] if len(one.chain) > 1 else "-"
        table.add_row(
            Text(one.id, no_wrap=True), _when(one.created_ns), Text(show(one.run, 64)), Text(show(one.episode, 64)),
            "-" if one.step is None else str(one.step), Text(show(one.image.ref, 60)),
            str(sum(layer.entries for layer in one.layers)), show_bytes(sum(layer.bytes for layer in one.layers)), Text(below),
        )  # fmt: skip
    _wide_console().print(table)


def _print_allowed(console: Console, story: RunStory, several: bool) -> None:
    entries = [(episode, step, entry) for episode, step in story.steps for entry in step.allowed]
    if not entries:
        return
    table = _table("Step", "Permitted", "Protocol", "Rule", "Times", "Out", "In", "Process", numeric=(4, 5, 6))
    for episode, step, entry in entries[:SHOWN_ATTEMPTS]:
        table.add_row(
            Text(_name(episode, step, several), no_wrap=True),
            Text(show(entry.target, 90)),
            Text(show(entry.protocol, 40)),
            Text(show(entry.rule, 60), style="green"),
            str(entry.count),
            show_bytes(entry.bytes_out),
            show_bytes(entry.bytes_in),
            Text(show(_who(entry.process), 200), overflow="ellipsis", no_wrap=True),
        )
    console.print(table)


def _print_packages(console: Console, story: RunStory, several: bool) -> None:
    found = [(episode, step, package) for episode, step in story.steps for package in step.packages]
    if not found:
        return
    table = _table("Step", "Package", "Version", "Ecosystem", "From", "Size", "Digest", numeric=(5,))
    for episode, step, package in found[:SHOWN_ATTEMPTS]:
        table.add_row(
            Text(_name(episode, step, several), no_wrap=True),
            Text(show(package.name, 90)),
            Text(show(package.version, 40)),
            Text(show(package.ecosystem, 20)),
            Text(package.source),
            show_bytes(package.bytes),
            Text(show(package.digest, 19), style="dim", no_wrap=True),
        )
    console.print(table)
    if len(found) > SHOWN_ATTEMPTS:
        console.print(
            Text(f"... and {len(found) - SHOWN_ATTEMPTS} more packages: vallum report {story.run}"), style="dim"
        )


def _fold_titles(rows: list[FindingRow]) -> list[str]:
    counts: dict[str, int] = {}
    for row in rows:
        title = show(row.title, 120)
        counts[title] = counts.get(title, 0) + 1
    return [title + (f" (x{count})" if count > 1 else "") for title, count in counts.items()]


def _table(*heads: str, numeric: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place in numeric else "left")
    return table


def _wide_console() -> Console:
    """As wide as the terminal; wide enough for a line each where the output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(160, console.width))


def _name(episode: EpisodeStory, step: StepStory, several: bool) -> str:
    name = "?" if step.index is None else str(step.index)
    return f"{episode.id}/{name}" if several else name


def _step(event: Event) -> str:
    return "?" if event.scope.step is None else str(event.scope.step)


def _who(process: Process | None) -> str:
    return "not known" if process is None else " ".join(process.argv) or process.exe or f"pid {process.pid}"


def _count(count: int, tone: str) -> Text:
    return Text(str(count), style=tone if count else "dim")


def _when(ns: int | None) -> str:
    return "-" if ns is None else datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _fields(event: Event) -> list[tuple[str, Any]]:
    common = {"t_ns", "mono_ns", "scope", "attribution"}
    values = [(name, getattr(event, name)) for name in event.__struct_fields__ if name not in common]
    return [(name, value) for name, value in values if value is not None and value not in ("", [])]


def _value(value: Any) -> str:
    if isinstance(value, Process):
        return f"{value.pid} {_who(value)}"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)
