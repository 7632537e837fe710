"""`vallum snapshots` and `vallum diff`: what is kept of cells' files, and what a run changed. Only deleting needs the node."""

from __future__ import annotations

import asyncio
import sys

import click
import msgspec
from rich.console import Console
from rich.text import Text

from vallum.cli import record_tables
from vallum.cli.groups import Group
from vallum.client.face import Node
from vallum.client.places import Places
from vallum.core.errors import InvalidInput
from vallum.core.events import FileChanged
from vallum.core.text import show
from vallum.record.reader import find_run, read_records
from vallum.sandbox.snapshots.store import Manifest, list_manifests


@click.group(cls=Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def snapshots(context: click.Context, as_json: bool) -> None:
    """List the snapshots of this home, newest first; `vallum snapshots delete` deletes some.

    A snapshot holds the files of a cell at one moment; sb.snapshot() makes one, node.fork() makes cells of it.
    """
    if context.invoked_subcommand is None:
        _list(context.obj, as_json)


@snapshots.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--unused", is_flag=True, help="All that no live cell and no snapshot that stays needs.")
@click.option("--run", "run", metavar="RUN", help="All of this run (an id or the beginning of one).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: deleted, kept.")
@click.pass_obj
def delete(places: Places, ids: tuple[str, ...], unused: bool, run: str | None, as_json: bool) -> None:
    """Delete snapshots: those of the given IDs, of a run, or all that nothing needs.

    A snapshot that a live cell runs on, or that another one lies on, is kept and says why: exit code 2, but for --unused.
    """
    if bool(ids) + unused + (run is not None) != 1:
        raise click.UsageError("say which: IDs, --unused, or --run RUN")
    manifests = list_manifests(places.snapshots)
    chosen = order_for_deletion(manifests, choose(manifests, ids, run))
    deleted, kept = asyncio.run(_delete(places, chosen)) if chosen else ([], {})
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"deleted": deleted, "kept": kept}) + b"\n")
    else:
        for name in deleted:
            click.echo(f"deleted {name}")
        for why in kept.values():
            click.echo(f"vallum: {why}", err=True)
        if not deleted and not kept:
            click.echo("nothing to delete")
    if kept and not unused:
        sys.exit(InvalidInput.exit_code)


def choose(manifests: list[Manifest], ids: tuple[str, ...], run: str | None) -> list[str]:
    """The snapshots that are meant: the given ones, those of a run, or all of them. Pure.

    Raises:
        InvalidInput: there is none of an id, or none of the run; or its beginning is that of several runs.
    """
    if ids:
        known = {one.id for one in manifests}
        if missing := [name for name in ids if name not in known]:
            raise InvalidInput(
                f"there is no snapshot {show(missing[0], 40)!r} in this home: 'vallum snapshots' lists them"
            )
        return list(dict.fromkeys(ids))
    if run is None:
        return [one.id for one in manifests]
    runs = {one.run for one in manifests}
    meant = {run} if run in runs else {name for name in runs if run and name.startswith(run)}
    if len(meant) != 1:
        what = "is the beginning of several runs" if meant else "has no snapshot in this home"
        raise InvalidInput(f"run {show(run, 40)!r} {what}: 'vallum snapshots' lists them")
    return [one.id for one in manifests if one.run in meant]


def order_for_deletion(manifests: list[Manifest], names: list[str]) -> list[str]:
    """What lies on others goes before them. Pure."""
    depth = {one.id: len(one.chain) for one in manifests}
    return sorted(names, key=lambda name: -depth[name])


async def _delete(places: Places, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """(deleted, kept and why): the node alone knows what live cells need."""
    deleted, kept = [], {}
    async with Node(places=places) as node:
        for name in names:
            try:
                await node.delete(name)
            except InvalidInput as error:
                kept[name] = str(error)
            else:
                deleted.append(name)
    return deleted, kept


def _list(places: Places, as_json: bool) -> None:
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
