"""How much of a cell's model budget is used. Pure arithmetic; units are in the names.

A call reserves what it will need at least before it is made, and its real use replaces the reservation. Calls that run
side by side may therefore exceed a limit of tokens by what they answer beyond :data:`RESERVED_COMPLETION` each.
"""

from __future__ import annotations

import msgspec

from vallum.core.messages import Usage
from vallum.gateway.kit import ModelBudget, ModelPrice

RESERVED_COMPLETION = 1024
"""Tokens that an answer is reckoned with until it has come."""
_MILLION = 1_000_000


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """What a call under way is reckoned with."""

    tokens: int
    usd_micros: int
    max_completion: int | None
    """The answer may have so many tokens at most; None is no limit."""


class OverBudgetError(Exception):
    """A call would exceed the budget; ``str`` says which limit."""


def cost_usd_micros(price: ModelPrice, usage: Usage) -> int:
    """What ``usage`` costs, rounded up."""
    cached = min(usage.cached_tokens or 0, usage.prompt_tokens or 0)
    plain = (usage.prompt_tokens or 0) - cached
    total = (
        plain * price.prompt_usd_micros
        + cached * (price.cached_usd_micros or price.prompt_usd_micros)
        + (usage.completion_tokens or 0) * price.completion_usd_micros
    )
    return -(-total // _MILLION)


class Spend:
    """What a cell has used and is about to use."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokens = 0
        self.usd_micros = 0

    def reserve(self, budget: ModelBudget, price: ModelPrice, prompt: int, wanted: int | None) -> Reservation:
        """Take what a call needs at least: ``prompt`` tokens, and ``wanted`` of the answer if the agent said so.

        Raises:
            OverBudgetError: it would exceed the budget. Nothing was taken.
        """
        if budget.calls is not None and self.calls + 1 > budget.calls:
            raise OverBudgetError(f"all {budget.calls} calls of the budget are used")
        completion = max(0, min(wanted or RESERVED_COMPLETION, RESERVED_COMPLETION))
        limits: list[int] = []
        if budget.tokens is not None:
            left = budget.tokens - self.tokens - prompt
            if left <= 0:
                raise OverBudgetError(
                    f"{self.tokens} of {budget.tokens} tokens are used and the request has about {prompt}"
                )
            limits.append(left)
        asked = cost_usd_micros(price, Usage(prompt_tokens=prompt))
        if budget.usd_micros is not None:
            money = budget.usd_micros - self.usd_micros - asked
            if money <= 0:
                raise OverBudgetError(
                    f"{self.usd_micros} of {budget.usd_micros} micro-dollars are used and the request costs about {asked}"
                )
            if price.completion_usd_micros:
                limits.append(max(1, money * _MILLION // price.completion_usd_micros))
        cap = min(limits) if limits else None
        completion = min(completion, cap) if cap is not None else completion
        taken = Reservation(
            tokens=prompt + completion,
            usd_micros=cost_usd_micros(price, Usage(prompt_tokens=prompt, completion_tokens=completion)),
            max_completion=cap,
        )
        self.calls += 1
        self.tokens += taken.tokens
        self.usd_micros += taken.usd_micros
        return taken

    def settle(self, taken: Reservation, used: Usage, price: ModelPrice) -> int:
        """Replace a reservation by what was used; what it cost in micro-dollars."""
        cost = cost_usd_micros(price, used)
        self.tokens += (used.prompt_tokens or 0) + (used.completion_tokens or 0) - taken.tokens
        self.usd_micros += cost - taken.usd_micros
        return cost

    def give_back(self, taken: Reservation) -> None:
        """The upstream answered nothing: what was reserved is free again. The call counts."""
        self.tokens -= taken.tokens
        self.usd_micros -= taken.usd_micros
