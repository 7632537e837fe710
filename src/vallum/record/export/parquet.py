"""Parquet: one row per turn, for training and analysis. Needs the extra ``data`` (pyarrow).

Token ids and log-probabilities are lists as the upstream gave them: nothing is tokenised again. Tool calls, results and
containment facts are JSON text in the form of the ATIF export, so that both read the same.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import msgspec

from vallum.core.errors import InvalidInput
from vallum.record.export.atif import describe_trajectory
from vallum.record.export.base import ChosenRun, ExportFile
from vallum.record.trajectory import Containment, EpisodeTrajectories, Trajectory, Turn

FILE = "turns.parquet"
ROWS_AT_ONCE = 2000


class ParquetFormat:
    """``--format parquet``."""

    name = "parquet"

    def write(self, runs: Iterable[ChosenRun]) -> Iterator[ExportFile]:
        """One file, however many runs. See :class:`vallum.record.export.base.ExportFormat`."""
        arrow, parquet = _load()
        schema = _make_schema(arrow)
        out = io.BytesIO()
        with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for episode in (episode for run in runs for episode in run.episodes):
                for row in make_rows(episode):
                    rows.append(row)
                    if len(rows) >= ROWS_AT_ONCE:
                        writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
                        rows = []
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
        yield ExportFile(FILE, out.getvalue())


def make_rows(episode: EpisodeTrajectories) -> Iterator[dict[str, Any]]:
    """A row for each turn of each trajectory, in order."""
    for root in episode.roots:
        document = describe_trajectory(root, episode)
        told = {document["trajectory_id"]: document}
        told |= {one["trajectory_id"]: one for one in document.get("subagent_trajectories", [])}
        for trajectory in root.walk():
            for turn, step in zip(trajectory.turns, told[trajectory.id]["steps"], strict=True):
                yield _make_row(trajectory, turn, step, episode.containment.is_contaminated)


def _make_row(one: Trajectory, turn: Turn, step: dict[str, Any], is_contaminated: bool) -> dict[str, Any]:
    facts = turn.containment or Containment()
    metrics = step.get("metrics", {})
    return {
        "run": one.run,
        "episode": one.episode,
        "trajectory": one.id,
        "branch": one.branch,
        "kind": one.kind,
        "parent": one.parent or None,
        "agent": one.agent,
        "step_id": step["step_id"],
        "t_ns": turn.t_ns,
        "source": turn.source,
        "model": turn.model or None,
        "message": step["message"],
        "reasoning": turn.reasoning or None,
        "tool_calls": _dump(step.get("tool_calls")),
        "results": _dump(step.get("observation", {}).get("results")),
        "is_copied": turn.is_copied,
        **{name: metrics.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd")},
        **{name: metrics.get(name) for name in ("prompt_token_ids", "completion_token_ids", "logprobs")},
        "policy_version": turn.facts.get("policy_version"),
        "finish": turn.facts.get("finish"),
        "steps": facts.steps,
        "denied": facts.denied,
        "findings": len(facts.findings),
        "processes": facts.processes,
        "cpu_ns": facts.cpu_ns,
        "confidence": facts.confidence if turn.containment is not None else None,
        "contaminated": facts.is_contaminated,
        "episode_contaminated": is_contaminated,
        "extra": _dump(step.get("extra")),
    }


def _dump(value: Any) -> str | None:
    return None if not value else msgspec.json.encode(value).decode()


def _make_schema(arrow: ModuleType) -> Any:
    text, whole, real, yes = arrow.string(), arrow.int64(), arrow.float64(), arrow.bool_()
    fields = {
        **dict.fromkeys(("run", "episode", "trajectory", "branch", "kind", "parent", "agent"), text),
        "step_id": whole,
        "t_ns": whole,
        **dict.fromkeys(("source", "model", "message", "reasoning", "tool_calls", "results"), text),
        "is_copied": yes,
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), whole),
        "cost_usd": real,
        **dict.fromkeys(("prompt_token_ids", "completion_token_ids"), arrow.list_(whole)),
        "logprobs": arrow.list_(real),
        **dict.fromkeys(("policy_version", "finish"), text),
        "steps": arrow.list_(whole),
        **dict.fromkeys(("denied", "findings", "processes", "cpu_ns"), whole),
        "confidence": real,
        **dict.fromkeys(("contaminated", "episode_contaminated"), yes),
        "extra": text,
    }
    return arrow.schema(list(fields.items()))


def _load() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InvalidInput(
            f"Parquet needs pyarrow ({error}): install it with 'pip install vallum[data]', or export atif"
        ) from error
