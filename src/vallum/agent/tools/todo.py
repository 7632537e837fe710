"""A list of what is to be done, kept by the model for itself."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import Effect, read_arguments, write_schema

State = Literal["pending", "active", "finished"]
_MARKS: dict[State, str] = {"pending": "[ ]", "active": "[>]", "finished": "[x]"}


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """One thing to do."""

    text: str
    state: State = "pending"


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``todo``."""

    items: Annotated[list[Item], msgspec.Meta(description="The whole list, in order.", max_length=50)]


class Todo:
    """Replaces the list and shows it."""

    effect: Effect = "none"
    is_parallel: ClassVar[bool] = False

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.spec = ToolSpec(
            name="todo",
            description="Write down the plan as a list and mark what is active or finished. Use it for work of several parts.",
            parameters={
                "type": "object",
                "properties": {
                    "items": {
                        "type": "array",
                        "maxItems": 50,
                        "description": "The whole list, in order.",
                        "items": write_schema(Item),
                    }
                },
                "required": ["items"],
                "additionalProperties": False,
            },
        )

    async def call(self, call_id: str, arguments: str) -> str:
        """The list as it is now."""
        self.items = read_arguments(arguments, Arguments).items
        return "\n".join(f"{_MARKS[item.state]} {item.text}" for item in self.items) or "(empty)"

    async def close(self) -> None:
        """Holds nothing."""
