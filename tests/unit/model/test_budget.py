"""The arithmetic of a model budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.messages import Usage
from vallum.gateway.kit import ModelBudget, ModelPrice
from vallum.gateway.model.budget import OverBudgetError, Spend, cost_usd_micros

PRICE = ModelPrice(prompt_usd_micros=3_000_000, completion_usd_micros=15_000_000)


def test_costs_are_rounded_up():
    assert cost_usd_micros(ModelPrice(prompt_usd_micros=1), Usage(prompt_tokens=1)) == 1
    assert cost_usd_micros(ModelPrice(), Usage(prompt_tokens=10**9)) == 0


def test_cached_tokens_without_a_price_of_their_own_cost_the_full_one():
    assert cost_usd_micros(PRICE, Usage(prompt_tokens=10, cached_tokens=4)) == 30


def test_parallel_calls_reserve():
    spend, budget = Spend(), ModelBudget(calls=1)
    spend.reserve(budget, PRICE, 10, None)
    with pytest.raises(OverBudgetError):
        spend.reserve(budget, PRICE, 10, None)


def test_the_answer_is_capped_by_what_is_left():
    taken = Spend().reserve(ModelBudget(tokens=100), PRICE, 60, None)
    assert (taken.max_completion, taken.tokens) == (40, 100)


BUDGETS = st.builds(
    ModelBudget,
    calls=st.none() | st.integers(0, 20),
    tokens=st.none() | st.integers(0, 5000),
    usd_micros=st.none() | st.integers(0, 50_000),
)


@given(BUDGETS, st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 5000), st.booleans()), max_size=30))
def test_one_after_the_other_no_limit_is_exceeded(budget, calls):
    spend = Spend()
    for prompt, answer, fails in calls:
        before = (spend.tokens, spend.usd_micros)
        try:
            taken = spend.reserve(budget, PRICE, prompt, None)
        except OverBudgetError:
            assert (spend.tokens, spend.usd_micros) == before
            continue
        if fails:
            spend.give_back(taken)
            assert (spend.tokens, spend.usd_micros) == before
            continue
        said = answer if taken.max_completion is None else min(answer, taken.max_completion)
        spend.settle(taken, Usage(prompt_tokens=prompt, completion_tokens=said), PRICE)
        assert budget.calls is None or spend.calls <= budget.calls
        assert budget.tokens is None or spend.tokens <= budget.tokens
        # A token may cost less than a micro-dollar, and one more than is left may be the smallest that can be asked.
        assert budget.usd_micros is None or spend.usd_micros <= budget.usd_micros + 15
