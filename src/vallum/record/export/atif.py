"""ATIF v1.8, the Agent Trajectory Interchange Format of Harbor: one JSON document per conversation.

Source: the public models of Harbor (``harbor.models.trajectories``), which the tests validate against. Sub-agents stand in
``subagent_trajectories`` of the document of their root; a compacted conversation names the file that goes on. What the format has
no place for (containment, findings, kills' causes) is under ``extra.vallum``.

Covered: text is carried without loss, as JSON; nothing of it becomes a file name. Not covered: images and sounds, which the
record keeps by digest; they are named in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from vallum.core.errors import RecordError
from vallum.core.messages import Tool
from vallum.record.export.base import ChosenRun, ExportFile
from vallum.record.export.facts import describe_containment, file_stem
from vallum.record.trajectory import Call, EpisodeTrajectories, Metrics, Trajectory, Turn

SCHEMA = "ATIF-v1.8"

_JSON = msgspec.json.Encoder()


class AtifFormat:
    """``--format atif``."""

    name = "atif"

    def write(self, runs: Iterable[ChosenRun]) -> Iterator[ExportFile]:
        """One file per root conversation. See :class:`vallum.record.export.base.ExportFormat`."""
        for episode in (episode for run in runs for episode in run.episodes):
            for root in episode.roots:
                document = describe_trajectory(root, episode)
                yield ExportFile(file_name(root.id), msgspec.json.format(_encode(document, root), indent=1) + b"\n")


def file_name(trajectory: str) -> str:
    """The file of a trajectory."""
    return f"{file_stem(trajectory)}.atif.json"


def describe_trajectory(root: Trajectory, episode: EpisodeTrajectories) -> dict[str, Any]:
    """The ATIF document of a root conversation, as plain data."""
    document = _describe(root, episode)
    subagents = [one for one in root.walk() if one is not root]
    if subagents:
        # References are looked up in the root's list, so sub-agents of sub-agents stand there, too.
        document["subagent_trajectories"] = [_describe(one, episode) for one in subagents]
    facts = document["extra"]["vallum"]
    facts["episode_containment"] = describe_containment(episode.containment)
    if episode.started is not None:
        started = episode.started
        facts["cell"] = {
            "id": started.sandbox,
            "image": started.image,
            "image_digest": started.image_digest,
            "level": started.level,
            "containment": started.containment,
            "rules": started.rules,
        }
    if episode.ended is not None:
        facts["ended"] = episode.ended.reason
    return document


def _describe(one: Trajectory, episode: EpisodeTrajectories) -> dict[str, Any]:
    agent: dict[str, Any] = {"name": one.agent or "agent", "version": one.version or "unknown"}
    if one.model:
        agent["model_name"] = one.model
    if one.tools:
        agent["tool_definitions"] = [_describe_tool(tool) for tool in one.tools]
    facts: dict[str, Any] = {"run": one.run, "episode": one.episode, "branch": one.branch, "kind": one.kind}
    facts |= {name: value for name, value in (("link", one.link), ("parent", one.parent)) if value}
    facts["containment"] = describe_containment(one.containment)
    document: dict[str, Any] = {
        "schema_version": SCHEMA,
        "session_id": f"{one.run}.{one.episode}",
        "trajectory_id": one.id,
        "agent": agent,
        "steps": [_describe_turn(turn, number, one) for number, turn in enumerate(one.turns, 1)],
        "final_metrics": _sum_metrics(one),
        "extra": {"vallum": facts},
    }
    if one.continued:
        embedded = one.kind == "subagent" or any(one in root.walk() and one is not root for root in episode.roots)
        document["continued_trajectory_ref"] = one.continued if embedded else file_name(one.continued)
    return document


def _describe_turn(turn: Turn, number: int, one: Trajectory) -> dict[str, Any]:
    step: dict[str, Any] = {
        "step_id": number,
        "timestamp": datetime.fromtimestamp(turn.t_ns / 1e9, UTC).isoformat(timespec="microseconds"),
        "source": turn.source,
        "message": turn.text,
    }
    if turn.source == "agent":
        if turn.model:
            step["model_name"] = turn.model
        if turn.reasoning:
            step["reasoning_content"] = turn.reasoning
        if turn.calls:
            step["tool_calls"] = [_describe_call(call) for call in turn.calls]
        if turn.metrics is not None:
            step["metrics"] = _describe_metrics(turn.metrics)
        if turn.model_calls is not None:
            step["llm_call_count"] = turn.model_calls
    if results := _describe_results(turn, one):
        step["observation"] = {"results": results}
    if turn.is_copied:
        step["is_copied_context"] = True
    facts = dict(turn.facts)
    if spent := facts.pop("tokens_spent", None):
        facts["metrics"] = _describe_metrics(spent)
    if turn.containment is not None:
        facts["containment"] = describe_containment(turn.containment)
    if facts:
        step["extra"] = {"vallum": facts}
    return step


def _describe_call(call: Call) -> dict[str, Any]:
    facts: dict[str, Any] = {} if call.step is None else {"step": call.step}
    if call.kind != "function":
        facts["kind"] = call.kind
    told: dict[str, Any] = {
        "tool_call_id": call.id,
        "function_name": call.name,
        "arguments": read_arguments(call),
    }
    if facts:
        told["extra"] = {"vallum": facts}
    return told


def read_arguments(call: Call) -> dict[str, Any]:
    """The arguments as an object: ``{"input": text}`` for free text, ``{"unparsed": text}`` for what is no JSON object."""
    if call.kind == "custom":
        return {"input": call.arguments}
    try:
        return msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {"unparsed": call.arguments}


def _describe_results(turn: Turn, one: Trajectory) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    answered = set()
    for result in turn.results:
        entry: dict[str, Any] = {"content": result.text}
        if result.call is not None and result.call not in answered:
            answered.add(result.call)
            entry["source_call_id"] = result.call
            if begun := turn.subagents.get(result.call):
                entry["subagent_trajectory_ref"] = _refer(begun, one)
        if result.is_error:
            entry["extra"] = {"vallum": {"is_error": True}}
        told.append(entry)
    for call, begun in turn.subagents.items():
        if call not in answered:
            told.append({"source_call_id": call, "subagent_trajectory_ref": _refer(begun, one)})
    return told


def _refer(begun: list[str], one: Trajectory) -> list[dict[str, Any]]:
    return [{"trajectory_id": name, "session_id": f"{one.run}.{one.episode}"} for name in begun]


def _describe_metrics(metrics: Metrics) -> dict[str, Any]:
    told: dict[str, Any] = {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.completion_tokens,
        "cached_tokens": metrics.cached_tokens,
        "cost_usd": None if metrics.cost_usd_micros is None else metrics.cost_usd_micros / 1e6,
        "prompt_token_ids": metrics.prompt_token_ids,
        "completion_token_ids": metrics.completion_token_ids,
        "logprobs": metrics.logprobs,
    }
    return {name: value for name, value in told.items() if value is not None}


def _sum_metrics(one: Trajectory) -> dict[str, Any]:
    spent = [m for turn in one.turns if (m := turn.metrics or turn.facts.get("tokens_spent")) is not None]
    told: dict[str, Any] = {"total_steps": len(one.turns)}
    for total, name in (
        ("total_prompt_tokens", "prompt_tokens"),
        ("total_completion_tokens", "completion_tokens"),
        ("total_cached_tokens", "cached_tokens"),
    ):
        known = [value for m in spent if (value := getattr(m, name)) is not None]
        if known:
            told[total] = sum(known)
    costs = [m.cost_usd_micros for m in spent if m.cost_usd_micros is not None]
    if costs:
        told["total_cost_usd"] = sum(costs) / 1e6
    return told


def _describe_tool(tool: Tool) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(tool.schema or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        schema = {}
    function = {"name": tool.name, "description": tool.description, "parameters": schema}
    return {"type": "function", "function": function}


def _encode(document: dict[str, Any], one: Trajectory) -> bytes:
    try:
        return _JSON.encode(document)
    except (OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise RecordError(f"trajectory {one.id} cannot be written as JSON: {error}") from error
