"""A conversation that has grown too long, made shorter."""

from __future__ import annotations

from typing import Protocol

from vallum.agent.messages import Message, Usage
from vallum.agent.models.base import Model

_ASK = (
    "The conversation is getting too long and will be cut. Write a summary for yourself that replaces it: the task, what "
    "was found out (paths, names, figures, exact errors), what was changed, what is left to do, and what must not be tried "
    "again. Only the summary."
)


class Compaction(Protocol):
    """Called before each turn."""

    async def compact(self, messages: list[Message], prompt_tokens: int, model: Model) -> tuple[list[Message], Usage]:
        """The conversation to go on with (the same list when it need not be shorter), and what making it took."""
        ...


class Summary:
    """Has the model summarise everything but the beginning and the last turns, once the prompt passes a size."""

    def __init__(self, *, above_tokens: int = 100_000, keep_last: int = 8) -> None:
        self._above = above_tokens
        self._keep = keep_last

    async def compact(self, messages: list[Message], prompt_tokens: int, model: Model) -> tuple[list[Message], Usage]:
        """As :meth:`Compaction.compact`."""
        start = head_length(messages)
        end = cut_before(messages, len(messages) - self._keep)
        if prompt_tokens <= self._above or end <= start:
            return messages, Usage()
        reply = await model.reply([*messages[:end], Message(role="user", content=_ASK)], [])
        summary = Message(role="user", content=f"Summary of the work so far:\n{reply.message.content}")
        return [*messages[:start], summary, *messages[end:]], reply.usage


def head_length(messages: list[Message]) -> int:
    """How many messages the beginning has: system and task."""
    return next((i + 1 for i, message in enumerate(messages) if message.role == "user"), len(messages))


def cut_before(messages: list[Message], index: int) -> int:
    """The last place at or before ``index`` where cutting parts no tool call from its result."""
    at = max(0, min(index, len(messages)))
    while at > 0 and (at == len(messages) or messages[at].role == "tool"):
        at -= 1
    return at
