"""`vallum data export`: trajectories of runs in the formats of others. Needs no node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from vallum.cli.groups import Group
from vallum.cli.records import write_file
from vallum.client.places import Places
from vallum.core.errors import InvalidInput
from vallum.core.events import Record
from vallum.core.text import show
from vallum.record.export.atif import AtifFormat
from vallum.record.export.base import ChosenRun, ExportFormat
from vallum.record.export.otlp import OtlpJsonFormat, SpanSender, send_runs
from vallum.record.export.parquet import ParquetFormat
from vallum.record.export.selection import Exclusion, Selection
from vallum.record.reader import find_run, read_records
from vallum.record.trajectory_fold import fold_trajectories

EXCLUDED = "excluded.json"


@click.group(cls=Group)
def data() -> None:
    """Take trajectories out of the record: to train on, to look at elsewhere."""


@data.command()
@click.argument("runs", nargs=-1, metavar="RUN...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["atif", "parquet", "otlp-json", "otlp"]),
    default="atif",
    show_default=True,
    help="atif: Harbor's JSON, one file a conversation. parquet: one row a turn. otlp-json, otlp: GenAI spans.",
)
@click.option(
    "-o", "--output", metavar="DIR", default=".", show_default=True, help="Where the files go; made when missing."
)
@click.option("--exclude-contaminated", is_flag=True, help="Leave out episodes with findings or denied attempts.")
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="X",
    help="Leave out episodes in which a fact was charged to a step with less confidence.",
)
@click.option("--endpoint", metavar="URL", help="Of the collector, for --format otlp, e.g. http://localhost:4318.")
@click.option("--content", is_flag=True, help="With otlp and otlp-json: what was said, too, not only figures.")
@click.pass_obj
def export(
    places: Places,
    runs: tuple[str, ...],
    form: str,
    output: str,
    exclude_contaminated: bool,
    min_confidence: float,
    endpoint: str | None,
    content: bool,
) -> None:
    """Write the trajectories of runs to files, or send their spans to a collector.

    RUN is an id, the beginning of one, or `latest` (the default). Episodes that a filter leaves out are listed with
    their reasons in excluded.json. Conversations hold what the agent was told: treat the files like the runs.
    """
    if (form == "otlp") != (endpoint is not None):
        raise InvalidInput("--format otlp and --endpoint URL go together: give both, or neither")
    selection = Selection(exclude_contaminated=exclude_contaminated, min_confidence=min_confidence)
    names = list(dict.fromkeys(find_run(places.runs, run) for run in runs or ("latest",)))
    left_out: list[Exclusion] = []
    chosen = _choose(places, names, selection, left_out)
    if endpoint is not None:
        sender = SpanSender(endpoint)
        try:
            sent = send_runs(chosen, sender, with_content=content)
        finally:
            sender.close()
        click.echo(f"{sent} spans sent to {show(sender.endpoint)}")
        _tell(left_out)
        return
    directory = Path(output)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be made: {error.strerror}; give another directory with -o") from error
    for file in _make_format(form, with_content=content).write(chosen):
        write_file(directory / file.name, file.data)
        click.echo(directory / file.name)
    if left_out or exclude_contaminated or min_confidence:
        write_file(directory / EXCLUDED, msgspec.json.format(msgspec.json.encode(left_out), indent=1) + b"\n")
    _tell(left_out)


def _make_format(form: str, *, with_content: bool) -> ExportFormat:
    if form == "atif":
        return AtifFormat()
    if form == "parquet":
        return ParquetFormat()
    return OtlpJsonFormat(with_content=with_content)


def _choose(places: Places, names: list[str], selection: Selection, left_out: list[Exclusion]) -> Iterator[ChosenRun]:
    for name in names:
        directory = places.runs / name
        kept, excluded = selection.select(fold_trajectories(read_records(directory))[1])
        left_out += excluded

        def read_again(directory: Path = directory) -> Iterator[Record]:
            return read_records(directory)

        yield ChosenRun(name, kept, read_again)


def _tell(left_out: list[Exclusion]) -> None:
    for one in left_out:
        more = f" and {len(one.reasons) - 1} more" if len(one.reasons) > 1 else ""
        click.echo(f"left out {one.run} {show(one.episode)}: {show(one.reasons[0], 300)}{more}", err=True)
