"""`vallum snapshots` and `vallum diff`: what is kept of cells' files, and what a run changed. Neither needs the node."""

from __future__ import annotations

import sys

import click
import msgspec
from rich.console import Console
from rich.text import Text

from vallum.cli import record_tables
from vallum.client.places import Places
from vallum.core.errors import InvalidInput
from vallum.core.events import FileChanged
from vallum.core.text import show
from vallum.record.reader import find_run, read_records
from vallum.sandbox.snapshots.store import list_manifests


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def snapshots(places: Places, as_json: bool) -> None:
    """List the snapshots of this home, newest first.

    A snapshot holds the files of a cell at one moment; sb.snapshot() makes one, node.fork() makes cells of it.
    """
    found = list_manifests(places.snapshots)
    if not as_json:
        record_tables.print_snapshots(found, places.snapshots)
        return
    for one in found:
        row = {name: getattr(one, name) for name in ("id", "run", "episode", "step", "parent", "digest", "created_ns")}
        row |= {"image": one.image.ref, "chain": one.chain, "processes": one.processes, "alive": one.alive}
        row |= {"entries": sum(part.entries for part in one.layers), "bytes": sum(part.bytes for part in one.layers)}
        sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")


@click.command()
@click.argument("run", default="latest")
@click.argument("first", required=False, type=click.IntRange(min=0))
@click.argument("last", required=False, type=click.IntRange(min=0))
@click.option("--episode", metavar="ID", help="Only of this episode.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def diff(places: Places, run: str, first: int | None, last: int | None, episode: str | None, as_json: bool) -> None:
    """List the files that a run changed, as they were recorded when it made snapshots or asked for a diff.

    RUN is an id, the beginning of one, or `latest` (the default). FIRST and LAST: only changes of steps FIRST to
    LAST (of FIRST alone when LAST is not given).
    """
    if first is not None and last is not None and last < first:
        raise InvalidInput(f"step {last} comes before step {first}: give the earlier one first")
    directory = places.runs / find_run(places.runs, run)
    found = [
        event
        for record in read_records(directory)
        if isinstance(event := record.event, FileChanged)
        and (episode is None or event.scope.episode == episode)
        and is_within(event, first, first if last is None else last)
    ]
    if as_json:
        for event in found:
            sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    elif found:
        record_tables.print_changes(Console(), found)
    else:
        Console().print(
            Text(
                f"No change of a file is on record for {show(directory.name)}: sb.snapshot() and sb.diff() look for them."
            )
        )


def is_within(event: FileChanged, first: int | None, last: int | None) -> bool:
    """Whether all the steps that a change may belong to are asked for. Pure."""
    if first is None or last is None:
        return True
    return (
        event.first_step is not None
        and event.last_step is not None
        and first <= event.first_step <= event.last_step <= last
    )
