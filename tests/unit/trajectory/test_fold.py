"""Conversations put together again from what the record keeps, with what the kernel saw beside each turn."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.core.events import FileChanged, ModelCall, StepOpened
from vallum.core.messages import Message, Reasoning, Text
from vallum.core.scope import Attribution
from vallum.record.trajectory import EpisodeTrajectories, Trajectory
from vallum.record.trajectory_fold import fold_trajectories
from vallum.testing.conversations import Conversations, call, number_events, say, tell
from vallum.testing.incident import tell_incident

SYSTEM = say("system", "You are an agent.")
TASK = say("user", "Find out what the kernel is called.")


def fold(talk: Conversations) -> EpisodeTrajectories:
    (episode,) = fold_trajectories(talk.records())[1]
    return episode


def shape(one: Trajectory) -> list[tuple[str, str, list[str], list[str]]]:
    return [
        (turn.source, turn.text, [c.name for c in turn.calls], [result.text for result in turn.results])
        for turn in one.turns
    ]


def talk_twice() -> Conversations:
    talk = Conversations()
    told = talk.converse([SYSTEM, TASK], Reasoning("hm"), Text("Let me look."), call("bash", 1, command="uname"))
    talk.finish(0)
    talk.converse([*told, tell(1, "Linux")], Text("It is Linux."))
    return talk


def test_results_stand_at_the_turn_that_asked() -> None:
    (one,) = fold(talk_twice()).roots
    assert (one.kind, one.model, [tool.name for tool in one.tools]) == ("main", "mock-1.5", ["bash"])
    assert shape(one) == [
        ("system", "You are an agent.", [], []),
        ("user", "Find out what the kernel is called.", [], []),
        ("agent", "Let me look.", ["bash"], ["Linux"]),
        ("agent", "It is Linux.", [], []),
    ]
    assert one.turns[2].reasoning == "hm"
    assert one.turns[2].calls[0].step == 0


def test_what_the_kernel_saw_is_told_of_the_turn_that_caused_it_even_later() -> None:
    talk = Conversations()
    told = talk.converse([SYSTEM, TASK], call("bash", 1, command="(sleep 9; curl pool.test) &"))
    talk.finish(0)
    told = talk.converse([*told, tell(1, "")], call("bash", 2, command="true"))
    talk.accuse(0, talk.refuse(0))
    talk.finish(1)
    talk.converse([*told, tell(2, "")], Text("done"))
    (one,) = fold(talk).roots
    first, second = one.turns[2].containment, one.turns[3].containment
    assert first is not None
    assert second is not None
    assert (first.denied, first.denied_late, first.processes, first.cpu_ns) == (1, 1, 2, 7_000_000)
    assert (first.denials[0].target, first.denials[0].rule) == ("pool.test:3333 (198.51.100.7)", "default-deny")
    assert [finding.detector for finding in first.findings] == ["mining.pool"]
    assert first.is_contaminated
    assert (second.denied, second.is_contaminated) == (0, False)


def test_what_no_step_is_charged_with_is_told_of_the_episode() -> None:
    talk = talk_twice()
    talk.refuse(None, by=Attribution(method="netns"))
    episode = fold(talk)
    assert episode.containment.denied == 1
    assert episode.roots[0].containment.denied == 0


def test_the_least_confidence_counts() -> None:
    talk = talk_twice()
    talk.refuse(0, by=Attribution(method="lineage", confidence=0.5))
    facts = fold(talk).roots[0].turns[2].containment
    assert facts is not None
    assert (facts.confidence, "lineage" in facts.methods) == (0.5, True)


def test_a_file_that_changed_is_told_of_its_steps_only() -> None:
    talk = talk_twice()
    changed = {"path": "/work/a", "change": "added", "type": "file", "bytes": 1, "mode": 0o644, "uid": 0, "sha256": "x"}
    talk.add(FileChanged(**talk.fields(), **changed, replaced=False, first_step=0, last_step=0))
    talk.add(FileChanged(**talk.fields(), **changed | {"path": "/work/b"}, replaced=False, first_step=1, last_step=2))
    facts = fold(talk).roots[0].turns[2].containment
    assert facts is not None
    assert facts.files == ["/work/a"]


def test_a_kill_is_a_turn_of_the_system_where_it_struck() -> None:
    talk = Conversations()
    talk.converse([SYSTEM, TASK], call("bash", 1, command="xmrig"))
    talk.kill(0, talk.refuse(0))
    (one,) = fold(talk).roots
    last = one.turns[-1]
    assert last.source == "system"
    assert last.text == "Containment: kill step cell: mining"
    assert last.facts["cause"] is not None
    facts = one.turns[2].containment
    assert facts is not None
    assert facts.actions == ["kill_step: mining"]


def test_commands_of_a_client_are_turns_without_a_model() -> None:
    talk = Conversations()
    talk.command(["ls", "/"])
    talk.command(["false"], code=1)
    (one,) = fold(talk).roots
    assert one.kind == "commands"
    assert [(turn.calls[0].name, turn.model_calls, turn.results[0].is_error) for turn in one.turns] == [
        ("exec", 0, False),
        ("exec", 0, True),
    ]
    assert one.turns[1].containment is not None
    assert one.turns[1].containment.commands[0].exit_code == 1


def test_commands_beside_a_conversation_are_a_trajectory_of_their_own() -> None:
    talk = Conversations()
    talk.command(["pip", "install", "x"])
    talk.converse([SYSTEM, TASK], Text("nothing to do"))
    kinds = {one.kind: len(one.turns) for one in fold(talk).roots}
    assert kinds == {"commands": 1, "main": 3}


def test_refused_and_failed_calls_are_told_by_the_system() -> None:
    talk = talk_twice()
    told = {"call": "m9", "dialect": "chat", "model": "mock-1", "branch": "b1"}
    refused = {"verdict": "deny", "rule": "model-budget", "reason": "the budget is spent"}
    talk.add(ModelCall(**talk.fields(), state="denied", **told, **refused))
    talk.add(ModelCall(**talk.fields(), state="closed", retry_of="m1", **told, verdict="allow", rule="", reason=""))
    (one,) = fold(talk).roots
    assert one.turns[-1].source == "system"
    assert one.turns[-1].text == "model call refused (model-budget): the budget is spent"
    assert one.turns[2].facts["retries"] == 1


def test_a_sub_agent_is_found_by_its_prompt_and_its_results_do_not_mix() -> None:
    talk = Conversations()
    prompts = ["Count the files in /usr and say how many.", "Read /etc/os-release and say its name."]
    calls = [call("task", number, prompt=prompt) for number, prompt in enumerate(prompts, 1)]
    told = talk.converse([SYSTEM, TASK], *calls)
    workers = [
        talk.converse([SYSTEM, say("user", prompt)], call("bash", 10 + n, command=f"x{n}"))
        for n, prompt in enumerate(prompts)
    ]
    for number, worker in enumerate(workers):
        talk.converse([*worker, tell(10 + number, f"out {number}")], Text(f"answer {number}"))
    talk.converse([*told, tell(1, "answer 0"), tell(2, "answer 1")], Text("done"))
    (main,) = fold(talk).roots
    assert [(one.kind, one.link, one.turns[-1].text) for one in main.subagents] == [
        ("subagent", "prompt", "answer 0"),
        ("subagent", "prompt", "answer 1"),
    ]
    assert main.turns[2].subagents == {"c1": [main.subagents[0].id], "c2": [main.subagents[1].id]}
    assert main.subagents[1].turns[2].results[0].text == "out 1"


def test_sub_agents_are_told_apart_by_what_their_calls_do_not_share() -> None:
    talk = Conversations()
    calls = [
        call("Agent", number, description="work", prompt=f"be number {number}", type="general") for number in (1, 2)
    ]
    told = talk.converse([SYSTEM, TASK], *calls)
    for number in (2, 1):
        words = f"<reminder>You do general work.</reminder>be number {number}"
        talk.converse([SYSTEM, say("user", words)], Text(f"answer {number}"))
    talk.converse([*told, tell(1, "a"), tell(2, "b")], Text("done"))
    (main,) = fold(talk).roots
    begun = main.turns[2].subagents
    by_id = {one.id: one for one in main.subagents}
    assert {name: by_id[ids[0]].turns[-1].text for name, ids in begun.items()} == {"c1": "answer 1", "c2": "answer 2"}


def test_a_sub_agent_with_other_words_is_found_by_time_and_doubt_is_said() -> None:
    for calls, expected in (
        ([call("task", 1, id=7)], "time"),
        ([call("task", 1, id=7), call("task", 2, id=8)], "ambiguous"),
    ):
        talk = Conversations()
        told = talk.converse([SYSTEM, TASK], *calls)
        talk.converse([SYSTEM, say("user", "other words altogether")], Text("answer"))
        talk.converse([*told, *(tell(n + 1, "ok") for n in range(len(calls)))], Text("done"))
        assert {one.link for one in fold(talk).trajectories} == {"", expected}


def test_a_call_that_is_over_has_begun_nothing() -> None:
    talk = Conversations()
    talk.converse([SYSTEM, TASK], call("submit", 1, answer="it is Linux"))
    talk.finish(0)
    talk.converse([SYSTEM, say("user", "another task")], Text("done"))
    assert [(one.kind, one.link) for one in fold(talk).roots] == [("main", ""), ("main", "")]


def test_very_many_conversations_fold_in_time() -> None:
    talk = Conversations()
    for number in range(1500):
        talk.converse([SYSTEM, say("user", f"begin {number} anew")], call("bash", number, command="x" * 50))
    assert sum(1 for _ in fold(talk).trajectories) == 1500


def test_a_title_is_beside_the_conversation() -> None:
    talk = Conversations()
    talk.converse([say("system", "Give a title."), TASK], Text("Kernel name"), tools=())
    talk.converse([SYSTEM, say("user", "Now work on it.")], call("bash", 1, command="uname"))
    assert [one.kind for one in fold(talk).roots] == ["auxiliary", "main"]


def test_a_compacted_conversation_goes_on_in_another() -> None:
    talk = Conversations()
    told = talk.converse([SYSTEM, TASK], call("bash", 1, command="uname"))
    talk.converse([*told, tell(1, "Linux")], Text("hm"))
    talk.converse([*told, tell(1, "Linux"), say("user", "Sum it up.")], Text("summary"), tools=())
    talk.converse([SYSTEM, TASK, say("user", "Summary: it is Linux.")], Text("done"))
    roots = {one.kind: one for one in fold(talk).roots}
    assert set(roots) == {"main", "auxiliary", "continuation"}
    assert roots["main"].continued == roots["continuation"].id
    assert roots["continuation"].parent == roots["main"].id


def test_going_back_copies_the_history_and_says_so() -> None:
    talk = Conversations()
    told = talk.converse([SYSTEM, TASK], call("bash", 1, command="uname"))
    one_way = talk.converse([*told, tell(1, "Linux")], Text("one way"))
    talk.converse([*told, tell(1, "no: BSD")], Text("another way"))
    talk.converse([*one_way, say("user", "go on")], Text("on"))
    fork = next(one for one in fold(talk).roots if one.kind == "fork")
    assert [(turn.text, turn.is_copied) for turn in fork.turns if turn.source == "agent"] == [
        ("", True),
        ("another way", False),
    ]
    assert sum(turn.model_calls or 0 for turn in fork.turns) == 1


def test_history_that_no_model_was_seen_to_say_is_marked() -> None:
    talk = Conversations()
    talk.converse([SYSTEM, TASK, say("assistant", "I was told to."), say("user", "Go on.")], Text("ok"))
    turns = fold(talk).roots[0].turns
    assert [(turn.text, turn.is_copied, turn.model_calls) for turn in turns if turn.source == "agent"] == [
        ("I was told to.", True, None),
        ("ok", False, 1),
    ]


def test_words_that_the_record_does_not_keep_are_named_by_digest() -> None:
    talk = talk_twice()
    cut = json.dumps({"cut": {"bytes": 9_000_000, "digest": "sha256:ab"}})
    told = {"verdict": "allow", "rule": "model-door", "reason": "", "dialect": "chat", "model": "m", "branch": "b7"}
    talk.add(ModelCall(**talk.fields(), state="opened", call="m7", messages=cut, **told))
    talk.add(ModelCall(**talk.fields(), state="closed", call="m7", reply=cut, finish="stop", **told))
    one = next(one for one in fold(talk).roots if one.branch == "b7")
    assert [turn.text for turn in one.turns] == ["[9000000 bytes that the record does not keep, sha256:ab]"] * 2


def test_a_run_without_any_conversation_folds() -> None:
    (episode,) = fold_trajectories(number_events(tell_incident()))[1]
    assert episode.roots
    assert all(one.kind == "commands" for one in episode.roots)
    assert episode.containment.denied > 250
    assert episode.containment.is_contaminated


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=40),
            st.text(max_size=20),
            st.integers(0, 9),
            st.sampled_from(["opened", "closed", "denied"]),
        ),
        max_size=12,
    )
)
def test_no_record_of_the_guest_makes_the_fold_fail(told: list[tuple[str, str, int, str]]) -> None:
    talk = Conversations()
    for text, name, known, state in told:
        talk.add(StepOpened(**talk.fields(known), cause="tool_call", cgroup_id=1))
        talk.add(
            ModelCall(
                **talk.fields(), state=state, call=name, verdict="allow", rule="r", reason=text, dialect="chat", model=text, branch=name[:2],
                parent=name[1:], known=known, messages=text, reply=text, tools=text, steps=[known],
            )
        )  # fmt: skip
    for episode in fold_trajectories(talk.records())[1]:
        assert all(one.turns for one in episode.trajectories)


def test_messages_are_put_together_whatever_is_in_them() -> None:
    talk = Conversations()
    history: list[Message] = [SYSTEM, TASK]
    for number in range(40):
        history = [*talk.converse(history, call("bash", number, command=str(number))), tell(number, f"out {number}")]
    (one,) = fold(talk).roots
    assert [turn.results[0].text for turn in one.turns[2:-1]] == [f"out {number}" for number in range(39)]
