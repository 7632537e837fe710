"""`vallum agent TASK`: the reference agent, in a cell of its own, with its model behind the cell's door."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from vallum.agent.approval import Mode, make_approval
from vallum.agent.hooks import CommandHook
from vallum.agent.limits import Limits
from vallum.agent.loop import Agent, Observer, Outcome
from vallum.agent.models.gateway import GatewayModel
from vallum.agent.reference import make_agent
from vallum.agent.tools.base import Tool
from vallum.agent.tools.mcp import open_mcp_tools
from vallum.agent.transcript import Transcript, read_transcript
from vallum.cli.agent_view import TerminalView
from vallum.cli.run import is_denial
from vallum.client.face import EventView, Sandbox
from vallum.core.errors import CellGone, Contained, InvalidInput

EXIT_CODES = {"submitted": 0, "limit": 5, "format": 5, "model": 5, "contained": 125}
"""How the agent ended -> exit code of the command."""


class ReferenceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says of the agent itself."""

    task: str
    model: str
    limits: Limits
    mode: Mode = "all"
    workdir: str | None = None
    user: str | None = None
    transcript: Path | None = None
    resume: bool = False
    hooks: tuple[str, ...] = ()
    """Command lines of hooks, run on the host; split as a shell would."""
    mcp: tuple[str, ...] = ()
    """Command lines of MCP servers, run in the cell."""
    interactive: bool = False
    """Go on with another task after each, asked for on the terminal."""
    quiet: bool = False
    as_json: bool = False


async def run_reference(sandbox: Sandbox, options: ReferenceOptions) -> Outcome:
    """Work on the task (and, when interactive, on those that follow). The sandbox must have a model.

    Raises:
        InvalidInput: the transcript cannot be read or exists already; a hook or an MCP server cannot be run.
    """
    async with open_mcp_tools(sandbox, options.mcp, cwd=options.workdir, user=options.user) as tools:
        return await _work(sandbox, options, tools)


async def _work(sandbox: Sandbox, options: ReferenceOptions, tools: Sequence[Tool]) -> Outcome:
    view = None if options.quiet or options.as_json else TerminalView()
    agent = await _make(sandbox, options, view, tools)
    try:
        if options.resume:
            assert options.transcript is not None
            messages, used = read_transcript(options.transcript)
            outcome = await agent.resume(messages, used)
        else:
            outcome = await agent.run(options.task)
        _show(outcome, options, view)
        while view is not None and options.interactive and outcome.status == "submitted":
            task = _next_task(view)
            if not task:
                break
            outcome = await agent.run(task)
            _show(outcome, options, view)
        return outcome
    finally:
        with contextlib.suppress(CellGone, Contained):
            await agent.close()


async def _make(sandbox: Sandbox, options: ReferenceOptions, view: TerminalView | None, tools: Sequence[Tool]) -> Agent:
    path = options.transcript
    if path is not None and path.exists() != options.resume:
        raise InvalidInput(
            f"the transcript {path} {'does not exist' if options.resume else 'exists already: give --resume to go on from it'}"
        )
    ask = view.ask if view is not None and sys.stdin.isatty() else None
    return await make_agent(
        sandbox,
        GatewayModel(sandbox, options.model),
        limits=options.limits,
        workdir=options.workdir,
        user=options.user,
        approval=make_approval(options.mode, ask),
        hooks=[CommandHook(_split(line)) for line in options.hooks],
        transcript=Transcript(path),
        observer=view or Observer(),
        tools=tools,
    )


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InvalidInput(f"--hook {line!r} is not a command line: {error}") from error


def _show(outcome: Outcome, options: ReferenceOptions, view: TerminalView | None) -> None:
    if view is not None:
        view.ended(outcome)
    if outcome.answer and not options.as_json:
        click.echo(outcome.answer)


def _next_task(view: TerminalView) -> str:
    try:
        return view.console.input("next task (empty to end): ").strip()
    except EOFError:
        return ""


def summarise(outcome: Outcome, sandbox: Sandbox, events: list[EventView]) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "run": sandbox.run,
        "episode": sandbox.episode,
        "status": outcome.status,
        "answer": outcome.answer,
        "detail": outcome.detail,
        "turns": outcome.turns,
        "usage": msgspec.to_builtins(outcome.usage),
        "denied_attempts": [event for event in events if is_denial(event)],
        "findings_list": [event for event in events if event["kind"] == "finding"],
    }
