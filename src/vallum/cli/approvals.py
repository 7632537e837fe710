"""`vallum approvals`, `vallum approve` and `vallum deny`: actions that rules hold until a person has decided."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import click
import msgspec

from vallum.client.approvals import Answer, Approval
from vallum.client.face import Node
from vallum.client.places import Places
from vallum.core.errors import NodeError
from vallum.core.text import show


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--watch", is_flag=True, help="Go on, and tell what comes until interrupted.")
@click.pass_obj
def approvals(places: Places, as_json: bool, watch: bool) -> None:
    """List what waits for a person in the running node."""
    asyncio.run(_list(places, as_json=as_json, watch=watch))


@click.command()
@click.argument("approval", metavar="ID")
@click.option("--why", default="", metavar="TEXT", help="For the record.")
@click.option(
    "--always", is_flag=True, help="Its rule asks no more in this run; what else of it waits is allowed, too."
)
@click.pass_obj
def approve(places: Places, approval: str, why: str, always: bool) -> None:
    """Allow what waits as ID. You, when, and --why are on record."""
    asyncio.run(_decide(places, approval, "always" if always else "allow", why))


@click.command()
@click.argument("approval", metavar="ID")
@click.option("--why", default="", metavar="TEXT", help="For the record; the guest may see it.")
@click.pass_obj
def deny(places: Places, approval: str, why: str) -> None:
    """Deny what waits as ID. You, when, and --why are on record."""
    asyncio.run(_decide(places, approval, "deny", why))


async def _decide(places: Places, approval: str, answer: Answer, why: str) -> None:
    async with Node(places=places, start=False) as node:
        decided = await node.decide(approval, answer, why=why)
    word = {"allow": "allowed", "deny": "denied", "always": "allowed, and its rule asks no more in this run"}[answer]
    click.echo(f"{decided.id} {word}: {show(decided.subject)}", err=True)


async def _list(places: Places, *, as_json: bool, watch: bool) -> None:
    told: set[str] = set()
    try:
        async with Node(places=places, start=False) as node:
            revision, pending = await node.wait_for_approvals(-1)
            _tell(pending, told, as_json=as_json)
            if not watch and not pending and not as_json:
                click.echo("Nothing waits.")
            while watch:
                revision, pending = await node.wait_for_approvals(revision)
                _tell(pending, told, as_json=as_json)
    except NodeError:
        if watch or not as_json:
            click.echo("No node is running any more." if told else "No node is running, so nothing waits.", err=True)


def _tell(pending: list[Approval], told: set[str], *, as_json: bool) -> None:
    for one in pending:
        if one.id in told:
            continue
        told.add(one.id)
        click.echo(msgspec.json.encode(one).decode() if as_json else describe(one))
    sys.stdout.flush()


def describe(one: Approval) -> str:
    """One line for a person."""
    left = one.timeout_s - (time.time_ns() - one.asked_ns) / 1e9
    step: Any = "?" if one.step is None else one.step
    return (
        f"{one.id}  {left:.0f} s left  run {one.run} step {step}  rule {show(one.rule)}{' (may be always)' if one.can_always else ''}\n"
        f"    {show(one.subject, 1000)}"
    )
