"""`vallum agent`: an agent at work in a cell, its model behind the cell's door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from vallum.agent.approval import MODES
from vallum.agent.harness.catalog import HARNESSES
from vallum.agent.limits import Limits
from vallum.cli.agent_harness import run_harness
from vallum.cli.agent_reference import EXIT_CODES, ReferenceOptions, run_reference, summarise
from vallum.cli.changes import print_changes
from vallum.cli.copying import check_copies, copy_all, copy_out_option
from vallum.cli.run import print_summary
from vallum.client.face import Node
from vallum.client.model import Model, ModelBudget
from vallum.client.places import Places
from vallum.core.errors import InvalidInput, VallumError
from vallum.core.scope import make_run_id
from vallum.core.text import show
from vallum.gateway.model.upstreams.scripted import Scripted

WORK = "/work"


@click.command()
@click.option(
    "--harness", type=click.Choice(sorted(HARNESSES)), help="Somebody else's agent, unmodified, instead of our own."
)
@click.option(
    "--install", type=click.Choice(["host", "setup-phase"]), default="host", show_default=True,
    help="Where --harness is installed: unpacked on the host once, or by the cell itself in its set-up phase.",
)  # fmt: skip
@click.option("--model-upstream", metavar="URL", help="Where the model is: http(s)://HOST[:PORT]/v1, or scripted:FILE.")
@click.option(
    "--model", "model_name", default="default", show_default=True, metavar="NAME", help="Which model to ask for."
)
@click.option(
    "--dialect", type=click.Choice(["same", "chat", "responses", "messages", "gemini"]),
    help="What the upstream speaks [default: chat; with --harness the agent's own].",
)  # fmt: skip
@click.option("--credential", default="", metavar="NAME", help="Key for the upstream, from `vallum credentials`.")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="Grant a host or @bundle to the agent. Repeatable.")
@click.option("--rules", "rules_file", metavar="FILE", help="Rule file (TOML).")
@click.option("--containment", type=click.Choice(["locked", "standard", "research"]), help="[default: standard]")
@click.option("--image", default="host", show_default=True, metavar="REF", help="Image of the cell.")
@click.option(
    "--work", metavar="DIR", help="Show DIR copy-on-write at /work and start there; DIR itself is not changed."
)
@click.option("--diff", "show_diff", is_flag=True, help="Print which files changed at the end.")
@copy_out_option
@click.option("--max-turns", type=int, default=100, show_default=True, help="Replies of the model.")
@click.option("--max-tokens", type=int, metavar="N", help="Prompt and completion tokens over all calls.")
@click.option("--max-cost", type=float, metavar="USD", help="Where the upstream's price is known.")
@click.option(
    "--timeout", "wall_s", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds for the whole task."
)
@click.option(
    "--approve", "mode", type=click.Choice(MODES), default="all", show_default=True,
    help="What runs without asking: all, edits (commands are asked about), ask (both are), plan (nothing runs).",
)  # fmt: skip
@click.option(
    "--hook", "hooks", multiple=True, metavar="CMD", help="Program run on the host before and after each tool call."
)
@click.option(
    "--mcp", "mcp", multiple=True, metavar="CMD",
    help="MCP server started in the cell, which speaks over stdin and stdout; its tools are the agent's. Repeatable.",
)  # fmt: skip
@click.option("--transcript", type=click.Path(path_type=Path), help="Keep the conversation in this file.")
@click.option("--resume", is_flag=True, help="Go on from --transcript.")
@click.option("--interactive", "-i", is_flag=True, help="Ask for another task after each.")
@click.option("--run", "run_id", metavar="ID", help="Id of the run (default: a new one).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end.")
@click.option("--quiet", "-q", is_flag=True, help="Only the answer.")
@click.argument("task", required=False, default="")
@click.pass_obj
def agent(places: Places, /, **options: Any) -> None:
    """Have an agent work on TASK in a fresh cell.

    Its tool calls are steps: every process, file and connection is charged to the call that caused it. It
    holds no key; the model is asked through the cell's door, within the budgets given here.

    \b
    Exit codes: 0 submitted, 5 ended without (limits, model, format), 125 containment stopped it.
    With --harness the agent's own; 124 when its time was up; 125 also when it cannot be installed.
    """
    if options["harness"] and options["mcp"]:
        raise click.UsageError("--mcp is for our own agent: tell the harness of its servers in its own configuration")
    if options["harness"]:
        sys.exit(asyncio.run(run_harness(places, options, make_model(options))))
    if not options["task"] and not options["resume"]:
        raise click.UsageError('say what to do: vallum agent "TASK"')
    if options["work"]:
        options["work"] = os.path.abspath(options["work"])  # noqa: PTH100 - no symlink is resolved: the user named this path
    sys.exit(asyncio.run(_run(places, options)))


def make_model(options: dict[str, Any]) -> Model:
    """The model of the command line.

    Raises:
        InvalidInput: none is given, its address is no URL, or its script cannot be read or used.
    """
    upstream = options["model_upstream"]
    if not upstream:
        raise InvalidInput(
            "no model is given: use --model-upstream https://HOST/v1 (and --credential NAME), or scripted:FILE to try it"
        )
    script = b""
    if upstream.startswith("scripted:"):
        path = Path(upstream.removeprefix("scripted:"))
        try:
            upstream, script = "scripted", path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"the script {path} cannot be read: {error.strerror}") from error
        Scripted(script)  # before a cell is made: what the gateway says of a script reaches nobody but the agent
    elif not upstream.startswith(("http://", "https://")):
        raise InvalidInput(
            f"--model-upstream {show(upstream, 200)!r} is not usable: give http(s)://HOST[:PORT]/v1, or scripted:FILE"
        )
    cost = options["max_cost"]
    return Model(
        upstream=upstream,
        dialect=options["dialect"] or ("same" if options["harness"] or upstream in ("scripted", "replay") else "chat"),
        credential=options["credential"],
        script=script,
        budget=ModelBudget(
            calls=options["max_turns"] if options["harness"] else None,
            tokens=options["max_tokens"],
            usd_micros=None if cost is None else int(cost * 1e6),
        ),
    )


async def _run(places: Places, options: dict[str, Any]) -> int:
    model = make_model(options)
    work = options["work"]
    copies = check_copies(options["copies"])
    async with Node(places=places) as node:
        sandbox = await node.sandbox(
            options["image"],
            containment=options["containment"],
            allow=options["allow"],
            rules=options["rules_file"],
            mounts=[f"{work}:{WORK}"] if work else [],
            workdir=WORK if work else None,
            run=options["run_id"] or make_run_id(),
            command=["vallum", "agent", options["task"]],
            model=model,
        )
        code = 125
        try:
            outcome = await run_reference(sandbox, _reference(options))
            code = EXIT_CODES[outcome.status]
            if options["show_diff"]:
                print_changes((await sandbox.diff()).changes)
            lost = await copy_all(sandbox, copies, quiet=options["quiet"] or options["as_json"])
            code = code or (lost.exit_code if lost is not None else 0)
        finally:
            with contextlib.suppress(VallumError):
                await sandbox.close(exit_code=code)
        events = await node.events(run=sandbox.run, episode=sandbox.episode)
    if options["as_json"]:
        click.echo(msgspec.json.encode(summarise(outcome, sandbox, events)).decode())
    elif not options["quiet"]:
        print_summary(sandbox, code, events)
    return code


def _reference(options: dict[str, Any]) -> ReferenceOptions:
    cost = options["max_cost"]
    return ReferenceOptions(
        task=options["task"],
        model=options["model_name"],
        limits=Limits(
            turns=options["max_turns"],
            tokens=options["max_tokens"],
            usd_micros=None if cost is None else int(cost * 1e6),
            wall_s=options["wall_s"],
        ).check(),
        mode=options["mode"],
        workdir=WORK if options["work"] else None,
        transcript=options["transcript"],
        resume=options["resume"],
        hooks=options["hooks"],
        mcp=options["mcp"],
        interactive=options["interactive"],
        quiet=options["quiet"],
        as_json=options["as_json"],
    )
