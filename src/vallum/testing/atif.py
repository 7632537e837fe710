"""What ATIF v1.8 demands of a document, checked without the public models (``tests/foreign/harbor`` has these)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

FIELDS = {
    "trajectory": "schema_version session_id trajectory_id agent steps notes final_metrics continued_trajectory_ref subagent_trajectories extra",
    "agent": "name version model_name tool_definitions extra",
    "step": "step_id timestamp source model_name reasoning_effort message reasoning_content tool_calls observation metrics is_copied_context llm_call_count extra",
    "tool_call": "tool_call_id function_name arguments extra",
    "result": "source_call_id content subagent_trajectory_ref extra",
    "reference": "trajectory_id trajectory_path session_id extra",
    "metrics": "prompt_tokens completion_tokens cached_tokens cost_usd prompt_token_ids completion_token_ids logprobs extra",
    "final": "total_prompt_tokens total_completion_tokens total_cached_tokens total_cost_usd total_steps extra",
}
AGENT_ONLY = {"model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"}


def check_document(document: dict[str, Any], embedded: set[str] | None = None) -> None:
    """Assert every rule of the format. ``embedded``: ids that sub-agents may be referred to by, of a document within another."""
    check_fields(document, "trajectory", {"schema_version", "agent", "steps"})
    assert document["schema_version"] == "ATIF-v1.8"
    check_fields(document["agent"], "agent", {"name", "version"})
    for tool in document["agent"].get("tool_definitions", []):
        assert tool["type"] == "function"
        assert isinstance(tool["function"]["parameters"], dict)
    check_fields(document["final_metrics"], "final", {"total_steps"})
    below = document.get("subagent_trajectories", [])
    names = [one["trajectory_id"] for one in below]
    assert len(set(names)) == len(names)
    known = set(names) if embedded is None else embedded
    assert document["steps"]
    for number, step in enumerate(document["steps"], 1):
        assert step["step_id"] == number
        check_step(step, known)
    for one in below:
        check_document(one, known)


def check_step(step: dict[str, Any], embedded: set[str]) -> None:
    """Assert what one step has to be."""
    check_fields(step, "step", {"step_id", "source", "message"})
    assert step["source"] in {"system", "user", "agent"}
    assert isinstance(step["message"], str)
    assert datetime.fromisoformat(step["timestamp"]).tzinfo is not None
    if step["source"] != "agent":
        assert not AGENT_ONLY & set(step)
    if step.get("llm_call_count") == 0:
        assert not {"metrics", "reasoning_content"} & set(step)
    calls = step.get("tool_calls", [])
    for call in calls:
        check_fields(call, "tool_call", {"tool_call_id", "function_name", "arguments"})
        assert isinstance(call["arguments"], dict)
    ids = [call["tool_call_id"] for call in calls]
    assert len(set(ids)) == len(ids)
    check_fields(step.get("metrics", {}), "metrics", set())
    for result in step.get("observation", {"results": []})["results"]:
        check_fields(result, "result", set())
        assert result.get("source_call_id") in {None, *ids}
        for reference in result.get("subagent_trajectory_ref", []):
            check_fields(reference, "reference", {"trajectory_id"})
            assert reference["trajectory_id"] in embedded


def check_fields(told: dict[str, Any], kind: str, needed: set[str]) -> None:
    """Assert that an object has what it needs, and nothing that the format does not know."""
    assert needed <= set(told)
    assert set(told) <= set(FIELDS[kind].split())
    assert all(value is not None for value in told.values())
