"""Whether a tool call may run, asked before it does. For the person's convenience: the rules of the cell hold in every mode."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol, get_args

from vallum.agent.messages import ToolCall
from vallum.agent.tools.base import Effect

Mode = Literal["all", "edits", "ask", "plan"]
"""``all``: everything runs; ``edits``: files may be changed, commands are asked about; ``ask``: both are asked about;
``plan``: nothing that changes anything runs."""
MODES: tuple[Mode, ...] = get_args(Mode)

Ask = Callable[[ToolCall], Awaitable[str | None]]
"""Ask the person about a call: None is yes, a text is no and why."""


class Approval(Protocol):
    """Decides on a call."""

    async def __call__(self, call: ToolCall, effect: Effect) -> str | None:
        """None: it may run. Otherwise why not, in words for the model."""
        ...


def make_approval(mode: Mode, ask: Ask | None = None) -> Approval:
    """The approval of a mode. Without ``ask`` what would be asked about is refused."""

    async def approve(call: ToolCall, effect: Effect) -> str | None:
        if effect in ("none", "read") or mode == "all" or (mode == "edits" and effect == "edit"):
            return None
        if mode == "plan":
            return "only planning is wanted: nothing may be changed or run. Look, think, and submit a plan"
        if ask is None:
            return "this needs the approval of a person, and nobody is there to give it"
        return await ask(call)

    return approve
