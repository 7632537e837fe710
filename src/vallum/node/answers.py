"""Who answers the gateway's questions in the node: the parts of the node that know, each its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from vallum.core.errors import GatewayError
from vallum.core.events import AnyEvent
from vallum.core.verdict import Decision
from vallum.gateway.wire import CallTool, CloseSteps, Hold, OpenSteps, StopAgent
from vallum.node.questions import Questions
from vallum.sensors.attribution import Answer


class StepKeeper(Protocol):
    """Steps that a model's replies open (:class:`vallum.gateway.link.NodeSide` says what each method does)."""

    async def open_steps(self, frame: OpenSteps) -> Sequence[int]:
        """A step for each call."""
        ...

    async def close_steps(self, frame: CloseSteps) -> None:
        """The branch's steps are over."""
        ...

    async def stop_agent(self, frame: StopAgent) -> None:
        """Freeze the cell."""
        ...


class Answers:
    """:class:`vallum.gateway.link.NodeSide`. What no part was given for is refused, and so is what waits for it."""

    def __init__(self, questions: Questions, emit: Callable[[AnyEvent], int]) -> None:
        self._questions = questions
        self._emit = emit
        self.steps: StepKeeper | None = None
        self.decide: Callable[[Hold], Awaitable[Decision]] | None = None
        """Asks a person."""
        self.tool: Callable[[CallTool], Awaitable[str]] | None = None
        """Calls a tool of the host."""

    def attribute(
        self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]
    ) -> asyncio.Future[Answer]:
        """See the contract."""
        return self._questions.ask(cell, protocol=protocol, src=src, dst=dst)

    def emit(self, event: AnyEvent) -> int:
        """See the contract."""
        return self._emit(event)

    async def open_steps(self, frame: OpenSteps) -> Sequence[int]:
        """See the contract."""
        return await self._keeper().open_steps(frame)

    async def close_steps(self, frame: CloseSteps) -> None:
        """See the contract."""
        await self._keeper().close_steps(frame)

    async def stop_agent(self, frame: StopAgent) -> None:
        """See the contract."""
        await self._keeper().stop_agent(frame)

    async def hold(self, frame: Hold) -> Decision:
        """See the contract."""
        if self.decide is None:
            return Decision(
                verdict="deny", rule=frame.rule, reason=f"{frame.subject}: nobody can be asked in this node"
            )
        return await self.decide(frame)

    async def call_tool(self, frame: CallTool) -> str:
        """See the contract."""
        if self.tool is None:
            raise GatewayError("this node has no tools of the host: offer none to the cell")
        return await self.tool(frame)

    def _keeper(self) -> StepKeeper:
        if self.steps is None:
            raise GatewayError("this node keeps no steps for models' replies: make the cell without a model door")
        return self.steps
