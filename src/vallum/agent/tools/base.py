"""What the loop needs of a tool."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, TypeVar

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.core.decoding import MALFORMED
from vallum.core.errors import VallumError

Effect = Literal["none", "read", "edit", "run"]
"""The most that a tool can do: change only the conversation; look; change files; anything that the cell permits."""

MAX_RESULT_CHARS = 16_000


class ToolError(VallumError):
    """A call did not work. The sentence is told to the model, and the conversation goes on."""


class Submitted(Exception):
    """The model says that the task is done. Ends the loop."""

    def __init__(self, answer: str) -> None:
        super().__init__(answer)
        self.answer = answer


class Tool(Protocol):
    """Something that the model can ask for."""

    spec: ToolSpec
    effect: Effect
    is_parallel: ClassVar[bool] = False
    """Whether several calls in one reply may run side by side."""

    async def call(self, call_id: str, arguments: str) -> str:
        """Do it; what it says is told to the model. What happens in the cell is charged to ``call_id``.

        Raises:
            BadArguments: the JSON is broken or does not fit; counts against the format budget.
            ToolError: it did not work.
            Submitted: the task is done.
        """
        ...

    async def close(self) -> None:
        """Let go of what it holds."""
        ...


class BadArguments(ToolError):
    """What the model gave is no JSON, or not what the tool takes."""


A = TypeVar("A")


def read_arguments(arguments: str, kind: type[A]) -> A:
    """The arguments of a call.

    Raises:
        BadArguments: they are not usable; says where and what is wanted.
    """
    try:
        return msgspec.json.decode(arguments or "{}", type=kind)
    except (*MALFORMED, UnicodeEncodeError) as error:
        raise BadArguments(
            f"the arguments are not usable: {error}. Send one JSON object as the tool describes"
        ) from error


def write_schema(kind: type[Any]) -> dict[str, Any]:
    """JSON Schema of a struct's fields, without references."""
    (schema,), components = msgspec.json.schema_components([kind])
    name = schema["$ref"].rpartition("/")[2]
    return {**components[name], "additionalProperties": False}


def clip(text: str, limit: int = MAX_RESULT_CHARS) -> str:
    """Head and tail of a text, with a line between that says how much is missing: errors tend to be at the end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out} characters left out: narrow the command, or write to a file ...]\n{text[-half:]}"
