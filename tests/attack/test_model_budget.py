"""An agent that wants more of its model than its budget, by what it says in its requests."""

from __future__ import annotations

import pytest

from vallum.core.messages import Usage
from vallum.gateway.kit import ModelBudget, ModelPrice
from vallum.gateway.model.budget import OverBudgetError, Spend
from vallum.gateway.model.dialects import DIALECTS

PRICE = ModelPrice(prompt_usd_micros=1_000_000, completion_usd_micros=1_000_000)


def test_a_negative_length_reserves_no_credit_for_the_calls_beside_it() -> None:
    spend, budget = Spend(), ModelBudget(tokens=2000, usd_micros=2000)
    taken = spend.reserve(budget, PRICE, 900, -1_000_000)
    assert taken.tokens >= 900 and taken.usd_micros >= 900
    spend.reserve(budget, PRICE, 900, -1_000_000)
    with pytest.raises(OverBudgetError):
        spend.reserve(budget, PRICE, 900, -1_000_000)
    spend.settle(taken, Usage(prompt_tokens=10), PRICE)
    spend.reserve(budget, PRICE, 900, 10)


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 10**6},
        {"max_completion_tokens": 10**6},
        {"max_completion_tokens": 1, "max_tokens": 10**6},
        {"max_completion_tokens": 10**6, "max_tokens": 1},
        {"max_completion_tokens": None, "max_tokens": 10**6},
        {},
    ],
)
def test_every_limit_that_a_server_may_obey_is_lowered(asked: dict[str, int]) -> None:
    raw = {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked}
    sent = DIALECTS["chat"].adjust(raw, model="m", stream=False, temperature=None, max_tokens=50, token_ids=False)
    limits = [sent[key] for key in ("max_tokens", "max_completion_tokens") if key in sent]
    assert limits and all(1 <= limit <= 50 for limit in limits)
    free = DIALECTS["chat"].adjust(raw, model="m", stream=False, temperature=None, max_tokens=None, token_ids=False)
    assert free.items() >= asked.items()
