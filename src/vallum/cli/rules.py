"""``vallum rules check|explain|test|learn``: rule files before they are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import click
import msgspec

from vallum.cli.groups import Group
from vallum.cli.rules_apply import apply
from vallum.cli.rules_learn import learn
from vallum.core.events import Protocol
from vallum.rules.cases import list_shipped, read_cases, run_case
from vallum.rules.explanation import explain, parse_target
from vallum.rules.facts import Asker
from vallum.rules.fields import PHASES
from vallum.rules.files import compose, read_ruleset
from vallum.rules.grants import PROTOCOLS


@click.group(cls=Group)
def rules() -> None:
    """Check, explain, test and learn rule files."""


rules.add_command(apply)
rules.add_command(learn)


@rules.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object: the rules as they are used.")
def check(file: Path, *, as_json: bool) -> None:
    """Check FILE and print what it comes to. Exit code 2 when it cannot be used."""
    ruleset = compose(own=read_ruleset(file))
    if as_json:
        click.echo(msgspec.json.encode(ruleset).decode())
        return
    click.echo(f"{file}: usable, containment {ruleset.containment}")
    for line in ruleset.describe():
        click.echo(f"  {line}")


@rules.command(name="explain")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("target", nargs=-1, required=True)
@click.option("--allow", multiple=True, metavar="HOST[:PORT]|@BUNDLE", help="Grant added to the file's.")
@click.option("--containment", default=None, help="Instead of the file's.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default=None, help="What the first bytes are.")
@click.option("--sni", "--host", "server_name", default=None, help="SNI or Host in them (default: the name).")
@click.option("--address", default=None, help="What the name resolves to (nothing is looked up).")
@click.option("--method", default=None, help="Of a request (GET when there is a path).")
@click.option("--path", default=None, help="Of a request, with its query.")
@click.option("--phase", type=click.Choice(PHASES), default="run", show_default=True, help="Set-up or run.")
@click.option("--run", default="", help="Id of the run that asks.")
@click.option("--episode", default="", help="Id of the episode that asks.")
@click.option("--agent", default="", help="Name of the agent that asks.")
@click.option("--step", type=click.IntRange(min=0), default=None, help="Step that asks.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def explain_command(
    file: Path,
    target: tuple[str, ...],
    allow: tuple[str, ...],
    containment: str | None,
    protocol: str | None,
    server_name: str | None,
    address: str | None,
    method: str | None,
    path: str | None,
    phase: str,
    run: str,
    episode: str,
    agent: str,
    step: int | None,
    *,
    as_json: bool,
) -> None:
    """Say whether TARGET would be allowed by FILE, and by which rule. Exit code 0: allowed, 1: held or denied.

    TARGET is HOST[:PORT], ADDRESS[:PORT], URL or METHOD URL.
    """
    ruleset = compose(containment, own=read_ruleset(file), allow=allow)
    explanation = explain(
        ruleset,
        parse_target(" ".join(target), method=method, path=path),
        protocol=cast("Protocol | None", protocol),
        server_name=server_name,
        address=address,
        asker=Asker(run=run, episode=episode, agent=agent, step=step, phase=phase),
    )
    decision = explanation.decision
    if as_json:
        click.echo(msgspec.json.encode(explanation).decode())
    else:
        for line in explanation.considered:
            click.echo(f"  {line}")
        click.echo(f"{decision.verdict} by rule {decision.rule}: {decision.reason}")
    sys.exit(0 if decision.verdict == "allow" else 1)


@rules.command(name="test")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a test.")
@click.option("-v", "--verbose", is_flag=True, help="Name the tests that pass, too.")
def test_command(files: tuple[Path, ...], *, as_json: bool, verbose: bool) -> None:
    """Run the [[test]] tables of FILES (without any: of the built-in containments and bundles). Exit code 1: one failed.

    Tests are in the rule file itself, or in NAME.test.toml beside NAME.toml.
    """
    outcomes = []
    for file in files or list_shipped():
        ruleset, cases = read_cases(file)
        outcomes += [run_case(ruleset, case) for case in cases]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in outcomes:
        if as_json:
            click.echo(msgspec.json.encode(outcome).decode())
        elif verbose or not outcome.passed:
            for line in outcome.describe():
                click.echo(line)
    if not as_json:
        click.echo(f"{len(outcomes)} tests, {len(outcomes) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)
