"""An agent that wants more of its model than its budget, by what it says in its requests."""

from __future__ import annotations

import json

import pytest

from vallum.core.messages import Usage
from vallum.gateway.kit import Canary, Kit, ModelBudget, ModelDoor, ModelPrice
from vallum.gateway.model.budget import OverBudgetError, Spend
from vallum.gateway.model.dialects import DIALECTS
from vallum.gateway.model.dialects.contract import Route
from vallum.gateway.model.plan import Plan, RefusedError, make_plan
from vallum.gateway.model.upstreams.scripted import Scripted

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


@pytest.mark.parametrize("place", ["model", "beta", "message"])
def test_a_canary_goes_to_no_provider_in_whatever_place(place: str) -> None:
    """The name of the model may be part of a path, and some headers are passed on."""
    value = b"AKIAVALLUM7Q2X4Z6R8T"
    door = ModelDoor(upstream="scripted", script=b"[]", capability="c")

    def plan(word: str) -> Plan:
        said = {"model": "m", "beta": "b", "message": "x", place: word}
        raw = {"model": said["model"], "max_tokens": 9, "messages": [{"role": "user", "content": said["message"]}]}
        headers = ((b"anthropic-beta", said["beta"].encode()),)
        route = Route(dialect="messages", operation="generate", model=said["model"])
        kit = Kit(canaries=(Canary(name="planted", value=value),), model=door)
        body = json.dumps(raw).encode()
        return make_plan(kit, door, Scripted(b"[]"), route, body, headers, "m1", Spend(), {}, True)

    with pytest.raises(RefusedError) as refused:
        plan(value.decode())
    assert refused.value.rule == "canary"
    assert plan("harmless").request.messages
