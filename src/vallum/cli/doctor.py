"""`vallum doctor`: what this machine can enforce, by attempting it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from vallum.arena.attacks import battery
from vallum.arena.attacks.base import Outcome
from vallum.arena.attempts import CONTROLS, PROGRAM
from vallum.client.face import Node
from vallum.client.places import Places
from vallum.core.errors import VallumError
from vallum.core.text import show
from vallum.sandbox.ns.controls import ESSENTIAL

COLOURS = {"enforced": "green", "degraded": "yellow", "missing": "red"}
EXIT_CODES = {"enforced": 0, "degraded": 1, "missing": 3}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--attack", is_flag=True, help="Then run the battery of escapes against real cells (about two minutes).")
@click.pass_obj
def doctor(places: Places, as_json: bool, attack: bool) -> None:
    """Attempt every control in a real cell and say: enforced, degraded or missing, why, and what to do.

    \b
    Exit codes: 0 everything is enforced, 1 something is degraded or an optional control is missing,
    3 a control is missing that no cell can do without, or an escape of the battery did not fail.
    """
    controls, outcomes = asyncio.run(_examine(places, attack=attack, quiet=as_json))
    worst = judge(controls, outcomes)
    if as_json:
        found: dict[str, Any] = {"state": worst, "controls": controls}
        if attack:
            found["attack"] = {"held": all(o.held for o in outcomes), "outcomes": outcomes}
        click.echo(msgspec.json.encode(found).decode())
    else:
        _print(controls, worst)
    sys.exit(EXIT_CODES[worst])


def judge(controls: list[dict[str, Any]], outcomes: list[Outcome]) -> str:
    """The worst that was found: what is essential must be there, what is optional only lowers. Pure."""
    states = ["degraded" if c["state"] == "missing" and not c["essential"] else c["state"] for c in controls]
    states += [] if all(outcome.held for outcome in outcomes) else ["missing"]
    return max(states, key=lambda state: EXIT_CODES[state])


async def _examine(places: Places, *, attack: bool, quiet: bool) -> tuple[list[dict[str, Any]], list[Outcome]]:
    outcomes: list[Outcome] = []
    try:
        async with Node(places=places) as node:
            controls = [_from_tier(name, word) for name, word in sorted(node.tiers.items())]
            controls += [{**control, "essential": True} for control in await _attempt_all(node)]
            if attack:
                outcomes = await _attack(node, quiet=quiet)
            return controls, outcomes
    except VallumError as error:
        missing = {"control": "cell", "state": "missing", "detail": str(error), "remedy": "see the sentence above"}
        return [{**missing, "essential": True}], outcomes


async def _attack(node: Node, *, quiet: bool) -> list[Outcome]:
    """The battery, with a line for each family as it ends, and one for each escape that did not fail."""
    console = Console(quiet=quiet)
    outcomes: list[Outcome] = []
    for actor in battery.choose_actors(node.tiers):
        for family in battery.FAMILIES:
            found = [outcome async for outcome in battery.attack(node, [family], [actor])]
            outcomes += found
            broken = [outcome for outcome in found if not outcome.held]
            word = f"[red]{len(broken)} did not hold[/]" if broken else "[green]held[/]"
            console.print(f"  {actor.name:6} {family.name:24} {len(found):4} attempts: {word}")
            for outcome in broken:
                console.print(f"         {outcome.name}: {outcome.detail}", markup=False)
    console.print(f"\n{len(outcomes)} attempts, {sum(not outcome.held for outcome in outcomes)} did not hold\n")
    return outcomes


async def _attempt_all(node: Node) -> list[dict[str, Any]]:
    async with node.sandbox(containment="locked") as cell:
        users = ["agent"] if cell.rootless else ["agent", "root"]
        results = {}
        for user in users:
            ran = await cell.exec(["/usr/bin/python3", "-I", "-c", PROGRAM], user=user, timeout_s=60)
            if ran.exit_code == 127:
                return [
                    {
                        "control": "attempts",
                        "state": "degraded",
                        "detail": "/usr/bin/python3 is not there, so nothing was attempted from inside",
                        "remedy": "apt-get install python3",
                    }
                ]
            if ran.exit_code != 0:
                return [
                    {
                        "control": "attempts",
                        "state": "missing",
                        "detail": show(ran.stderr.decode("utf-8", "replace"), 400),
                        "remedy": "report this as a bug",
                    }
                ]
            results[user] = msgspec.json.decode(ran.stdout, type=dict[str, tuple[str, str]])
    found = []
    for control in CONTROLS:
        broken = [
            f"{name} as {user}: {results[user][name][1]}"
            for user in users
            for name in control.attempts
            if results[user][name][0] != "denied"
        ]
        found.append(
            {
                "control": control.name,
                "state": "missing" if broken else "enforced",
                "detail": "; ".join(broken) or control.promise,
                "remedy": control.remedy if broken else "",
            }
        )
    return found


def _from_tier(name: str, word: str) -> dict[str, Any]:
    state, _, rest = word.partition(":")
    detail, _, remedy = rest.partition(";")
    return {
        "control": name,
        "essential": name in {essential for essential, _, _ in ESSENTIAL},
        "state": state if state in EXIT_CODES else "missing",
        "detail": detail.strip(),
        "remedy": remedy.strip(),
    }


def _print(controls: list[dict[str, Any]], worst: str) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("control", "", "what was found", "what to do"):
        table.add_column(column, overflow="fold")
    for control in controls:
        state = control["state"]
        table.add_row(control["control"], f"[{COLOURS[state]}]{state}[/]", control["detail"], control["remedy"])
    console.print(table)
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    console.print(f"\nas {who}: [{COLOURS[worst]}]{worst}[/]")
