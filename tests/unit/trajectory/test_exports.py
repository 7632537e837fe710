"""Exports: what each format holds, and which episodes are left out and why."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest

from vallum.core.errors import InvalidInput
from vallum.core.events import Record
from vallum.core.messages import Reasoning, Text
from vallum.core.scope import Attribution
from vallum.record.export.atif import AtifFormat
from vallum.record.export.base import ChosenRun, ExportFormat
from vallum.record.export.facts import file_stem
from vallum.record.export.parquet import ParquetFormat
from vallum.record.export.selection import Selection
from vallum.record.trajectory_fold import fold_trajectories
from vallum.testing.atif import check_document
from vallum.testing.conversations import Conversations, call, number_events, say, tell
from vallum.testing.incident import tell_incident

SYSTEM = say("system", "You are an agent.")
TASK = say("user", "Find out what the kernel is called.")


def choose(records: list[Record]) -> ChosenRun:
    def read() -> Iterator[Record]:
        return iter(records)

    return ChosenRun(records[0].event.scope.run, fold_trajectories(records)[1], read)


def write(form: ExportFormat, records: list[Record]) -> dict[str, bytes]:
    return {file.name: file.data for file in form.write([choose(records)])}


def documents(records: list[Record]) -> dict[str, dict]:
    found = {name: json.loads(data) for name, data in write(AtifFormat(), records).items()}
    for document in found.values():
        check_document(document)
    return found


def talk_with_everything() -> Conversations:
    talk = Conversations()
    talk.command(["pip", "install", "x"])
    told = talk.converse(
        [SYSTEM, TASK],
        Reasoning("hm"),
        Text("Let me look."),
        call("bash", 1, command="uname"),
        call("task", 2, prompt="Count the files in /usr."),
        completion_token_ids=[7, 8, 9],
        prompt_token_ids=[1, 2],
        logprobs=[-0.5, -0.25, -0.125],
        policy_version="step-40",
    )
    talk.converse([SYSTEM, say("user", "Count the files in /usr.")], Text("12"))
    talk.accuse(1, talk.refuse(1))
    talk.kill(2, 0)
    told = talk.converse([*told, tell(1, "Linux"), tell(2, "12")], Text("hm"))
    talk.converse([*told, say("user", "Sum it up.")], Text("so far"), tools=())
    talk.converse([SYSTEM, TASK, say("user", "Summary: Linux.")], Text("done"))
    talk.close_episode()
    return talk


def test_atif_holds_the_conversation_its_metrics_and_the_facts() -> None:
    found = documents(talk_with_everything().records())
    main = found["r-talk.e-0.b1.atif.json"]
    agent = main["steps"][2]
    assert agent["message"] == "Let me look."
    assert agent["reasoning_content"] == "hm"
    assert agent["tool_calls"][0] == {
        "tool_call_id": "c1",
        "function_name": "bash",
        "arguments": {"command": "uname"},
        "extra": {"vallum": {"step": 1}},
    }
    assert agent["observation"]["results"][0] == {"source_call_id": "c1", "content": "Linux"}
    assert agent["metrics"]["completion_token_ids"] == [7, 8, 9]
    assert agent["metrics"]["logprobs"] == [-0.5, -0.25, -0.125]
    assert agent["metrics"]["cost_usd"] == 0.00015
    facts = agent["extra"]["vallum"]
    assert facts["policy_version"] == "step-40"
    assert (facts["containment"]["denied"], facts["containment"]["contaminated"]) == (1, True)
    assert facts["containment"]["denied_flows"][0]["rule"] == "default-deny"
    assert facts["containment"]["findings"][0]["detector"] == "mining.pool"
    assert any(step["source"] == "system" and "kill step" in step["message"] for step in main["steps"])
    assert main["final_metrics"]["total_prompt_tokens"] == 30
    assert main["extra"]["vallum"]["ended"] == "closed"


def test_atif_refers_to_sub_agents_and_continuations() -> None:
    found = documents(talk_with_everything().records())
    main = found["r-talk.e-0.b1.atif.json"]
    (worker,) = main["subagent_trajectories"]
    reference = main["steps"][2]["observation"]["results"][1]["subagent_trajectory_ref"][0]
    assert reference["trajectory_id"] == worker["trajectory_id"]
    assert worker["steps"][-1]["message"] == "12"
    assert main["continued_trajectory_ref"] in found
    assert found[main["continued_trajectory_ref"]]["extra"]["vallum"]["kind"] == "continuation"


def test_atif_of_commands_without_a_model() -> None:
    (document,) = documents(number_events(tell_incident())).values()
    assert document["steps"][0]["llm_call_count"] == 0
    assert document["extra"]["vallum"]["episode_containment"]["denied"] > 250
    facts = [step["extra"]["vallum"].get("containment", {}) for step in document["steps"]]
    assert 255 in {one.get("denied") for one in facts}


@pytest.mark.parametrize("arguments", ["not json", "[1]", "", "{", '{"a":1e999}', "[" * 5000])
def test_arguments_that_are_no_object_are_kept_as_text(arguments: str) -> None:
    from vallum.core.messages import ToolCall

    talk = Conversations()
    talk.converse([TASK], ToolCall("c1", "bash", arguments))
    (document,) = documents(talk.records()).values()
    expected = {"unparsed": arguments} if arguments else {}
    assert document["steps"][1]["tool_calls"][0]["arguments"] == expected


def test_file_names_are_harmless() -> None:
    assert file_stem("../../etc", "a/b\0", ".x") == "_.._etc.a_b_..x"
    assert file_stem("...") == "_"


def test_parquet_has_a_row_a_turn_with_what_training_needs() -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data is not installed")
    files = write(ParquetFormat(), talk_with_everything().records())
    rows = parquet.read_table(io.BytesIO(files["turns.parquet"])).to_pylist()
    row = next(row for row in rows if row["completion_token_ids"])
    assert row["completion_token_ids"] == [7, 8, 9]
    assert row["logprobs"] == [-0.5, -0.25, -0.125]
    assert (row["denied"], row["findings"], row["contaminated"], row["steps"]) == (1, 1, True, [1, 2])
    assert json.loads(row["tool_calls"])[0]["arguments"] == {"command": "uname"}
    assert {row["kind"] for row in rows} == {"commands", "main", "subagent", "continuation"}
    assert all(row["episode_contaminated"] for row in rows)


def test_parquet_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInput, match=r"vallum\[data\]"):
        list(ParquetFormat().write([]))


def test_contaminated_episodes_are_left_out_with_every_reason_and_clean_ones_stay() -> None:
    clean, dirty = Conversations("r-1", "e-0"), Conversations("r-1", "e-1")
    clean.converse([TASK], Text("done"))
    dirty.converse([TASK], call("bash", 1, command="x"))
    dirty.accuse(0, dirty.refuse(0))
    episodes = fold_trajectories(number_events([*clean.events, *dirty.events]))[1]
    kept, left_out = Selection(exclude_contaminated=True).select(episodes)
    assert [one.episode for one in kept] == ["e-0"]
    assert [one.episode for one in left_out] == ["e-1"]
    assert left_out[0].reasons == [
        "denied flow pool.test:3333 (198.51.100.7) (default-deny), 1 times",
        "finding mining.pool (high): Mining pool asked for",
    ]
    assert len(Selection().select(episodes)[0]) == 2


def test_episodes_charged_in_doubt_are_left_out() -> None:
    talk = Conversations()
    talk.converse([TASK], call("bash", 1, command="x"))
    talk.refuse(0, by=Attribution(method="lineage", confidence=0.5))
    (episode,) = fold_trajectories(talk.records())[1]
    assert Selection(min_confidence=0.4).explain(episode) == []
    assert Selection(min_confidence=0.9).explain(episode) == ["a fact was charged with confidence 0.5, below 0.9"]
