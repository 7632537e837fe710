"""The reference agent on a terminal: what it says, runs and is told, as it happens. Everything shown is hostile text."""

from __future__ import annotations

import asyncio
import json

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from vallum.agent.loop import Observer, Outcome
from vallum.agent.messages import Reply, ToolCall
from vallum.core.text import show

MAX_LINES = 14
MAX_COLUMNS = 400


class TerminalView(Observer):
    """Prints turns. ``console`` writes to standard error, so that an answer on standard output stays alone."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._tokens = 0
        self._cost = 0

    def turn_started(self, number: int, depth: int) -> None:
        """A line between turns, with what was used so far."""
        if depth == 0:
            cost = f"  ${self._cost / 1e6:.4f}" if self._cost else ""
            self.console.print(Rule(Text(f"turn {number}  {self._tokens:,} tokens{cost}"), style="dim", align="left"))

    def replied(self, reply: Reply, depth: int) -> None:
        """The model's words."""
        self._tokens += reply.usage.tokens
        self._cost += reply.usage.cost_usd_micros
        if reply.message.content.strip():
            self._print(reply.message.content, depth)

    def call_started(self, call: ToolCall, depth: int) -> None:
        """What it asks for."""
        self._print(headline(call), depth, "bold cyan")

    def call_ended(self, call: ToolCall, result: str, ok: bool, depth: int) -> None:
        """What came of it."""
        if call.name != "submit":
            self._print(result, depth, "dim" if ok else "yellow")

    def compacted(self, before: int, after: int) -> None:
        """The conversation was shortened."""
        self.console.print(Text(f"conversation summarised: {before} messages became {after}", "magenta"))

    def ended(self, outcome: Outcome) -> None:
        """How it ended; the answer itself goes to standard output."""
        style = "green" if outcome.status == "submitted" else "red"
        self.console.print(Rule(Text(outcome.status, style), style=style, align="left"))
        if outcome.detail:
            self.console.print(Text(show(outcome.detail, 300), style))

    async def ask(self, call: ToolCall) -> str | None:
        """Ask the person: yes, no (with a reason), or yes to everything from here on. For :func:`make_approval`."""
        self._print(headline(call), 0, "bold yellow")
        word = (await asyncio.to_thread(self.console.input, "run it? [y]es, or say why not: ")).strip()
        return None if word.lower() in ("", "y", "yes") else word.removeprefix("n ").strip() or "the person said no"

    def _print(self, text: str, depth: int, style: str = "") -> None:
        lines = text.rstrip().split("\n")
        more = len(lines) - MAX_LINES
        if more > 1:
            half = MAX_LINES // 2
            lines = [*lines[:half], f"... {more} more lines ...", *lines[-half:]]
        indent = "    " * depth
        for line in lines:
            self.console.print(Text(indent + show(line, MAX_COLUMNS), style), soft_wrap=True)


def headline(call: ToolCall) -> str:
    """A call in one or few lines: the command of a shell, else name and arguments."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return f"{call.name} {call.arguments}"
    if call.name == "bash" and isinstance(arguments.get("command"), str):
        return f"$ {arguments['command']}"
    if call.name == "edit":
        return f"edit {arguments.get('action')} {arguments.get('path')}"
    rest = "  ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f"{call.name} {rest}".rstrip()
