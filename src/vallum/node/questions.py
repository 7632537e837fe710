"""The gateway's questions, whose is this socket: those of one cell wait for each other and are answered together.

A guest that connects a thousand times at once makes a thousand questions. Answering each by itself would look through
the guest's processes a thousand times, and nothing else of the node would run meanwhile. So one look answers up to
:data:`AT_ONCE`, and between two looks at one cell the node does other work for longer than the look took: a flood makes
the flooding cell wait, and no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vallum.core.clock import mono_ns
from vallum.core.errors import VallumError
from vallum.sensors.attribution import Answer
from vallum.sensors.socket_owner import Asked

AT_ONCE = 64

AnswerMany = Callable[[str, list[Asked], int], list[Answer]]
"""Answers for a cell; the third argument is when the first of them was asked (``mono_ns``)."""

_Waiting = tuple[Asked, asyncio.Future[Answer], int]


class Questions:
    """On one event loop."""

    def __init__(self, answer_many: AnswerMany, rest_s: Callable[[str], float]) -> None:
        """``rest_s``: how long a cell's processes should not be looked through yet."""
        self._answer_many = answer_many
        self._rest_s = rest_s
        self._waiting: dict[str, list[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> Answer:
        """As :meth:`vallum.core.ports.Attributor.attribute`.

        Raises:
            LookupError, OSError, VallumError: nobody can say.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        queue = self._waiting.get(cell)
        if queue is None:
            queue = self._waiting[cell] = []
            task = asyncio.get_running_loop().create_task(self._serve(cell, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        queue.append((Asked(protocol, src, dst), future, mono_ns()))
        return await future

    async def _serve(self, cell: str, queue: list[_Waiting]) -> None:
        lot: list[_Waiting] = []
        try:
            while queue:
                await asyncio.sleep(self._rest_s(cell))
                lot = queue[:AT_ONCE]
                del queue[:AT_ONCE]
                self._settle(cell, lot)
        finally:
            del self._waiting[cell]
            for _, future, _ in [*lot, *queue]:
                future.cancel()  # no effect on those that have their answer

    def _settle(self, cell: str, lot: list[_Waiting]) -> None:
        try:
            answers = self._answer_many(cell, [asked for asked, _, _ in lot], lot[0][2])
        except (VallumError, OSError, LookupError, ValueError) as error:
            for _, future, _ in lot:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future, _), answer in zip(lot, answers, strict=True):
            if not future.done():
                future.set_result(answer)
