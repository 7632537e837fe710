"""Calls of tools of the host: from a cell's door to the client that offered the tool, and back.

A client takes calls with :class:`vallum.client.wire.TakeToolCall` and answers with ``AnswerToolCall``. Only the client
whose cell it is can do either. A call that nobody answers in time is an error for the guest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import msgspec

from vallum.client import wire
from vallum.core.decoding import MALFORMED
from vallum.core.errors import CellGone, GatewayError, InvalidInput
from vallum.gateway.wire import CallTool
from vallum.node.live import LiveCell

TIMEOUT_S = 300.0
MAX_WAITING = 256
"""Calls of one cell that nobody has taken yet."""


class _Queue:
    def __init__(self) -> None:
        self.untaken: asyncio.Queue[wire.ToolCallMade] = asyncio.Queue(MAX_WAITING)
        self.answers: dict[int, asyncio.Future[str]] = {}
        self.ended = asyncio.Event()


class ToolCalls:
    """Of every cell. On one event loop."""

    def __init__(self, find: Callable[[str], LiveCell | None]) -> None:
        self._find = find
        self._queues: dict[str, _Queue] = {}
        self._numbers = itertools.count(1)

    async def ask(self, frame: CallTool) -> str:
        """Have the client of a cell call its function: JSON of an MCP ``CallToolResult``.

        Raises:
            CellGone: the cell has ended. GatewayError: nobody answers.
        """
        if self._find(frame.cell) is None:
            raise CellGone(f"cell {frame.cell} has ended")
        queue = self._queues.setdefault(frame.cell, _Queue())
        number = next(self._numbers)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        queue.answers[number] = answer
        try:
            queue.untaken.put_nowait(wire.ToolCallMade(call=number, name=frame.name, arguments=frame.arguments))
            async with asyncio.timeout(TIMEOUT_S):
                return await answer
        except asyncio.QueueFull:
            raise GatewayError(f"{MAX_WAITING} calls wait for the client already") from None
        except TimeoutError:
            raise GatewayError(f"the client did not answer within {TIMEOUT_S:g} s") from None
        finally:
            queue.answers.pop(number, None)

    async def take(self, live: LiveCell) -> wire.ToolCallMade:
        """The next call that still waits for its answer; waits for one.

        Raises:
            CellGone: the cell has ended.
        """
        queue = self._queues.setdefault(live.id, _Queue())
        ended = asyncio.ensure_future(queue.ended.wait())
        try:
            while True:
                taking = asyncio.ensure_future(queue.untaken.get())
                await asyncio.wait({taking, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    raise CellGone(f"cell {live.id} has ended")
                if taking.result().call in queue.answers:
                    return taking.result()
        finally:
            ended.cancel()

    def answer(self, live: LiveCell, request: wire.AnswerToolCall) -> None:
        """Give a call its answer. One that nobody waits for any more is no error."""
        queue = self._queues.get(live.id)
        future = queue.answers.get(request.call) if queue is not None else None
        if future is not None and not future.done():
            future.set_result(request.result)

    def forget(self, cell: str) -> None:
        """The cell has ended."""
        queue = self._queues.pop(cell, None)
        if queue is None:
            return
        queue.ended.set()
        for future in queue.answers.values():
            if not future.done():
                future.set_exception(CellGone(f"cell {cell} has ended"))


def check_tool(tool: wire.HostTool) -> None:
    """Return when a tool can be offered.

    Raises:
        InvalidInput: its name, size or schema is not usable.
    """
    if not wire.TOOL_NAME.fullmatch(tool.name):
        raise InvalidInput(f"the tool name {tool.name!r} is not usable: 1 to 64 of A-Z, a-z, 0-9, '_' and '-'")
    if len(tool.description) > 16_000 or len(tool.input_schema) > 256 * 1024:
        raise InvalidInput(f"the description or schema of the tool {tool.name} is too long")
    try:
        msgspec.json.decode(tool.input_schema, type=dict[str, object])
    except MALFORMED as error:
        raise InvalidInput(f"the schema of the tool {tool.name} is no JSON object: {error}") from error
