"""Tools of the host: functions of this process that a cell may call over MCP at ``http://tools.vallum.internal/mcp``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vallum.client import wire
from vallum.client.connection import Connection
from vallum.core.errors import InvalidInput, VallumError

MAX_RESULT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class HostTool:
    """A function that cells may call.

    It is called with the guest's arguments as keyword arguments: they are the guest's words, and nobody has held them
    against the schema. An ``async`` function runs on the event loop, any other in a thread. What it returns is told as
    text (a string as it is, anything else as JSON); what it raises is told as an error, with the exception's words.
    """

    name: str
    description: str
    function: Callable[..., Any] = field(repr=False)
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    """JSON Schema of the arguments, an object."""

    def on_wire(self) -> wire.HostTool:
        """As the node is told.

        Raises:
            InvalidInput: the schema is no JSON.
        """
        try:
            schema = msgspec.json.encode(dict(self.schema))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the schema of the tool {self.name} is no JSON: {error}") from error
        return wire.HostTool(name=self.name, description=self.description, input_schema=schema)

    async def call(self, arguments: str) -> str:
        """JSON of an MCP ``CallToolResult``, whatever comes of it."""
        try:
            given = msgspec.json.decode(arguments, type=dict[str, Any])
            if inspect.iscoroutinefunction(self.function):
                result = await self.function(**given)
            else:
                result = await asyncio.to_thread(self.function, **given)
            text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
            if len(text.encode()) > MAX_RESULT_BYTES:
                raise ValueError(f"the result has more than {MAX_RESULT_BYTES} bytes")
        except Exception as error:  # noqa: BLE001 - the caller's own code: what it raises is the guest's answer
            return write_result(f"{type(error).__name__}: {error}", is_error=True)
        return write_result(text)


def write_result(text: str, *, is_error: bool = False) -> str:
    """A ``CallToolResult`` of one text. Pure."""
    clean = text.encode("utf-8", "replace").decode()
    return msgspec.json.encode({"content": [{"type": "text", "text": clean}], "isError": is_error}).decode()


async def answer_calls(connection: Connection, sandbox: str, tools: Mapping[str, HostTool]) -> None:
    """Answer a cell's calls until it ends; several at once."""
    running: set[asyncio.Task[None]] = set()

    async def answer(made: wire.ToolCallMade) -> None:
        tool = tools.get(made.name)
        result = (
            await tool.call(made.arguments)
            if tool is not None
            else write_result("there is no such tool any more", is_error=True)
        )
        request = wire.AnswerToolCall(seq=connection.next_seq(), sandbox=sandbox, call=made.call, result=result)
        await connection.call(request, type(None))

    try:
        while True:
            request = wire.TakeToolCall(seq=connection.next_seq(), sandbox=sandbox)
            made = await connection.call(request, wire.ToolCallMade)
            task = asyncio.create_task(answer(made))
            running.add(task)
            task.add_done_callback(_see_end)
            task.add_done_callback(running.discard)
    except VallumError:
        return  # the cell or the node has ended
    finally:
        for task in running:
            task.cancel()


def _see_end(task: asyncio.Task[None]) -> None:
    """An answer that nobody waits for any more is no error."""
    if not task.cancelled():
        task.exception()
