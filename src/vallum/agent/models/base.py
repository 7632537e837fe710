"""What the loop needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vallum.agent.messages import Message, Reply, ToolSpec
from vallum.core.errors import VallumError


class ModelError(VallumError):
    """A model could not be asked, or its answer cannot be used. The conversation is kept: the run can be resumed."""

    exit_code = 5


class ModelStopped(ModelError):
    """The gateway has stopped the episode: asking again is of no use."""


class Model(Protocol):
    """Answers a conversation."""

    name: str

    async def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """The next message of the assistant.

        Raises:
            ModelError: it gave none.
        """
        ...
