"""`vallum bench`: figures next to those of peers, measured in one run. It asserts nothing; machines differ."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vallum.arena import bench_gateway, bench_models, bench_sandbox
from vallum.arena.figures import Bench, Figure, ratio
from vallum.arena.sandbox_peers import describe_machine
from vallum.arena.world import VARIABLE, command_inside
from vallum.client.places import Places
from vallum.core.errors import NodeError
from vallum.core.text import show

NAMES = ("sandbox", "gateway", "models", "record")
REPETITIONS = {"sandbox": 30, "gateway": 200, "models": 200, "record": 2000}
_NOTES = {
    "sandbox": [
        "one after the other, on whatever else this machine does now",
        "subprocess.run has no walls at all: the floor",
    ],
    "gateway": [
        "client and server are Python processes on the same processors as what is measured",
        "a relay decides and records nothing: the floor of a user-space gateway",
    ],
    "models": [
        "the provider is a local fake; each call is two records of a request, two of the call, and a step for its tool call",
        "overhead is the difference of the two subjects",
    ],
    "record": [
        "acknowledged means handed to the kernel: it survives kill -9, not a power cut",
        "SQLite keeps no chain",
    ],
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--repetitions", type=click.IntRange(3, 100_000), help="Of each measurement, instead of the bench's own number."
)
@click.pass_context
def bench(ctx: click.Context, names: tuple[str, ...], as_json: bool, repetitions: int | None) -> None:
    """Measure cells, the gateway, the model door and the record next to peers, as ratios in one run.

    Peers that are not installed are said to be missing, with what installs them. Without NAMES: all of them.
    """
    found = [_run(name, repetitions or REPETITIONS[name]) for name in names or NAMES]
    if as_json:
        click.echo(msgspec.json.encode({"benches": [_to_builtins(one) for one in found]}).decode())
        return
    for one in found:
        _print(one)


def _run(name: str, repetitions: int) -> Bench:
    if name == "gateway" and VARIABLE not in os.environ:
        return _run_inside(repetitions)
    with tempfile.TemporaryDirectory(prefix="vallum-bench-") as home:
        # a node of its own: the user's may be busy, and its gateway is elsewhere
        places = Places(state=Path(home), runtime=Path(home) / "run")
        if name == "sandbox":
            figures = asyncio.run(bench_sandbox.run(places, repetitions))
        elif name == "gateway":
            figures = asyncio.run(bench_gateway.run(places, repetitions))
        elif name == "models":
            figures = asyncio.run(bench_models.run(places, repetitions))
        else:
            figures = msgspec.json.decode(
                _call(["-m", "vallum.arena.bench_record", str(repetitions), home]), type=list[Figure]
            )
    return Bench(name=name, machine=describe_machine(), figures=figures, notes=_NOTES[name])


def _run_inside(repetitions: int) -> Bench:
    """The gateway bench, in a closed world of its own."""
    program = "from vallum.cli.main import main; main()"
    argv = [sys.executable, "-I", "-c", program, "bench", "gateway", "--json", "--repetitions", str(repetitions)]
    done = subprocess.run(command_inside(argv), stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise NodeError(f"the gateway bench ended with {done.returncode}; the reason is above")
    return msgspec.json.decode(done.stdout, type=_Benches).benches[0]


class _Benches(msgspec.Struct):
    benches: list[Bench]


def _call(arguments: list[str]) -> bytes:
    done = subprocess.run([sys.executable, "-I", *arguments], stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise NodeError(f"a bench ended with {done.returncode}; the reason is above")
    return done.stdout


def _to_builtins(found: Bench) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(found)
    plain["figures"] = [
        {**msgspec.to_builtins(figure), "ratio": ratio(figure, found.figures)} for figure in found.figures
    ]
    return plain


def _print(found: Bench) -> None:
    console = Console()
    table = Table(title=f"{found.name}: {found.machine}", title_justify="left", pad_edge=False)
    for column in ("what", "subject"):
        table.add_column(column)
    for column in ("p50", "p95", "p99", "unit", "n", "ratio to vallum's p50"):
        table.add_column(column, justify="right" if column != "unit" else "left")
    for figure in sorted(found.figures, key=lambda figure: figure.what):
        if figure.missing:
            table.add_row(figure.what, Text(f"{figure.subject} missing: {show(figure.missing)}", "dim"), *[""] * 6)
            continue
        multiple = ratio(figure, found.figures)
        numbers = [
            f"{value:.3g}" if value is not None and value < 100 else f"{value:.0f}"
            for value in (figure.p50, figure.p95, figure.p99)
        ]
        table.add_row(
            figure.what,
            figure.subject,
            *numbers,
            figure.unit,
            str(figure.repetitions),
            f"{multiple:.2f}x" if multiple else "",
        )
    console.print(table)
    for note in found.notes:
        console.print(f"[dim]{note}[/]")
