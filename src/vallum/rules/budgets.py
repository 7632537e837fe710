"""How much a grant may be used: counters as frozen states, and the arithmetic on them. Pure; the gateway keeps the states.

One state belongs to one grant in one episode. A rate is a token bucket (its capacity is one minute's worth), so that a
burst at the turn of a minute cannot double it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vallum.core.verdict import Decision
from vallum.rules.grants import Budget

MINUTE_NS = 60 * 10**9
RULE = "budget"
"""Id of the decisions that refuse here."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket for so many a minute. ``level_ns`` is how much of its minute is used up (GCRA)."""

    level_ns: int = 0
    at_ns: int = 0
    """Monotonic time of the last change."""


def draw(bucket: Bucket, per_minute: int, count: int, now_ns: int) -> Bucket | None:
    """The bucket after ``count`` more, or None when that is over the rate.

    Time never goes back for a bucket: an earlier ``now_ns`` counts as the last one.
    """
    now_ns = max(now_ns, bucket.at_ns)
    if per_minute <= 0 or count > per_minute:
        return None if count > 0 else bucket
    level = max(0, bucket.level_ns - (now_ns - bucket.at_ns))
    level += -(-count * MINUTE_NS // per_minute)
    return None if level > MINUTE_NS else Bucket(level_ns=level, at_ns=now_ns)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What is about to be used."""

    bytes_out: int = 0
    bytes_in: int = 0
    connections: int = 0
    """Connections that begin (1) or have ended (-1)."""
    requests: int = 0
    request_bytes: int = 0
    """Body of one request, as far as it is known: its declared length first, then what has come of it."""


class BudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """What a grant has been used for so far."""

    bytes_out: int = 0
    bytes_in: int = 0
    connections: int = 0
    """Open now."""
    connecting: Bucket = Bucket()
    requesting: Bucket = Bucket()


def charge(
    budget: Budget, state: BudgetState, usage: Usage, now_ns: int, *, grant: str = ""
) -> tuple[BudgetState, Decision]:
    """The state after a use, and whether it may be. A use that is denied changes nothing.

    Args:
        budget: of the grant.
        state: before.
        usage: what is about to happen; nothing of it may happen when it is denied.
        now_ns: monotonic clock, nanoseconds.
        grant: id of the rule, for the reason.
    """
    connecting, requesting = state.connecting, state.requesting
    over = _over_total(budget, state, usage)
    if not over and usage.connections > 0 and budget.connections_per_minute is not None:
        drawn = draw(connecting, budget.connections_per_minute, usage.connections, now_ns)
        over = "" if drawn else f"{budget.connections_per_minute} connections a minute"
        connecting = drawn or connecting
    if not over and usage.requests > 0 and budget.requests_per_minute is not None:
        drawn = draw(requesting, budget.requests_per_minute, usage.requests, now_ns)
        over = "" if drawn else f"{budget.requests_per_minute} requests a minute"
        requesting = drawn or requesting
    if over:
        of = f" of {grant}" if grant else ""
        return state, Decision(verdict="deny", rule=RULE, reason=f"the budget{of} is used up: at most {over}")
    after = BudgetState(
        bytes_out=state.bytes_out + usage.bytes_out,
        bytes_in=state.bytes_in + usage.bytes_in,
        connections=max(0, state.connections + usage.connections),
        connecting=connecting,
        requesting=requesting,
    )
    return after, Decision(verdict="allow", rule=grant or RULE, reason="within its budget")


def remaining_out(budget: Budget, state: BudgetState) -> int | None:
    """Bytes that may still leave; None is no limit."""
    return None if budget.bytes_out is None else max(0, budget.bytes_out - state.bytes_out)


def _over_total(budget: Budget, state: BudgetState, usage: Usage) -> str:
    """The first limit that the use would pass; a use of nothing passes none."""
    counts: Mapping[str, tuple[int, int, int | None]] = {
        "bytes out": (state.bytes_out, usage.bytes_out, budget.bytes_out),
        "bytes in": (state.bytes_in, usage.bytes_in, budget.bytes_in),
        "connections at once": (state.connections, usage.connections, budget.connections),
        "bytes in one request": (0, usage.request_bytes, budget.request_bytes),
    }
    for what, (before, more, limit) in counts.items():
        if limit is not None and more > 0 and before + more > limit:
            return f"{limit} {what}"
    return ""
