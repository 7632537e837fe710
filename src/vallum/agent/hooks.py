"""Code of the owner's before and after each tool call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Protocol

from vallum.agent.messages import ToolCall
from vallum.core.errors import InvalidInput
from vallum.core.text import keep, show

BLOCK = 2
"""Exit code by which a :class:`CommandHook` blocks a call."""


class Hook(Protocol):
    """Told of every tool call. What it raises ends the run: a hook that fails must not be a hook that is skipped."""

    async def before(self, call: ToolCall) -> str | None:
        """None: go on. A text blocks the call, and is told to the model."""
        ...

    async def after(self, call: ToolCall, result: str) -> str:
        """The result as the model shall see it."""
        ...


class CommandHook:
    """A program of the owner's, run on the host with the call as JSON on its standard input.

    Exit code 0: go on; 2: block, with its standard error as the reason; any other is an error of the hook and ends the run.
    The JSON holds text of the model: a program must not evaluate it.
    """

    def __init__(self, argv: Sequence[str], *, tool: str | None = None, timeout_s: float = 60.0) -> None:
        """``tool`` None: for every tool."""
        if not argv:
            raise InvalidInput("the hook's command is empty: give at least a program")
        self._argv = list(argv)
        self._tool = tool
        self._timeout_s = timeout_s

    async def before(self, call: ToolCall) -> str | None:
        """Run the program with ``{"event": "before", "tool", "arguments", "call"}``."""
        return await self._run(call, {"event": "before"})

    async def after(self, call: ToolCall, result: str) -> str:
        """Run the program with ``{"event": "after", ..., "result"}``; what it blocks is taken out of the result."""
        why = await self._run(call, {"event": "after", "result": result})
        return result if why is None else f"(taken out by a hook: {why})"

    async def _run(self, call: ToolCall, event: dict[str, str]) -> str | None:
        if self._tool not in (None, call.name):
            return None
        body = json.dumps({**event, "tool": call.name, "arguments": call.arguments, "call": call.id}).encode()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise InvalidInput(f"the hook {self._argv[0]} cannot be run: {error.strerror}") from error
        try:
            _, said = await asyncio.wait_for(process.communicate(body), self._timeout_s)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise InvalidInput(f"the hook {self._argv[0]} did not end in {self._timeout_s:g} s") from None
        if process.returncode == 0:
            return None
        text = show(keep(said).strip(), 2000)
        if process.returncode == BLOCK:
            return text or "blocked by a hook"
        raise InvalidInput(f"the hook {self._argv[0]} ended with exit code {process.returncode}: {text}")
