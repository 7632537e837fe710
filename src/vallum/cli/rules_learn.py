"""``vallum rules learn``: what a run was denied, as a proposal that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click
import msgspec

from vallum.cli.records import write_file
from vallum.client.places import Places
from vallum.record.reader import find_run, read_records
from vallum.rules.files import parse_ruleset, read_text
from vallum.rules.learning import Source
from vallum.rules.learning import learn as learn_from
from vallum.rules.proposals import propose, render_diff

NEW_FILE = "learned.toml"


@click.command()
@click.argument("run", default="latest")
@click.option(
    "--from",
    "source",
    type=click.Choice(["denied", "used"]),
    default="denied",
    show_default=True,
    help="What it was denied, or what it used (say, under containment research).",
)
@click.option(
    "--rules",
    "rules_file",
    type=click.Path(path_type=Path),
    help=f"The rule file to change (default: a new {NEW_FILE}).",
)
@click.option("-o", "--output", metavar="FILE", help="Write the diff there instead of printing it.")
@click.option("--include-guarded", is_flag=True, help="Also private addresses, ssh, mining, unknown protocols, pushes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a diff.")
@click.pass_obj
def learn(
    places: Places,
    run: str,
    source: str,
    rules_file: Path | None,
    output: str | None,
    *,
    include_guarded: bool,
    as_json: bool,
) -> None:
    """Propose the smallest set of grants for what RUN was denied, as a diff to read. Nothing is applied.

    RUN is an id, the beginning of one, or `latest` (the default). Apply what you agree with by `patch -p0`.
    """
    directory = places.runs / find_run(places.runs, run)
    lesson = learn_from(read_records(directory), cast("Source", source), include_guarded=include_guarded)
    proposal = propose(lesson)
    old = read_text(rules_file) if rules_file is not None and rules_file.exists() else ""
    parse_ruleset(old, str(rules_file or NEW_FILE))
    if as_json:
        text = msgspec.json.encode(proposal).decode() + "\n"
    else:
        text = render_diff(proposal, old, str(rules_file or NEW_FILE))
    if output is not None:
        write_file(Path(output), text.encode())
        click.echo(output)
    elif text:
        click.echo(text, nl=False)
    if not proposal.bundles and not proposal.grants:
        click.echo(f"nothing to propose: {len(proposal.left_out)} destinations left out", err=True)
