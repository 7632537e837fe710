"""`vallum demo`: the incident replayed, without walls and in a cell, with what the fakes counted."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vallum.arena.incident import ACTS, Act
from vallum.arena.judgement import Case
from vallum.arena.replay import Outcome, Progress, replay
from vallum.arena.world import VARIABLE, World, command_inside
from vallum.cli.program import program
from vallum.client.connection import prepare
from vallum.client.places import Places
from vallum.core.errors import InvalidInput, NodeError, RecordError
from vallum.core.text import show
from vallum.core.units import show_bytes, show_duration
from vallum.record.reader import read_records
from vallum.record.story import fold
from vallum.record.verify import verify
from vallum.testing.fakes import Received
from vallum.web.report import render_report

MOST_AT_ONCE = 16
_WORDS = {
    "shares": ("share", "shares"), "tunnel_bytes": ("byte read through it", "bytes read through it"),
    "secrets_read": ("secret read", "secrets read"), "queries": ("query", "queries"), "downloads": ("download", "downloads"),
    "probes": ("service probed", "services probed"),
}  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the table.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the HTML report.",
)
@click.pass_context
def demo(ctx: click.Context, as_json: bool, output: Path | None) -> None:
    """Watch a scripted agent mine, tunnel and probe: first without walls, then in a cell.

    Everything happens in network namespaces of its own, against local fakes that count what they
    receive; no real network can be reached. An ordinary user can run it where the kernel grants user
    namespaces. The record stays, as that of any run.

    \b
    Exit codes: 0 every attack delivered nothing, is recorded and charged to the right step, and what is
    permitted worked; 1 something did not, and is named; 2 and 125 it could not be tried, with the reason.
    """
    places: Places = ctx.obj
    if VARIABLE not in os.environ:
        ctx.exit(_enter_world(places, as_json, output))
    ctx.exit(_play(places, as_json, output))


def _enter_world(places: Places, as_json: bool, output: Path | None) -> int:
    """Run this same command inside a closed world."""
    prepare(places)
    target = output or places.state / "demo.html"
    if not target.parent.is_dir():
        raise InvalidInput(f"cannot write the report to {target}: there is no directory {target.parent}")
    start = "from vallum.cli.main import main; main()"
    argv = [sys.executable, "-I", "-c", start, "--home", str(places.state), "demo", "-o", str(target.absolute())]
    process = subprocess.Popen(command_inside([*argv, "--json"] if as_json else argv))
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue  # the terminal told it, too
        return status if status >= 0 else 128 - status


def _play(places: Places, as_json: bool, output: Path | None) -> int:
    world = World.from_environ(os.environ)
    target = (output or places.state / "demo.html").absolute()
    # a node of its own: one that runs already has its gateway in the real network
    with _borrow_home(places) as own, _watch(as_json) as told:
        outcome = asyncio.run(replay(world, own, told))
        record = own.runs / outcome.run
        target.write_text(render_report(fold(read_records(record)), verify(record)), "utf-8")
    if as_json:
        click.echo(msgspec.json.encode({"report": str(target), **msgspec.to_builtins(outcome)}).decode())
    else:
        _print_end(outcome, target)
    return 0 if outcome.ok else 1


@contextmanager
def _borrow_home(places: Places) -> Iterator[Places]:
    """A home for the demo's node: one of a few fixed places, so that what a killed demo left is found and removed.

    On entry and on exit records move to where the user's other runs are, and the rest is deleted.
    """
    base = places.state / "demos"
    base.mkdir(mode=0o700, exist_ok=True)
    for number in range(MOST_AT_ONCE):
        own = Places(state=base / str(number), runtime=base / str(number) / "run")
        own.state.mkdir(mode=0o700, exist_ok=True)
        with (own.state / "lock").open("w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if _has_node(own):
                continue  # of a demo that was just killed, and not gone yet
            _tidy(own, places.runs)
            try:
                yield own
            finally:
                _wait_for_node(own)
                _tidy(own, places.runs)
            return
    raise NodeError(f"{MOST_AT_ONCE} demos of yours run already: wait for one to end")


def _has_node(own: Places) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(os.fsencode(own.socket)) == 0


def _wait_for_node(own: Places, timeout_s: float = 5.0) -> None:
    """After an interrupt its node is still putting its cells away."""
    deadline = time.monotonic() + timeout_s
    while _has_node(own) and time.monotonic() < deadline:
        time.sleep(0.05)


def _tidy(own: Places, runs: Path) -> None:
    """Keep the records, delete the rest."""
    try:
        runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        for record in own.runs.iterdir() if own.runs.is_dir() else ():
            shutil.move(record, runs / record.name)
        for left in own.state.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != "lock":
                left.unlink()
    except OSError as error:
        raise RecordError(f"what the demo left in {own.state} could not be put away: {error}") from error


@contextmanager
def _watch(as_json: bool) -> Iterator[_Screen]:
    """A live table on a terminal; a line a step on stderr otherwise."""
    screen = _Screen(Console(stderr=as_json), is_live=not as_json)
    if as_json or not screen.console.is_terminal:
        yield screen
        return
    with Live(screen.render(), console=screen.console, refresh_per_second=8, transient=True) as live:
        screen.live = live
        yield screen


class _Screen:
    """What is on the screen while the replay runs."""

    def __init__(self, console: Console, *, is_live: bool) -> None:
        self.console = console
        self.live: Live | None = None
        self._is_live = is_live
        self._progress: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._progress = progress
        if self.live is not None:
            self.live.update(self.render())
        elif self._is_live:
            self.console.print(self._headline(), highlight=False)

    def render(self) -> Group:
        """The table and, below, the step that runs."""
        progress = self._progress
        if progress is None:
            return Group(Text("building the closed world ..."))
        return Group(make_table(progress.unwalled, progress.cases), self._headline())

    def _headline(self) -> Text:
        progress = self._progress
        assert progress is not None
        where = (
            Text(" without walls ", "black on yellow")
            if progress.phase == "unwalled"
            else Text(" in a cell ", "white on blue")
        )
        place = Text(f"  step {progress.number + 1}/{progress.of}  ", "dim")
        return Text.assemble(
            where, place, Text(progress.step.thought), Text(f"\n  $ {show(progress.step.command, 100)}", "dim")
        )


def make_table(unwalled: dict[str, Received], cases: list[Case]) -> Table:
    """Every act: what arrived without walls, and what became of it in the cell."""
    table = Table(expand=False, pad_edge=False, title_justify="left")
    table.add_column("attempt")
    table.add_column("without walls", style="yellow")
    table.add_column("in the cell")
    table.add_column("step", justify="right")
    table.add_column("rule")
    table.add_column("time to\ndenial", justify="right")
    table.add_column("bytes\ndelivered", justify="right")
    by_key = {case.key: case for case in cases}
    for act in ACTS:
        table.add_row(
            act.title, describe(unwalled[act.key]) if act.key in unwalled else "", *_cells(act, by_key.get(act.key))
        )
    return table


def _cells(act: Act, case: Case | None) -> list[Text | str]:
    if case is None:
        return [Text("...", "dim"), "", "", "", ""]
    attempt = case.attempt
    if not case.ok:
        return [
            Text(case.why, "bold red"),
            str(attempt.step),
            show(attempt.rule),
            "",
            Text(str(case.cell.payload_bytes), "bold red"),
        ]
    if act.is_permitted:
        return [
            Text("permitted", "green"),
            str(attempt.step),
            show(attempt.rule),
            "",
            Text(show_bytes(case.cell.units["downloaded_bytes"]), "green"),
        ]
    times = f" ({attempt.events}x)" if attempt.events > 1 else ""
    if not attempt.events:
        return [Text("never left", "green"), "", "", "", Text("0", "bold green")]
    return [
        Text(f"denied{times}", "green"), "cell" if attempt.step is None else str(attempt.step), show(attempt.rule, 40),
        show_duration(attempt.decision_ns), Text("0", "bold green"),
    ]  # fmt: skip


def describe(received: Received) -> str:
    """What a fake counted, in words: ``5 shares, 735 B``."""
    if received.is_nothing():
        return "nothing"
    parts = [
        f"{received.units[unit]} {words[received.units[unit] != 1]}"
        for unit, words in _WORDS.items()
        if received.units.get(unit)
    ]
    if not parts:
        parts.append(f"{received.connections} received")
    return ", ".join([*parts, show_bytes(received.units.get("downloaded_bytes", received.payload_bytes))])


def _print_end(outcome: Outcome, target: Path) -> None:
    console = Console()
    console.print(make_table({case.key: case.unwalled for case in outcome.cases}, outcome.cases))
    attacks = [case for case in outcome.cases if not case.permitted]
    stopped = sum(case.ok for case in attacks)
    console.print(
        Text.assemble(
            (f"{stopped} of {len(attacks)} attacks stopped", "bold green" if outcome.ok else "bold red"),
            f"; the fakes counted {sum(case.cell.payload_bytes for case in attacks)} bytes of them from the cell, "
            f"{show_bytes(sum(case.unwalled.payload_bytes for case in attacks))} without walls.",
        )
    )
    for case in outcome.cases:
        if not case.ok:
            console.print(Text(f"  {case.title}: {case.why}", "red"))
    for control, tier in outcome.tiers.items():
        if not tier.startswith("enforced"):
            console.print(Text(f"  {control}: {show(tier)}", "yellow"))
    if outcome.rootless:
        console.print(Text("  run without root: fewer walls; `vallum doctor` names them", "yellow"))
    console.print(
        f"\nreport  {target}\nrecord  {program()} show {outcome.run}\n        {program()} verify {outcome.run}",
        highlight=False,
        soft_wrap=True,
    )
