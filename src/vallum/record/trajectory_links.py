"""Which conversation led to which: sub-agents, continuations, forks. Pure.

Joined by when a conversation began and with what words; both are the agent's own doing, so a link is said with how it was
found, and nothing is ever charged by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from vallum.record.trajectory import Call, Link, Trajectory, Turn


@dataclass
class Opening:
    """How a conversation began."""

    trajectory: Trajectory
    t_ns: int
    parent: Trajectory | None
    """Whose reply its first request went on from."""
    known: int
    task: str
    """Its first words of a user."""
    agent: str
    last_ns: int
    """When it was answered last."""


def arrange(trajectories: list[Trajectory], openings: dict[str, Opening], closed: dict[int, int]) -> list[Trajectory]:
    """Set kind, link and parent of every trajectory, put sub-agents below their parents; the others are returned.

    ``trajectories`` come in the order they began; ``closed`` says when steps did.
    """
    begun = [openings[one.branch] for one in trajectories if one.branch in openings]
    roots = [one for one in trajectories if one.branch not in openings]
    calls = _OpenCalls(begun, closed)
    by_task: dict[tuple[str, str], list[Opening]] = {}
    for opening in begun:
        by_task.setdefault((opening.task, opening.agent), []).append(opening)
    above: dict[str, Trajectory] = {}
    """Id of a sub-agent -> whom it works for."""
    for opening in begun:
        one = opening.trajectory
        if opening.parent is not None:
            _join_to_parent(opening, openings)
        elif (spawner := _find_spawner(opening, by_task, calls)) is not None:
            _embed(one, *spawner)
            above[one.id] = spawner[0]
            continue
        else:
            before = _find_ended(opening, by_task)
            if before is not None:
                one.kind, one.link, one.parent, before.continued = "continuation", "task", before.id, one.id
        holder = above.get(one.parent)
        if one.kind == "continuation" and holder is not None:
            holder.subagents.append(one)
            above[one.id] = holder
        else:
            roots.append(one)
    conversations = [one for one in roots if one.kind == "main"]
    if any(_offers_tools(one) for one in conversations):
        for one in conversations:
            if not _offers_tools(one):
                one.kind = "auxiliary"
    return sorted(roots, key=lambda one: (one.turns[0].t_ns, one.branch))


def _join_to_parent(opening: Opening, openings: dict[str, Opening]) -> None:
    one, parent = opening.trajectory, opening.parent
    assert parent is not None
    one.parent, one.link = parent.id, "messages" if opening.known else "results"
    before = openings.get(parent.branch)
    goes_on = before is not None and before.last_ns > opening.t_ns
    if _offers_tools(parent) and not _offers_tools(one):
        one.kind = "auxiliary"  # e.g. asked to sum up what was said
    elif goes_on or parent.continued:
        one.kind = "fork"
    else:
        one.kind, parent.continued = "continuation", one.id


def _find_ended(opening: Opening, by_task: dict[tuple[str, str], list[Opening]]) -> Trajectory | None:
    """The conversation with the same task that had ended when this one began: one that was compacted begins so."""
    if not opening.task or not _offers_tools(opening.trajectory):
        return None
    for other in by_task.get((opening.task, opening.agent), []):
        if other.last_ns < opening.t_ns and not other.trajectory.continued and other is not opening:
            return other.trajectory
    return None


@dataclass(frozen=True)
class Proposed:
    """A tool call: by whom, in which turn, and the texts among its arguments."""

    trajectory: Trajectory
    turn: Turn
    call: Call
    words: frozenset[str]


class _OpenCalls:
    """The tool calls that are open at a moment that only moves forward.

    A call is over when its step closes, or when its conversation has an answer that came later.
    """

    def __init__(self, begun: list[Opening], closed: dict[int, int]) -> None:
        spans: list[tuple[int, int, int, Proposed]] = []
        for opening in begun:
            later_ns = _NEVER
            for turn in reversed(opening.trajectory.turns):
                if not turn.model_calls:
                    continue
                for call in turn.calls:
                    over_ns = min(later_ns, closed.get(call.step, _NEVER) if call.step is not None else _NEVER)
                    spans.append(
                        (
                            turn.t_ns,
                            over_ns,
                            len(spans),
                            Proposed(opening.trajectory, turn, call, _read_words(call.arguments)),
                        )
                    )
                later_ns = turn.t_ns
        self._coming = sorted(spans, key=lambda span: span[:3], reverse=True)
        self._open: list[tuple[int, int, Proposed]] = []

    def at(self, t_ns: int) -> list[Proposed]:
        """What is open then, in the order it began."""
        while self._coming and self._coming[-1][0] < t_ns:
            _, over_ns, number, proposed = self._coming.pop()
            self._open.append((over_ns, number, proposed))
        self._open = [one for one in self._open if one[0] >= t_ns][-MAX_OPEN:]
        return [proposed for *_, proposed in self._open]


_NEVER = 1 << 63
MAX_OPEN = 256
"""Of very many open calls the newest are looked at; a node keeps fewer steps open."""


def _find_spawner(
    opening: Opening, by_task: dict[tuple[str, str], list[Opening]], calls: _OpenCalls
) -> tuple[Trajectory, Turn, str, Link] | None:
    """The tool call that was open when a conversation began, and how it was chosen."""
    found = [one for one in calls.at(opening.t_ns) if one.trajectory is not opening.trajectory]
    if not found:
        return None
    if (told := _find_told(found, opening.task)) is not None:
        return told.trajectory, told.turn, told.call.id, "prompt"
    if not _offers_tools(opening.trajectory) or _find_ended(opening, by_task) is not None:
        return None
    if len(found) == 1:
        return found[0].trajectory, found[0].turn, found[0].call.id, "time"
    opening.trajectory.link = "ambiguous"
    return None


def _find_told(found: list[Proposed], task: str) -> Proposed | None:
    """The open call with most of its words in the task. Of calls with the same words each is taken once."""
    weighed = [(_weigh(one.words, task), one) for one in found]
    best = max((weight for weight, _ in weighed), default=0)
    told = [one for weight, one in weighed if weight == best]
    if best < MIN_PROMPT or len({one.call.arguments for one in told}) > 1:
        return None
    return next((one for one in told if one.call.id not in one.turn.subagents), told[0])


MIN_PROMPT = 8
"""Fewer characters in common stand in too many messages to tell who was told them."""


def _read_words(arguments: str) -> frozenset[str]:
    try:
        values = _strings(msgspec.json.decode(arguments))
    except (msgspec.MsgspecError, RecursionError):
        values = [arguments]
    return frozenset(word for value in values if (word := value.strip()))


def _weigh(words: frozenset[str], task: str) -> int:
    """How many characters the texts of a call have in common with a task: whole texts or none."""
    if not task:
        return 0
    return sum(min(len(word), len(task)) for word in words if word in task or task in word)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for one in value.values() for text in _strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return []


def _embed(one: Trajectory, parent: Trajectory, turn: Turn, call: str, link: Link) -> None:
    one.kind, one.link, one.parent = "subagent", link, parent.id
    parent.subagents.append(one)
    turn.subagents.setdefault(call, []).append(one.id)


def _offers_tools(trajectory: Trajectory) -> bool:
    return bool(trajectory.tools) or any(turn.calls and turn.model_calls for turn in trajectory.turns)
