"""Limits on what can be carried out in the names of DNS queries. Pure; the gateway keeps the state of each episode.

A name that a grant names exactly carries nothing (it is one bit: asked or not) and only counts for the rate. Names under
a wildcard are chosen by the guest, so their labels are looked at and counted: ``judge_query_load`` is called after
:func:`~vallum.rules.verdicts.judge_query` has allowed the name and before anything is asked outside.

Covered: long and random-looking labels, many labels, many distinct names under one parent, many queries a minute, much
text in one episode. Not covered: a few bytes in plain words below the limits, and the timing of queries.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import msgspec

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.budgets import Bucket, draw
from vallum.rules.grants import Ruleset
from vallum.rules.names import normalise_name

RULE = "dns-exfiltration"
_HEX = frozenset("0123456789abcdef")


class QueryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What is let through. The defaults leave package managers, CDNs and browsers alone."""

    label: int = 40
    """Characters of one label that the guest chose. CDN labels are shorter; base32 and hex payloads want 50 to 63."""
    labels: int = 8
    """Labels that the guest chose."""
    entropy_bits: float = 3.6
    """Shannon entropy per character at which a label that does not read like words looks like data."""
    entropy_from: int = 16
    """Characters (hyphens apart) below which a label is not looked at so."""
    distinct: int = 200
    """Different names under one wildcard in an episode."""
    parents: int = 2000
    """Different parents under the grant ``*``, which leaves even those to the guest."""
    distinct_bytes: int = 4000
    """Characters chosen by the guest in different names, in an episode."""
    per_minute: int = 600
    """Queries of any kind."""


class QueryLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What an episode has asked for. Every name is kept once, so asking again costs nothing of the volume."""

    asked: dict[str, frozenset[str]] = {}
    """Pattern of the grant -> names asked for under it."""
    chosen_bytes: int = 0
    rate: Bucket = Bucket()


def entropy(text: str) -> float:
    """Shannon entropy in bits per character; 0 for no text."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def chosen_labels(rules: Ruleset, name: str) -> tuple[str, list[str]] | None:
    """The narrowest wildcard grant that a name is under and the labels that it leaves to the guest; None: an exact grant."""
    granting = [rule for rule in (*rules.hold, *rules.allow) if rule.matches_name(name)]
    if any(rule.is_exact for rule in granting):
        return None
    patterns = sorted({rule.host or "" for rule in granting}, key=len, reverse=True)
    pattern = patterns[0] if patterns else "*"
    if pattern != "*":
        return pattern, name.removesuffix(pattern[1:]).split(".")
    # Under ``*`` the last two labels are taken for the parent: a heuristic, and the reason why * is for research only.
    labels = name.split(".")
    return f"*.{'.'.join(labels[-2:])}", labels[:-2]


def looks_random(label: str, limits: QueryLimits | None = None) -> bool:
    """Whether a label looks like data and not like a name."""
    limits = limits or QueryLimits()
    bare = label.replace("-", "")
    if len(label) > limits.label:
        return True
    if len(bare) < limits.entropy_from:
        return False
    if len(bare) >= 24 and set(bare) <= _HEX:
        return True
    # Hex and base32 change between digits and letters all the time, names of machines once or twice.
    changes = sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(bare))
    if changes >= max(5, len(bare) // 5):
        return True
    letters = [c for c in bare if c.isalpha()]
    vowels = sum(c in "aeiouy" for c in letters)
    reads_like_words = len(letters) > len(bare) // 2 and 0.25 <= vowels / len(letters) <= 0.6
    return not reads_like_words and entropy(bare) >= limits.entropy_bits


def judge_query_load(
    rules: Ruleset, state: QueryLoad, name: str, now_ns: int, limits: QueryLimits | None = None
) -> tuple[QueryLoad, Decision]:
    """The state after a query that the rules allow, and whether it may be asked outside.

    Args:
        rules: of the cell.
        state: of the episode, before.
        name: as asked for.
        now_ns: monotonic clock, nanoseconds.
        limits: None: the defaults.

    A refused query costs its share of the rate and nothing else.
    """
    limits = limits or QueryLimits()
    normal = normalise_name(name)
    if normal is None:
        return state, _deny(f"{show(name)!r} is not a host name")
    rate = draw(state.rate, limits.per_minute, 1, now_ns)
    if rate is None:
        return state, _deny(f"more than {limits.per_minute} queries in a minute")
    state = msgspec.structs.replace(state, rate=rate)
    allowed = Decision(verdict="allow", rule=RULE, reason="within the limits")
    chosen = chosen_labels(rules, normal)
    if chosen is None:
        return state, allowed
    pattern, labels = chosen
    asked = state.asked.get(pattern, frozenset())
    if normal in asked:
        return state, allowed
    size = sum(map(len, labels))
    over = _over(labels, limits)
    if not over and len(asked) >= limits.distinct:
        over = f"{limits.distinct} different names under {pattern} were asked for already"
    if not over and pattern not in state.asked and len(state.asked) >= limits.parents:
        over = f"names under {limits.parents} different parents were asked for already"
    if not over and state.chosen_bytes + size > limits.distinct_bytes:
        over = f"the names that were asked for hold more than {limits.distinct_bytes} characters together"
    if over:
        return state, _deny(f"{show(normal, 80)} was not looked up: {over}; grant the exact name if it is meant")
    after = {**state.asked, pattern: asked | {normal}}
    return msgspec.structs.replace(state, asked=after, chosen_bytes=state.chosen_bytes + size), allowed


def _over(labels: list[str], limits: QueryLimits) -> str:
    if len(labels) > limits.labels:
        return f"it has {len(labels)} labels of the guest's choice"
    for label in labels:
        if len(label) > limits.label:
            return f"a label has {len(label)} characters"
        if looks_random(label, limits):
            return "a label looks like encoded data"
    return ""


def _deny(reason: str) -> Decision:
    return Decision(verdict="deny", rule=RULE, reason=reason)
