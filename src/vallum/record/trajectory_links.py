"""Which conversation led to which: sub-agents, continuations, forks. Pure.

Joined by when a conversation began and with what words; both are the agent's own doing, so a link is said with how it was
found, and nothing is ever charged by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from vallum.record.trajectory import Link, Trajectory, Turn


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


def arrange(trajectories: list[Trajectory], openings: dict[str, Opening]) -> list[Trajectory]:
    """Set kind, link and parent of every trajectory, put sub-agents below their parents; the others are returned."""
    begun = [openings[one.branch] for one in trajectories if one.branch in openings]
    roots = [one for one in trajectories if one.branch not in openings]
    above: dict[str, Trajectory] = {}
    """Id of a sub-agent -> whom it works for."""
    for opening in begun:
        one = opening.trajectory
        if opening.parent is not None:
            _join_to_parent(opening, openings)
        elif (spawner := _find_spawner(opening, begun)) is not None:
            _embed(one, *spawner)
            above[one.id] = spawner[0]
            continue
        else:
            _join_to_ended(opening, begun)
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


def _join_to_ended(opening: Opening, begun: list[Opening]) -> None:
    """A conversation that was compacted begins with the task of the one before it."""
    one = opening.trajectory
    if not opening.task or not _offers_tools(one):
        return
    for other in begun:
        before = other.trajectory
        if (
            other.t_ns < opening.t_ns
            and other.last_ns < opening.t_ns
            and other.task == opening.task
            and other.agent == opening.agent
            and not before.continued
            and before is not one
        ):
            one.kind, one.link, one.parent, before.continued = "continuation", "task", before.id, one.id
            return


def _find_spawner(opening: Opening, begun: list[Opening]) -> tuple[Trajectory, Turn, str, Link] | None:
    """The tool call that was open when a conversation began, and how it was chosen."""
    found: list[tuple[Trajectory, Turn, str]] = []
    for other in begun:
        trajectory = other.trajectory
        if trajectory is opening.trajectory or other.t_ns >= opening.t_ns:
            continue
        for place, turn in enumerate(trajectory.turns):
            if not turn.model_calls or turn.t_ns >= opening.t_ns:
                continue
            until = next((later.t_ns for later in trajectory.turns[place + 1 :] if later.model_calls), None)
            if until is not None and until < opening.t_ns:
                continue
            found += [(trajectory, turn, call.id) for call in turn.calls]
    if opening.task:
        told = [one for one in found if _tells(one, opening.task)]
        fresh = [one for one in told if one[2] not in one[1].subagents]
        if fresh or told:
            return (*(fresh or told)[0], "prompt")
    offers = _offers_tools(opening.trajectory)
    if not offers:
        return None
    # A conversation with the task of one that has ended goes on with that one.
    if any(
        other.task == opening.task and other.last_ns < opening.t_ns and other.trajectory is not opening.trajectory
        for other in begun
        if opening.task
    ):
        return None
    if len(found) == 1:
        return (*found[0], "time")
    if found:
        opening.trajectory.link = "ambiguous"
    return None


def _tells(found: tuple[Trajectory, Turn, str], task: str) -> bool:
    """Whether the words of a task are among the arguments of a call, or these among the words."""
    call = next(call for call in found[1].calls if call.id == found[2])
    try:
        values = _strings(msgspec.json.decode(call.arguments))
    except (msgspec.MsgspecError, RecursionError):
        values = [call.arguments]
    return any(len(value) >= MIN_PROMPT and (task in value or value.strip() in task) for value in values)


MIN_PROMPT = 12
"""Shorter words stand in too many messages to tell who was told them."""


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
