"""`vallum runs, show, events, report, verify, incidents`: what is on record. None of them needs the node."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click
import msgspec

from vallum.cli import record_tables
from vallum.cli.conversation import print_conversations
from vallum.client.places import Places
from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput, RecordError
from vallum.core.events import AnyEvent
from vallum.core.text import show as show_text
from vallum.record.chain import Line
from vallum.record.index import NAME, Index
from vallum.record.reader import decode_line, find_run, read_lines, read_records
from vallum.record.trajectory_fold import fold_trajectories
from vallum.record.verify import verify as verify_run

KINDS = tuple(sorted(str(struct.__struct_config__.tag) for struct in AnyEvent.__args__))
_DRIVES_TERMINALS = re.compile(r"[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class _Head(msgspec.Struct):
    """What the filters look at; the rest of a line is not decoded."""

    kind: str
    scope: _Place


class _Place(msgspec.Struct):
    episode: str | None = None
    step: int | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def runs(places: Places, as_json: bool) -> None:
    """List the runs on record, newest first."""
    with Index(places.state / NAME, places.runs) as index:
        rows = index.list_runs()
    if as_json:
        _print_lines(msgspec.json.encode(row) for row in rows)
    else:
        record_tables.print_runs(rows, places.runs)


@click.command()
@click.argument("run", default="latest")
@click.pass_obj
def show(places: Places, run: str) -> None:
    """Show a run: its steps, what each tried and was refused, what was found, what was said.

    RUN is an id, the beginning of one, or `latest` (the default).
    """
    directory = places.runs / find_run(places.runs, run)
    story, episodes = fold_trajectories(read_records(directory))
    record_tables.print_story(story)
    print_conversations(episodes)


@click.command()
@click.argument("run", default="latest")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, nothing left out.")
@click.option(
    "--kind", "kinds", multiple=True, metavar="KIND", help="Only events of this kind, e.g. net.flow. Repeatable."
)
@click.option("--episode", metavar="ID", help="Only events of this episode.")
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Only events charged to step N.")
@click.option("--follow", "-f", is_flag=True, help="Go on as the run goes on, until it ends.")
@click.pass_obj
def events(
    places: Places, run: str, as_json: bool, kinds: tuple[str, ...], episode: str | None, step: int | None, follow: bool
) -> None:
    """Print the events of a run in the order they were recorded.

    RUN is an id, the beginning of one, or `latest` (the default).
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"there is no kind of event {show_text(kind, 60)!r}: the kinds are {', '.join(KINDS)}")
    directory = places.runs / find_run(places.runs, run)
    lines = read_lines(directory, follow=follow)
    if as_json:
        wanted = (_add_id(line) for line in lines if _is_wanted(line, directory, kinds, episode, step))
        _print_lines(wanted, at_once=follow)
        return
    began_ns: int | None = None
    for line in lines:
        if began_ns is None:
            began_ns = decode_line(line, directory).event.t_ns
        if _is_wanted(line, directory, kinds, episode, step):
            click.echo(record_tables.describe_event(decode_line(line, directory), began_ns))


@click.command()
@click.argument("run", default="latest")
@click.option(
    "-o", "--output", metavar="FILE.html", help="Where to write it (default: beside the record). - is stdout."
)
@click.pass_obj
def report(places: Places, run: str, output: str | None) -> None:
    """Write the report of a run as one self-contained HTML file, and print its path.

    RUN is an id, the beginning of one, or `latest` (the default). The record is verified first.
    """
    from vallum.web.report import render_report

    directory = places.runs / find_run(places.runs, run)
    verified = verify_run(directory)
    story, episodes = fold_trajectories(read_records(directory))
    html = render_report(story, verified, episodes)
    if output == "-":
        click.echo(html.encode(), nl=False)
        return
    path = Path(output) if output else directory / "report.html"
    write_file(path, html.encode())
    click.echo(path.absolute())


@click.command()
@click.argument("run", default="latest")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def verify(places: Places, run: str, as_json: bool) -> None:
    """Follow the chain of a run's record from the first event to the last.

    RUN is an id, the beginning of one, `latest` (the default), or a directory with a copy of a run.
    Exit code 4 when a record was changed; the message names the first one.
    """
    given = Path(run)
    directory = given if os.sep in run and given.is_dir() else places.runs / find_run(places.runs, run)
    verified = verify_run(directory.absolute())
    if as_json:
        _print_lines([msgspec.json.encode(verified)])
        return
    state = "intact and closed" if verified.closed else "intact as far as it goes"
    click.echo(
        f"{verified.run}: {state}, {verified.count} record{'s' if verified.count != 1 else ''}, head {verified.head}"
    )
    for note in verified.notes:
        click.echo(f"  {show_text(note, 400)}")


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def incidents(places: Places, run: str | None, as_json: bool) -> None:
    """List findings, joined by run and step; of all runs unless RUN is given."""
    chosen = find_run(places.runs, run) if run is not None else None
    with Index(places.state / NAME, places.runs) as index:
        joined = record_tables.join_findings(index.list_findings(chosen))
    if as_json:
        _print_lines(msgspec.json.encode(incident) for incident in joined)
    else:
        record_tables.print_incidents(joined)


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` into ``path`` in one piece, readable by its owner only; what was there stays whole until then.

    Raises:
        InvalidInput: it cannot be written there.
    """
    draft = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.", delete=False) as file:
            draft = file.name
            file.write(data)
        os.replace(draft, path)  # noqa: PTH105 - a name and a path
    except OSError as error:
        if draft:
            Path(draft).unlink(missing_ok=True)
        raise InvalidInput(f"{path} cannot be written: {error.strerror}; give another file with -o") from error


def _is_wanted(line: Line, directory: Path, kinds: tuple[str, ...], episode: str | None, step: int | None) -> bool:
    if not kinds and episode is None and step is None:
        return True
    try:
        head = msgspec.json.decode(line.payload, type=_Head)
    except MALFORMED as error:
        raise RecordError(
            f"record {line.id} of run {directory.name} is no event ({error}); read it with the version that wrote it"
        ) from error
    if kinds and head.kind not in kinds:
        return False
    return (episode is None or head.scope.episode == episode) and (step is None or head.scope.step == step)


def _add_id(line: Line) -> bytes:
    return b'{"id":%d,%b' % (line.id, line.payload[1:])


def _print_lines(lines: Iterable[bytes], *, at_once: bool = False) -> None:
    """JSON lines for programs and, all the same, harmless to a terminal: what could drive one stays escaped."""
    out = sys.stdout.buffer
    for line in lines:
        text = _DRIVES_TERMINALS.sub(lambda match: f"\\u{ord(match.group()):04x}", line.decode())
        out.write(text.encode() + b"\n")
        if at_once:
            out.flush()
    out.flush()
