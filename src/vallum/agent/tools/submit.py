"""The end of a task, said by the model."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import Effect, Submitted, read_arguments, write_schema


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``submit``."""

    answer: Annotated[str, msgspec.Meta(description="The result, or what was done and how it was checked.")] = ""


class Submit:
    """Ends the loop."""

    effect: Effect = "none"
    is_parallel: ClassVar[bool] = False
    spec = ToolSpec(
        name="submit",
        description="The task is done (or cannot be done: say why). Ends the work.",
        parameters=write_schema(Arguments),
    )

    async def call(self, call_id: str, arguments: str) -> str:
        """Always raises :class:`Submitted`."""
        raise Submitted(read_arguments(arguments, Arguments).answer)

    async def close(self) -> None:
        """Holds nothing."""
