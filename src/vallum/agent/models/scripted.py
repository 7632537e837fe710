"""A model that says what it was told to, for tests and demonstrations. Deterministic: nothing is sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vallum.agent.messages import Message, Reply, ToolCall, ToolSpec, Usage
from vallum.agent.models.base import ModelError

Line = (
    str | Message | tuple[str, dict[str, Any]] | list[tuple[str, dict[str, Any]]] | Callable[[Sequence[Message]], Any]
)
"""Text; a message; one call ``(tool, arguments)``; several calls; or a function of the conversation that gives one of these."""


class ScriptedModel:
    """Gives its lines one after the other.

    Example::

        ScriptedModel([("bash", {"command": "ls"}), ("submit", {"answer": "done"})])
    """

    def __init__(self, lines: Iterable[Line], *, name: str = "scripted") -> None:
        self.name = name
        self._lines = iter(lines)
        self._count = 0
        self.asked: list[list[Message]] = []
        """Every conversation that it was asked to go on with."""

    async def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """The next line.

        Raises:
            ModelError: there is none left.
        """
        self.asked.append(list(messages))
        line: Any = next(self._lines, None)
        if callable(line):
            line = line(messages)
        if line is None:
            raise ModelError("the scripted model has no line left: give it more, or lower the limit of turns")
        message = self._read(line)
        words = sum(len(one.content.split()) for one in messages)
        usage = Usage(prompt_tokens=words, completion_tokens=len(message.content.split()) + len(message.tool_calls))
        return Reply(message=message, usage=usage, finish="tool_calls" if message.tool_calls else "stop")

    def _read(self, line: Any) -> Message:
        if isinstance(line, Message):
            return line
        if isinstance(line, str):
            return Message(role="assistant", content=line)
        calls = [line] if isinstance(line, tuple) else line
        return Message(role="assistant", tool_calls=tuple(self._call(name, arguments) for name, arguments in calls))

    def _call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        self._count += 1
        return ToolCall(id=f"call_{self.name}_{self._count}", name=name, arguments=json.dumps(arguments))
