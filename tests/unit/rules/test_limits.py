"""Budgets of grants and limits on queries: arithmetic without a clock of its own."""

from __future__ import annotations

import base64
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.rules.budgets import MINUTE_NS, Bucket, BudgetState, Usage, charge, draw, remaining_out
from vallum.rules.grants import Budget, Ruleset, parse_grant
from vallum.rules.queries import QueryLimits, QueryLoad, judge_query_load, looks_random

SECOND_NS = 10**9


def test_totals_are_exact_and_a_denied_use_changes_nothing() -> None:
    budget = Budget(bytes_out=100, bytes_in=50, request_bytes=60)
    state, decision = charge(budget, BudgetState(), Usage(bytes_out=100, bytes_in=50), 0, grant="g")
    assert (decision.verdict, decision.rule, remaining_out(budget, state)) == ("allow", "g", 0)
    after, decision = charge(budget, state, Usage(bytes_out=1), 0, grant="g")
    assert (after, decision.verdict, decision.rule) == (state, "deny", "budget")
    assert "at most 100 bytes out" in decision.reason
    assert charge(budget, state, Usage(bytes_in=1), 0)[1].verdict == "deny"
    assert charge(budget, state, Usage(connections=1), 0)[1].verdict == "allow"
    assert charge(budget, state, Usage(requests=1, request_bytes=60), 0)[1].verdict == "allow"
    assert charge(budget, state, Usage(request_bytes=61), 0)[1].verdict == "deny"


def test_connections_at_once() -> None:
    budget, state = Budget(connections=2), BudgetState()
    for _ in range(2):
        state, decision = charge(budget, state, Usage(connections=1), 0)
        assert decision.verdict == "allow"
    assert charge(budget, state, Usage(connections=1), 0)[1].verdict == "deny"
    state, _ = charge(budget, state, Usage(connections=-1), 0)
    assert charge(budget, state, Usage(connections=1), 0)[1].verdict == "allow"


@pytest.mark.parametrize("field", ["connections", "requests"])
def test_rates_refill(field: str) -> None:
    budget = Budget(**{f"{field}_per_minute": 6})
    state, now = BudgetState(), 5 * SECOND_NS
    for _ in range(6):
        state, decision = charge(budget, state, Usage(**{field: 1}), now)
        assert decision.verdict == "allow"
    assert charge(budget, state, Usage(**{field: 1}), now)[1].verdict == "deny"
    assert charge(budget, state, Usage(**{field: 1}), now + 9 * SECOND_NS)[1].verdict == "deny"
    assert charge(budget, state, Usage(**{field: 1}), now + 10 * SECOND_NS)[1].verdict == "allow"
    assert charge(budget, state, Usage(**{field: 1}), now - MINUTE_NS)[1].verdict == "deny"


@given(st.integers(1, 50), st.lists(st.integers(0, MINUTE_NS), max_size=60))
def test_no_minute_holds_more_than_twice_the_rate(rate: int, gaps: list[int]) -> None:
    bucket, now, taken = Bucket(), 0, []
    for gap in gaps:
        now += gap
        drawn = draw(bucket, rate, 1, now)
        if drawn is not None:
            bucket = drawn
            taken.append(now)
    for start in taken:
        assert sum(start <= at < start + MINUTE_NS for at in taken) <= 2 * rate


RULES = Ruleset(allow=(parse_grant("*.cdn.example"), parse_grant("api.example"), parse_grant("exact.cdn.example")))


def ask(
    names: list[str], limits: QueryLimits | None = None, rules: Ruleset = RULES, gap_ns: int = SECOND_NS
) -> list[str]:
    state, verdicts = QueryLoad(), []
    for number, name in enumerate(names):
        state, decision = judge_query_load(rules, state, name, number * gap_ns, limits)
        assert decision.rule == "dns-exfiltration"
        verdicts.append(decision.verdict)
    return verdicts


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("exact.cdn.example", "allow"),
        ("api.example", "allow"),
        ("eu-west-1.cdn.example", "allow"),
        ("productionresultssa12.cdn.example", "allow"),
        ("my-very-long-project-preview-branch.cdn.example", "allow"),
        ("mycompanyinternaldocumentation.cdn.example", "allow"),
        ("6d7920736563726574206b65792069732061.cdn.example", "deny"),
        ("nbswy3dpeb3w64tmmqqho2dfebxgkzlt.cdn.example", "deny"),
        ("a" * 41 + ".cdn.example", "deny"),
        ("a.b.c.d.e.f.g.h.i.cdn.example", "deny"),
        ("a b.cdn.example", "deny"),
    ],
)
def test_single_names(name: str, verdict: str) -> None:
    assert ask([name]) == [verdict]


def test_random_payloads_are_seen() -> None:
    source = random.Random(7)
    payloads = [source.randbytes(30) for _ in range(200)]
    for encode in (bytes.hex, lambda raw: base64.b32encode(raw).decode().lower()):
        assert sum(looks_random(encode(raw)[:40]) for raw in payloads) > 180


def test_many_names_under_one_wildcard() -> None:
    names = [f"host-{number}.cdn.example" for number in range(30)]
    assert ask(names, QueryLimits(distinct=20)) == ["allow"] * 20 + ["deny"] * 10
    assert ask(names[:5] * 20, QueryLimits(distinct=20)) == ["allow"] * 100
    assert "deny" in ask(names, QueryLimits(distinct_bytes=100))


def test_rate_and_parents() -> None:
    assert ask(["api.example"] * 12, QueryLimits(per_minute=10), gap_ns=0) == ["allow"] * 10 + ["deny"] * 2
    assert ask(["api.example"] * 12, QueryLimits(per_minute=10), gap_ns=6 * SECOND_NS) == ["allow"] * 12
    anywhere = Ruleset(allow=(parse_grant("*"),))
    hosts = [f"www.site{number}.example" for number in range(12)]
    assert ask(hosts, QueryLimits(parents=10), anywhere) == ["allow"] * 10 + ["deny"] * 2
