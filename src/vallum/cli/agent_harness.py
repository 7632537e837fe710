"""`vallum agent --harness NAME TASK`: somebody else's agent, unmodified, in a cell of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import click
import msgspec

from vallum.agent.harness.base import STATE, Harness
from vallum.agent.harness.catalog import find_harness
from vallum.agent.harness.install import GUEST_ROOT, cache_directory, install
from vallum.agent.harness.work import SETUP_BUNDLES, install_in_cell, work
from vallum.cli.agent_progress import Progress, follow
from vallum.cli.changes import print_changes
from vallum.cli.copying import check_copies, copy_all
from vallum.cli.run import is_denial, print_summary
from vallum.client.face import EventView, Node, Sandbox
from vallum.client.model import Model
from vallum.client.places import Places
from vallum.core.errors import Contained, InvalidInput, VallumError
from vallum.core.scope import make_run_id

WORK = "/work"


async def run_harness(places: Places, options: dict[str, Any], model: Model) -> int:
    """Run the agent of the command line to its end; the exit code.

    It is the agent's own; 124 when its time was up, 125 where containment stopped it or it could not be installed.

    Raises:
        InvalidInput: there is no such harness, or an option cannot be used with it.
        VallumError: it cannot be installed, or the cell cannot be built.
    """
    _check(options)
    harness = find_harness(options["harness"])
    in_setup = options["install"] == "setup-phase"
    if in_setup and options["rules_file"]:
        raise InvalidInput("--install setup-phase brings rules of its own: put its grants into your rule file instead")
    copies = check_copies(options["copies"])
    mounts = [f"{_absolute(options['work'])}:{WORK}"] if options["work"] else []
    place = f"{GUEST_ROOT}/{harness.name}"
    if not in_setup:
        tree = await asyncio.to_thread(install, harness, cache_directory(os.environ))
        mounts.append(f"{tree}:{place}:ro")
    async with Node(places=places) as node, _rules(options, harness, in_setup=in_setup) as rules:
        sandbox = await node.sandbox(
            options["image"],
            containment=options["containment"],
            allow=options["allow"],
            rules=rules,
            mounts=mounts,
            run=options["run_id"] or make_run_id(),
            command=["vallum", "agent", "--harness", harness.name, options["task"]],
            agent=harness.name,
            model=model,
            phase="setup" if in_setup else "run",
        )
        code, failure, progress = 125, None, Progress()
        try:
            if in_setup:
                place = await install_in_cell(sandbox, harness)
                await sandbox.set_phase("run")
            async with follow(node, sandbox, _speaker(options)) as progress:
                code = await _attend(sandbox, harness, place, options, progress)
            if options["show_diff"]:
                print_changes((await sandbox.diff()).changes, own=(GUEST_ROOT, STATE))
        except VallumError as error:
            code, failure = error.exit_code, error
        lost = await copy_all(sandbox, copies, quiet=options["quiet"] or options["as_json"])
        code = code or (lost.exit_code if lost is not None else 0)
        with contextlib.suppress(VallumError):
            await sandbox.close(exit_code=code)
        events = await node.events(run=sandbox.run, episode=sandbox.episode)
    if failure is not None:
        click.echo(f"vallum: {failure}", err=True)
    if options["as_json"]:
        click.echo(msgspec.json.encode(_summary(harness, sandbox, code, progress, events)).decode())
    elif not options["quiet"]:
        click.echo(f"   {progress.total()}", err=True)
        print_summary(sandbox, code, events)
    return code


def _check(options: dict[str, Any]) -> None:
    if not options["task"]:
        raise click.UsageError(f'say what to do: vallum agent --harness {options["harness"]} "TASK"')
    given = [name for name in ("hooks", "transcript", "resume", "interactive") if options[name]]
    if options["mode"] != "all":
        given.append("mode")
    if given:
        raise InvalidInput(
            f"--{_OPTION.get(given[0], given[0])} is of the reference agent: leave it out, or leave out --harness"
        )


_OPTION = {"hooks": "hook", "mode": "approve"}


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - no symlink is resolved: the user named this path


@contextlib.asynccontextmanager
async def _rules(options: dict[str, Any], harness: Harness, *, in_setup: bool) -> AsyncIterator[str | None]:
    """The rule file; for an installation in the cell one that grants its packages in the set-up phase only."""
    if not in_setup:
        yield options["rules_file"]
        return
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(f'[setup]\nbundles = ["{SETUP_BUNDLES[harness.installer]}"]\n')
        file.flush()
        yield file.name


async def _attend(sandbox: Sandbox, harness: Harness, place: str, options: dict[str, Any], progress: Progress) -> int:
    def write(stream: str, data: bytes) -> None:
        is_out = stream == "stdout" and not options["as_json"]
        target = sys.stdout if is_out else sys.stderr
        target.buffer.write(data)
        target.flush()

    working = asyncio.ensure_future(
        work(
            sandbox,
            harness,
            options["task"],
            place=place,
            model=options["model_name"],
            timeout_s=options["wall_s"],
            workdir=WORK if options["work"] else None,
            on_output=write,
        )
    )
    stopping = asyncio.ensure_future(progress.stopped.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result().exit_code
        raise Contained("the agent was stopped where it stood: see the containment.action in the record")
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _speaker(options: dict[str, Any]) -> Callable[[str], None]:
    if options["quiet"] or options["as_json"]:
        return lambda _: None
    return lambda text: click.echo(f"-- {text}", err=True)


def _summary(
    harness: Harness, sandbox: Sandbox, code: int, progress: Progress, events: list[EventView]
) -> dict[str, Any]:
    return {
        "harness": harness.name,
        "version": harness.version,
        "run": sandbox.run,
        "episode": sandbox.episode,
        "exit_code": code,
        "turns": progress.turns,
        "tool_calls": progress.tool_calls,
        "steps": sorted(progress.steps),
        "denied": progress.denied,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "denied_attempts": [event for event in events if is_denial(event)],
        "findings_list": [event for event in events if event["kind"] == "finding"],
    }
