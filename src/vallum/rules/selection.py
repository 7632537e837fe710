"""For whom, when and on what condition a rule holds. What is not known yet never makes a judge more generous."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.conditions import ConditionError, Stage, evaluate, stage_of
from vallum.rules.facts import Asker, FlowFacts, RequestFacts
from vallum.rules.grants import Rule

ANYBODY = Asker()
Standing = Literal["yes", "no", "later", "failed"]
"""Whether a rule's terms are met; ``later``: its condition needs facts of a later stage; ``failed``: it has no value."""


def holds_for(rule: Rule, asker: Asker | None, *, unknown: bool) -> bool:
    """Whether the rule is for this phase and this asker; ``unknown`` is the answer where that cannot be told."""
    who = asker or ANYBODY
    if rule.phase is not None and rule.phase != who.phase:
        return False
    selector = rule.selector
    if selector is None:
        return True
    for pattern, text in ((selector.run, who.run), (selector.episode, who.episode), (selector.agent, who.agent)):
        if pattern is None:
            continue
        if not text:
            return unknown
        if not fnmatchcase(text, pattern):
            return False
    if selector.steps is None:
        return True
    if who.step is None:
        return unknown
    first, last = selector.steps
    return first <= who.step and (last is None or who.step <= last)


def stage_for(facts: FlowFacts | None, request: RequestFacts | None) -> Stage:
    """What is known."""
    if request is not None:
        return Stage.REQUEST
    if facts is None:
        return Stage.ASKER
    return Stage.DESTINATION if facts.protocol is None else Stage.CONTENT


def condition(
    rule: Rule, facts: FlowFacts | None, asker: Asker | None, request: RequestFacts | None
) -> tuple[Standing, str]:
    """What the rule's condition comes to, and why it failed if it did."""
    if not rule.when:
        return "yes", ""
    if stage_of(rule.when) > stage_for(facts, request):
        return "later", ""
    try:
        return ("yes" if evaluate(rule.when, facts, asker or ANYBODY, request) else "no"), ""
    except ConditionError as error:
        return "failed", f"the condition of {rule.id} could not be evaluated ({show(str(error), 160)})"


def failed_condition(why: str) -> Decision:
    """The denial that stands for a condition without a value."""
    return Decision(verdict="deny", rule="internal-error", reason=f"refused because {why}; nothing was sent")
