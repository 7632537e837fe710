"""How far an agent may go. Checked by the agent itself, for its own good; the walls do not rely on it."""

from __future__ import annotations

import time

import msgspec

from vallum.agent.messages import Usage
from vallum.core.errors import InvalidInput


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """None is no limit. Sub-agents draw on the same tokens, cost and time as whoever called them."""

    turns: int | None = 100
    """Replies of the model."""
    tokens: int | None = None
    """Prompt and completion over all replies."""
    usd_micros: int | None = None
    wall_s: float | None = None
    format_errors: int = 3
    """Replies in a row without a usable tool call."""
    subagent_turns: int = 30
    """Replies of one sub-agent."""

    def check(self) -> Limits:
        """Itself.

        Raises:
            InvalidInput: a limit is not positive.
        """
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidInput(f"the limit {name} is {value}: give a positive number, or leave it out")
        return self


class Meter:
    """What an agent and its sub-agents have used, together."""

    def __init__(self, limits: Limits, used: Usage | None = None) -> None:
        self.limits = limits
        self.used = used or Usage()
        self.started_s = time.monotonic()

    def add(self, usage: Usage) -> None:
        """Count a reply."""
        self.used += usage

    def spent(self) -> str | None:
        """Which limit has been reached, in words; None while there is room."""
        limits = self.limits
        if limits.tokens is not None and self.used.tokens >= limits.tokens:
            return f"{self.used.tokens} tokens of {limits.tokens} are used"
        if limits.usd_micros is not None and self.used.cost_usd_micros >= limits.usd_micros:
            return f"{self.used.cost_usd_micros / 1e6:.4f} of {limits.usd_micros / 1e6:.4f} dollars are used"
        if limits.wall_s is not None and self.left_s() == 0:
            return f"{limits.wall_s:g} s are over"
        return None

    def left_s(self) -> float | None:
        """Seconds until the time is up; None without such a limit."""
        if self.limits.wall_s is None:
            return None
        return max(0.0, self.limits.wall_s - (time.monotonic() - self.started_s))
