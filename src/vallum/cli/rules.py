"""``vallum rules check|explain``: rule files before they are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import click
import msgspec

from vallum.core.events import Protocol
from vallum.rules.explanation import explain
from vallum.rules.files import compose, read_ruleset
from vallum.rules.grants import PROTOCOLS


@click.group()
def rules() -> None:
    """Check and explain rule files."""


@rules.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check FILE and print what it comes to. Exit code 2 when it cannot be used."""
    ruleset = compose(own=read_ruleset(file))
    click.echo(f"{file}: usable, containment {ruleset.containment}")
    for line in ruleset.describe():
        click.echo(f"  {line}")


@rules.command(name="explain")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("target")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="Grant added to the file's.")
@click.option("--containment", default=None, help="Instead of the file's.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default=None, help="What the first bytes are.")
@click.option("--sni", "--host", "server_name", default=None, help="SNI or Host in them (default: the name).")
@click.option("--address", default=None, help="What the name resolves to (nothing is looked up).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def explain_command(
    file: Path,
    target: str,
    allow: tuple[str, ...],
    containment: str | None,
    protocol: str | None,
    server_name: str | None,
    address: str | None,
    *,
    as_json: bool,
) -> None:
    """Say whether TARGET (HOST[:PORT]) would be allowed by FILE, and by which rule. Exit code 0: allowed, 1: denied."""
    ruleset = compose(containment, own=read_ruleset(file), allow=allow)
    explanation = explain(
        ruleset, target, protocol=cast("Protocol | None", protocol), server_name=server_name, address=address
    )
    decision = explanation.decision
    if as_json:
        click.echo(msgspec.json.encode(explanation).decode())
    else:
        for line in explanation.considered:
            click.echo(f"  {line}")
        click.echo(f"{decision.verdict} by rule {decision.rule}: {decision.reason}")
    sys.exit(0 if decision.verdict == "allow" else 1)
