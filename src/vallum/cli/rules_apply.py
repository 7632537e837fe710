"""`vallum rules apply`: other rules for a run that is under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from vallum.client.face import Node
from vallum.client.places import Places
from vallum.record.reader import find_run


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("run")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="Grant added to the file's. Repeatable.")
@click.option("--containment", type=click.Choice(["locked", "standard", "research"]), help="Instead of the file's.")
@click.pass_obj
def apply(places: Places, /, file: Path, run: str, **options: Any) -> None:
    """Have FILE's rules hold for every live cell of RUN from now on, instead of theirs; open flows that they deny are cut.

    RUN is an id, the beginning of one, or `latest`. A file that cannot be used changes nothing. Any process of the
    node's owner may do this; it is recorded.
    """
    asyncio.run(_apply(places, file, find_run(places.runs, run), options))


async def _apply(places: Places, file: Path, run: str, options: dict[str, Any]) -> None:
    async with Node(places=places, start=False) as node:
        done = await node.update_rules(
            run, rules=file, allow=options["allow"], containment=options["containment"], by="cli"
        )
    cells = f"{len(done.cells)} cell{'s' * (len(done.cells) != 1)}"
    flows = f"{done.flows_cut} flow{'s' * (done.flows_cut != 1)} cut"
    click.echo(f"{run}: {done.digest[:19]} holds for {cells}, {flows}", err=True)
