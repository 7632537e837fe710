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

from vallum.arena.attempts import CONTROLS, PROGRAM
from vallum.client.face import Node
from vallum.client.places import Places
from vallum.core.errors import VallumError
from vallum.core.text import show

COLOURS = {"enforced": "green", "degraded": "yellow", "missing": "red"}
EXIT_CODES = {"enforced": 0, "degraded": 1, "missing": 3}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def doctor(places: Places, as_json: bool) -> None:
    """Attempt every control in a real cell and say: enforced, degraded or missing, why, and what to do.

    \b
    Exit codes: 0 everything is enforced, 1 something is degraded, 3 something is missing.
    """
    controls = asyncio.run(_examine(places))
    worst = max((control["state"] for control in controls), key=lambda state: EXIT_CODES[state])
    if as_json:
        click.echo(msgspec.json.encode({"state": worst, "controls": controls}).decode())
    else:
        _print(controls, worst)
    sys.exit(EXIT_CODES[worst])


async def _examine(places: Places) -> list[dict[str, Any]]:
    try:
        async with Node(places=places) as node:
            controls = [_from_tier(name, word) for name, word in sorted(node.tiers.items())]
            return controls + await _attempt_all(node)
    except VallumError as error:
        return [{"control": "cell", "state": "missing", "detail": str(error), "remedy": "see the sentence above"}]


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
