"""A model behind the cell's own model door: judged, budgeted, recorded, and the key is put in where the agent cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vallum.agent.messages import Message, Reply, ToolSpec
from vallum.agent.models.chat import read_reply, write_request


class ModelAnswer(Protocol):
    """What came back through the door."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def body(self) -> bytes:
        """Its bytes."""
        ...


class ModelDoor(Protocol):
    """A sandbox with a model."""

    async def model_request(self, target: str, body: bytes) -> ModelAnswer:
        """Post to the cell's model door from outside the cell. See :meth:`vallum.Sandbox.model_request`."""
        ...


class GatewayModel:
    """Asks through ``sandbox.model_request``. The sandbox must have been made with ``model=``."""

    def __init__(self, sandbox: ModelDoor, name: str, *, options: dict[str, Any] | None = None) -> None:
        self.name = name
        self._sandbox = sandbox
        self._options = options

    async def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """As :meth:`vallum.agent.models.base.Model.reply`."""
        body = write_request(self.name, messages, tools, self._options)
        answer = await self._sandbox.model_request("/v1/chat/completions", body)
        return read_reply(answer.status, answer.body)
