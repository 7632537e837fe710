"""The conversations of a run as a reader follows them: what was said, and beside it what the kernel saw. Pure.

All words are hostile: cut here, escaped by the template. Bounded however long a conversation was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vallum.core.events import ToolCall
from vallum.core.scope import BY_NODE, Scope
from vallum.core.text import show
from vallum.record.calls import describe_call
from vallum.record.trajectory import Call, Containment, EpisodeTrajectories, Trajectory, Turn

MAX_TURNS = 200
"""Of one conversation: the first and the last of them, and all in which something was refused or found."""
MAX_CONVERSATIONS = 40
MAX_LINES = 14
MAX_WIDTH = 400


@dataclass(frozen=True)
class TurnView:
    """One turn."""

    number: int
    turn: Turn
    calls: list[tuple[str, str]]
    """(tool, arguments in a line)."""
    facts: Containment | None


@dataclass(frozen=True)
class ConversationView:
    """One conversation."""

    trajectory: Trajectory
    title: str
    turns: list[TurnView]
    omitted: int


def view_conversations(episodes: Sequence[EpisodeTrajectories]) -> tuple[list[ConversationView], int]:
    """(the conversations to show, how many there are besides). Commands without a model are told elsewhere."""
    found = [one for episode in episodes for one in episode.trajectories if one.kind != "commands"]
    return [_view(one) for one in found[:MAX_CONVERSATIONS]], max(0, len(found) - MAX_CONVERSATIONS)


def _view(one: Trajectory) -> ConversationView:
    title = {
        "main": "conversation",
        "subagent": f"sub-agent of {one.parent} (found by {one.link})",
        "continuation": f"goes on from {one.parent}",
        "fork": f"another way from {one.parent}",
        "auxiliary": "beside the conversation",
    }.get(one.kind, one.kind)
    if one.link == "ambiguous":
        title += ", begun while several tool calls were open"
    numbered = list(enumerate(one.turns, 1))
    kept = numbered
    if len(numbered) > MAX_TURNS:
        half = MAX_TURNS // 3
        loud = [(n, turn) for n, turn in numbered[half:-half] if _is_loud(turn)]
        kept = [*numbered[:half], *loud[: MAX_TURNS - 2 * half], *numbered[-half:]]
    turns = [
        TurnView(n, turn, [(call.name, describe_arguments(call)) for call in turn.calls], turn.containment)
        for n, turn in kept
    ]
    return ConversationView(one, title, turns, len(numbered) - len(kept))


def _is_loud(turn: Turn) -> bool:
    return turn.source == "system" or (turn.containment is not None and turn.containment.is_contaminated)


def describe_arguments(call: Call) -> str:
    """The command of a call, or its arguments."""
    told = ToolCall(
        t_ns=0, mono_ns=0, scope=Scope(run=""), attribution=BY_NODE, name=call.name, arguments=call.arguments
    )
    return describe_call(told)


def cut_lines(text: str, limit: int = MAX_LINES) -> list[str]:
    """The first and last lines of a text, each safe to show."""
    # What is cut away must cost nothing.
    head, is_cut = text[: limit * MAX_WIDTH], len(text) > limit * MAX_WIDTH
    lines = head.split("\n")
    shown = [show(line.rstrip("\r"), MAX_WIDTH) for line in lines[:limit]]
    if is_cut or len(lines) > limit:
        shown.append(f"... ({len(text):,} characters in all)")
    return shown


def describe_facts(facts: Containment) -> str:
    """What the kernel saw, in a line."""
    steps = ", ".join(str(step) for step in facts.steps[:8])
    words = [f"step{'s' if len(facts.steps) > 1 else ''} {steps}"]
    words.append(f"{facts.processes} process{'es' if facts.processes != 1 else ''}")
    if facts.allowed:
        words.append(f"{facts.allowed} permitted connection{'s' if facts.allowed != 1 else ''}")
    if facts.files:
        words.append(f"{len(facts.files)} file{'s' if len(facts.files) != 1 else ''} changed")
    if facts.left_running:
        words.append(f"left {facts.left_running} running")
    if facts.confidence < 1:
        words.append(f"confidence {facts.confidence:.2g}")
    return " · ".join(words)
