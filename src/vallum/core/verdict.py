"""A decision on one action, and which rule made it."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["allow", "deny", "hold"]

Severity = Literal["info", "low", "medium", "high", "critical"]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule said about one action, before the action had any effect outside."""

    verdict: Verdict
    rule: str
    """Id of the rule that decided, e.g. ``default-deny``, ``metadata``, ``allow:mirror.test``."""
    reason: str
    """One sentence for the person (or agent) that was refused."""


def fail_closed(what: str) -> Decision:
    """The decision when a judge itself failed: deny, and say so."""
    return Decision(verdict="deny", rule="internal-error", reason=f"refused because {what} failed; nothing was sent")
