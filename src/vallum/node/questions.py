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

_Waiting = tuple[Asked, "asyncio.Future[Answer]", int]


class Questions:
    """On one event loop."""

    def __init__(self, answer_many: AnswerMany, rest_s: Callable[[str], float]) -> None:
        """``rest_s``: how long a cell's processes should not be looked through yet."""
        self._answer_many = answer_many
        self._rest_s = rest_s
        self._waiting: dict[str, list[_Waiting]] = {}

    def ask(self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> asyncio.Future[Answer]:
        """The future of an answer as :meth:`vallum.core.ports.Attributor.attribute` gives it.

        It raises LookupError, OSError, VallumError or ValueError where nobody can say.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        queue = self._waiting.get(cell)
        if queue is None:
            queue = self._waiting[cell] = []
            self._plan(loop, cell)
        queue.append((Asked(protocol, src, dst), future, mono_ns()))
        return future

    def _plan(self, loop: asyncio.AbstractEventLoop, cell: str) -> None:
        # Not at once: what else came in the same turn is answered by the same look.
        rest_s = self._rest_s(cell)
        if rest_s > 0:
            loop.call_later(rest_s, self._serve, loop, cell)
        else:
            loop.call_soon(self._serve, loop, cell)

    def _serve(self, loop: asyncio.AbstractEventLoop, cell: str) -> None:
        if self._rest_s(cell) > 0:  # somebody else had a look meanwhile
            self._plan(loop, cell)
            return
        queue = self._waiting[cell]
        lot = queue[:AT_ONCE]
        del queue[:AT_ONCE]
        if queue:
            loop.call_soon(self._plan, loop, cell)
        else:
            del self._waiting[cell]
        # Who has gone meanwhile needs no answer.
        self._settle(cell, [one for one in lot if not one[1].done()])

    def _settle(self, cell: str, lot: list[_Waiting]) -> None:
        if not lot:
            return
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
