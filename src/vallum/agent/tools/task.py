"""A sub-agent as a tool with an end: its own conversation and limits, the same cell. What it did comes back as one answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, ClassVar

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import Effect, read_arguments, write_schema


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``task``."""

    prompt: Annotated[
        str, msgspec.Meta(description="Everything the sub-agent needs to know: it sees nothing else.", min_length=1)
    ]


class Task:
    """Hands a bounded piece of work to a fresh agent. Several in one reply work side by side."""

    effect: Effect = "run"
    is_parallel: ClassVar[bool] = True
    spec = ToolSpec(
        name="task",
        description=(
            "Give an independent piece of work to a sub-agent with a fresh conversation in the same sandbox; its answer "
            "comes back. Several calls in one reply run side by side."
        ),
        parameters=write_schema(Arguments),
    )

    def __init__(self, delegate: Callable[[str], Awaitable[str]]) -> None:
        """``delegate`` runs a sub-agent on a prompt and gives its answer."""
        self._delegate = delegate

    async def call(self, call_id: str, arguments: str) -> str:
        """The sub-agent's answer."""
        return await self._delegate(read_arguments(arguments, Arguments).prompt)

    async def close(self) -> None:
        """Holds nothing."""
