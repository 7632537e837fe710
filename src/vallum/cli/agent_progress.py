"""What an agent in a cell does, told line by line while it does it: from the record, never from the agent's own words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from vallum.cli.run import is_denial
from vallum.client import wire
from vallum.client.connection import view
from vallum.client.face import EventView, Node, Sandbox
from vallum.core.errors import VallumError
from vallum.core.text import show

_EVERY_S = 0.5
_WIDTH = 100


@dataclass
class Progress:
    """What was counted."""

    turns: int = 0
    """Answers of the model."""
    tool_calls: int = 0
    steps: set[int] = field(default_factory=set)
    denied: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the cell was frozen: nothing in it goes on by itself."""

    def take(self, event: EventView) -> str:
        """Count an event; the line to show, empty when there is none."""
        step = event["scope"].get("step")
        if event["kind"] == "model.call" and event["state"] == "closed":
            self.turns += 1
            self.prompt_tokens += event.get("prompt_tokens") or 0
            self.completion_tokens += event.get("completion_tokens") or 0
            return f"turn {self.turns:<3} {event['model_used'] or event['model']}: {event['finish'] or event.get('status')}"
        if event["kind"] == "tool.call" and event.get("source") == "model":
            self.tool_calls += 1
            self.steps.add(step)
            return f"  step {step:<3} {show(event['name'], 24)}  {show(_say(event['arguments']), _WIDTH)}"
        if is_denial(event):
            self.denied += 1
            return f"  denied   step {step if step is not None else '?'}  {_target(event)}  rule {event['rule']}"
        if event["kind"] == "containment.action":
            if event["action"] == "freeze_cell":
                self.stopped.set()
            return f"  {event['action']}  {show(event['reason'], _WIDTH)}"
        if event["kind"] == "finding":
            return f"  finding  step {step}  {event['severity']}  {show(event['title'], _WIDTH)}"
        return ""

    def total(self) -> str:
        """In one line."""
        return (
            f"{self.turns} turn{'s' * (self.turns != 1)}  {self.tool_calls} tool call{'s' * (self.tool_calls != 1)}  "
            f"{self.denied} denied  {self.prompt_tokens} + {self.completion_tokens} tokens"
        )


def _say(arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    command = value.get("command") or value.get("cmd") if isinstance(value, dict) else None
    if isinstance(command, list):
        return " ".join(map(str, command))
    return str(command) if command else arguments


def _target(event: EventView) -> str:
    if event["kind"] == "dns.query":
        return f"DNS {show(event['qname'], 80)}"
    host = event.get("dst_host") or event.get("host") or event.get("dst_ip") or event.get("model") or "?"
    port = event.get("dst_port") or event.get("port")
    return show(str(host), 80) + (f":{port}" if port is not None else "")


class Follower:
    """Reads what is new in the record of one episode."""

    def __init__(self, node: Node, sandbox: Sandbox, progress: Progress, say: Callable[[str], None]) -> None:
        self._node = node
        self._sandbox = sandbox
        self._progress = progress
        self._say = say
        self._start: wire.Cursor | None = None

    async def look(self) -> None:
        """Take what is new."""
        connection = self._node.connection
        while True:
            request = wire.Events(
                seq=connection.next_seq(),
                run=self._sandbox.run,
                episode=self._sandbox.episode,
                start=self._start,
                limit=5000,
            )
            page = await connection.call(request, wire.EventPage)
            for line in page.lines:
                if text := self._progress.take(EventView(view(line))):
                    self._say(text)
            self._start = page.after
            if page.next is None:
                return


@contextlib.asynccontextmanager
async def follow(node: Node, sandbox: Sandbox, say: Callable[[str], None]) -> AsyncIterator[Progress]:
    """Tell what happens in the cell while the block runs, and all of it at its end."""
    progress = Progress()
    follower = Follower(node, sandbox, progress, say)
    task = asyncio.ensure_future(_keep_looking(follower))
    try:
        yield progress
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, VallumError):
            await task
        with contextlib.suppress(VallumError):
            await follower.look()


async def _keep_looking(follower: Follower) -> None:
    while True:
        await asyncio.sleep(_EVERY_S)
        await follower.look()
