"""The reference agent's loop: what it tells the model, when it ends, what it keeps. No cell: tools of the test's own."""

import asyncio
import json

import pytest

from vallum.agent.approval import make_approval
from vallum.agent.compaction import Summary, cut_before
from vallum.agent.hooks import CommandHook, Hook
from vallum.agent.limits import Limits
from vallum.agent.loop import Agent
from vallum.agent.messages import Message, Reply, ToolCall, ToolSpec, Usage
from vallum.agent.models.base import ModelError, ModelStopped
from vallum.agent.models.chat import read_reply, write_request
from vallum.agent.models.scripted import ScriptedModel
from vallum.agent.tools.base import MAX_RESULT_CHARS, ToolError, clip
from vallum.agent.tools.edit import Arguments, change, view
from vallum.agent.tools.submit import Submit
from vallum.agent.tools.todo import Todo
from vallum.agent.transcript import Transcript, read_transcript
from vallum.core.errors import InvalidInput


class Echo:
    """Says what it was given; fails on demand."""

    effect = "run"
    is_parallel = False

    def __init__(self, name="echo", *, is_parallel=False):
        self.spec = ToolSpec(name=name, description="", parameters={"type": "object"})
        self.is_parallel = is_parallel
        self.calls = []
        self.at_once = self.most_at_once = 0

    async def call(self, call_id, arguments):
        self.calls.append((call_id, arguments))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        said = json.loads(arguments)
        if said.get("fail"):
            raise ToolError("it did not work")
        return said.get("text", "")

    async def close(self):
        pass


def results(agent):
    return [m.content for m in agent.messages if m.role == "tool"]


async def test_calls_are_answered_in_order_until_it_submits():
    echo = Echo()
    model = ScriptedModel([("echo", {"text": "one"}), [("echo", {"text": "two"}), ("submit", {"answer": "ready"})]])
    agent = Agent(model, [echo, Submit()])
    outcome = await agent.run("do it")
    assert (outcome.status, outcome.answer, outcome.turns) == ("submitted", "ready", 2)
    assert results(agent) == ["one", "two", "(the work ended here)"]
    calls = [call.id for m in agent.messages for call in m.tool_calls]
    assert [m.tool_call_id for m in agent.messages if m.role == "tool"] == calls, "every call has its result"
    assert model.asked[1][-1].content == "one", "the model saw what its first call gave"


async def test_errors_are_told_and_the_work_goes_on():
    model = ScriptedModel(
        [("echo", {"fail": True}), ("nothing", {}), ("submit", {"wrong": 1}), ("submit", {"answer": "ok"})]
    )
    agent = Agent(model, [Echo(), Submit()])
    outcome = await agent.run("x")
    assert outcome.status == "submitted"
    failed, unknown, wrong, _ = results(agent)
    assert failed == "it did not work"
    assert "there is no tool 'nothing'" in unknown
    assert "echo, submit" in unknown
    assert "arguments are not usable" in wrong


async def test_replies_without_a_call_use_up_the_format_budget():
    agent = Agent(ScriptedModel(["hm", "well", ("submit", {})]), [Submit()], limits=Limits(format_errors=2))
    outcome = await agent.run("x")
    assert outcome.status == "format"
    assert outcome.turns == 2
    twin = Agent(ScriptedModel(["hm", ("submit", {})]), [Submit()], limits=Limits(format_errors=2))
    assert (await twin.run("x")).status == "submitted"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(turns=3), "3 turns are over"),
        (Limits(tokens=10), "tokens of 10"),
        (Limits(wall_s=0.015), "s are over"),
    ],
)
async def test_limits_end_it(limits, said):
    agent = Agent(ScriptedModel([("echo", {"text": "again and again"})] * 50), [Echo()], limits=limits)
    outcome = await agent.run("x")
    assert outcome.status == "limit"
    assert said in outcome.detail


def test_a_limit_that_is_no_limit_is_an_error():
    with pytest.raises(InvalidInput, match="turns is 0"):
        Limits(turns=0).check()


async def test_only_parallel_tools_run_side_by_side():
    alone, beside = Echo("alone"), Echo("beside", is_parallel=True)
    calls = [("alone", {"text": "1"}), ("alone", {"text": "2"}), ("beside", {"text": "3"}), ("beside", {"text": "4"})]
    agent = Agent(ScriptedModel([calls, ("submit", {})]), [alone, beside, Submit()])
    await agent.run("x")
    assert (alone.most_at_once, beside.most_at_once) == (1, 2)
    assert results(agent)[:4] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("mode", "effect", "runs"),
    [
        ("all", "run", True),
        ("edits", "edit", True),
        ("edits", "run", False),
        ("ask", "edit", False),
        ("plan", "run", False),
        ("plan", "read", True),
    ],
)
async def test_approval_modes(mode, effect, runs):
    echo = Echo()
    echo.effect = effect
    agent = Agent(ScriptedModel([("echo", {}), ("submit", {})]), [echo, Submit()], approval=make_approval(mode))
    assert (await agent.run("x")).status == "submitted"
    assert bool(echo.calls) == runs
    assert results(agent)[0].startswith("refused:") != runs


async def test_a_person_is_asked():
    async def ask(call):
        return None if "good" in call.arguments else "I do not like it"

    echo = Echo()
    model = ScriptedModel([("echo", {"text": "bad"}), ("echo", {"text": "good"}), ("submit", {})])
    agent = Agent(model, [echo, Submit()], approval=make_approval("ask", ask))
    await agent.run("x")
    assert results(agent)[:2] == ["refused: I do not like it", "good"]
    assert len(echo.calls) == 1


async def test_hooks_see_block_and_change():
    class Censor(Hook):
        async def before(self, call):
            return "not this" if "secret" in call.arguments else None

        async def after(self, call, result):
            return result.upper()

    agent = Agent(
        ScriptedModel([("echo", {"text": "a secret"}), ("echo", {"text": "plain"}), ("submit", {})]),
        [Echo(), Submit()],
        hooks=[Censor()],
    )
    await agent.run("x")
    assert results(agent)[:2] == ["refused: not this", "PLAIN"]


async def test_a_command_hook_blocks_by_its_exit_code(tmp_path):
    call = ToolCall(id="c", name="bash", arguments="{}")
    script = tmp_path / "hook"
    script.write_text('#!/bin/sh\ngrep -q \'"tool": "bash"\' || exit 1\necho "no shells" >&2\nexit 2\n')
    script.chmod(0o755)
    assert await CommandHook([str(script)]).before(call) == "no shells"
    assert await CommandHook(["true"]).before(call) is None
    assert await CommandHook([str(script)], tool="edit").before(call) is None
    with pytest.raises(InvalidInput, match="exit code 1"):
        await CommandHook(["false"]).before(call)
    with pytest.raises(InvalidInput, match="cannot be run"):
        await CommandHook(["/no/such/hook"]).before(call)


async def test_a_long_conversation_is_summarised_and_parts_no_call_from_its_result():
    class Counting(ScriptedModel):
        async def reply(self, messages, tools):
            reply = await super().reply(messages, tools)
            return Reply(message=reply.message, usage=Usage(prompt_tokens=len(messages)), finish=reply.finish)

    lines = [*[("echo", {"text": f"n{i}"}) for i in range(6)], "we were at n5", ("submit", {"answer": "end"})]
    model = Counting(lines)
    agent = Agent(model, [Echo(), Submit()], compaction=Summary(above_tokens=11, keep_last=4))
    outcome = await agent.run("the task")
    assert outcome.status == "submitted"
    last = model.asked[-1]
    assert [m.role for m in last[:3]] == ["system", "user", "user"]
    assert last[1].content == "the task"
    assert "we were at n5" in last[2].content
    assert last[3].role == "assistant", "a result without its call would be refused by every server"
    assert len(last) < 10


def test_where_a_conversation_may_be_cut():
    call = Message(role="assistant", tool_calls=(ToolCall(id="1", name="t", arguments="{}"),))
    answer = Message(role="tool", tool_call_id="1")
    messages = [Message(role="system"), Message(role="user"), call, answer, call, answer]
    assert [cut_before(messages, i) for i in range(7)] == [0, 1, 2, 2, 4, 4, 4]


async def test_an_interrupted_run_is_resumed(tmp_path):
    path = tmp_path / "t.jsonl"
    first = Agent(ScriptedModel([("echo", {"text": "one"})]), [Echo(), Submit()], transcript=Transcript(path))
    outcome = await first.run("the task")
    assert outcome.status == "model"
    assert "no line left" in outcome.detail
    call = Message(role="assistant", tool_calls=(ToolCall(id="lost", name="echo", arguments="{}"),))
    Transcript(path).add(call)
    with path.open("ab") as file:
        file.write(b'{"t":"message","mess')  # torn
    messages, used = read_transcript(path)
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert "interrupted" in messages[-1].content
    assert used.tokens > 0
    second = Agent(ScriptedModel([("submit", {"answer": "done"})]), [Echo(), Submit()])
    assert (await second.resume(messages, used)).answer == "done"


def test_a_transcript_that_is_none(tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(b'nonsense\n{"t":"usage","usage":{}}\n')
    with pytest.raises(InvalidInput, match="line 1"):
        read_transcript(bad)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_transcript(tmp_path / "none")


def test_edits():
    text = "a\nb\nc\n"
    assert change(text, Arguments(action="replace", path="/f", old="b\n", text="B\nB\n")) == "a\nB\nB\nc\n"
    assert change(text, Arguments(action="insert", path="/f", line=1, text="new")) == "a\nnew\nb\nc\n"
    assert change("a", Arguments(action="insert", path="/f", line=1, text="b")) == "a\nb"
    assert change("", Arguments(action="insert", path="/f", line=0, text="b\n")) == "b\n"
    for arguments, said in [
        (Arguments(action="replace", path="/f", old="x", text=""), "is not in the file"),
        (Arguments(action="replace", path="/f", old="", text=""), "needs `old`"),
        (Arguments(action="insert", path="/f", line=9, text=""), "has 3 lines"),
    ]:
        with pytest.raises(ToolError, match=said):
            change(text, arguments)
    with pytest.raises(ToolError, match="2 times"):
        change("xx", Arguments(action="replace", path="/f", old="x", text=""))
    assert view(text, 2, 1) == "     2  b\n(1 more lines)"
    assert view(text, 9, 1) == "(the file has 3 lines)"


def test_clip_keeps_head_and_tail():
    text = "h" * MAX_RESULT_CHARS + "t" * MAX_RESULT_CHARS
    short = clip(text)
    assert short.startswith("hhh")
    assert short.endswith("ttt")
    assert f"{MAX_RESULT_CHARS} characters left out" in short
    assert clip("short") == "short"


async def test_todo_is_a_list():
    todo = Todo()
    said = await todo.call("c", json.dumps({"items": [{"text": "a", "state": "finished"}, {"text": "b"}]}))
    assert said == "[x] a\n[ ] b"


def test_chat_completions_both_ways():
    call = ToolCall(id="c1", name="bash", arguments='{"command": "ls"}')
    messages = [Message(role="assistant", tool_calls=(call,)), Message(role="tool", tool_call_id="c1", content="out")]
    body = json.loads(write_request("m", messages, [Submit.spec], {"seed": 1}))
    assert body["messages"][0]["tool_calls"][0]["function"] == {"name": "bash", "arguments": '{"command": "ls"}'}
    assert body["messages"][1]["tool_call_id"] == "c1"
    assert (body["tools"][0]["function"]["name"], body["seed"]) == ("submit", 1)
    answer = {"choices": [{"message": {"content": None, "tool_calls": body["messages"][0]["tool_calls"]}}]}
    reply = read_reply(200, json.dumps(answer).encode())
    assert reply.message.tool_calls == (call,)
    assert reply.finish == "tool_calls"
    with pytest.raises(ModelStopped):
        read_reply(404, b"stopped")
    for status, raw, said in [
        (500, b"\x1b[31mno", "500"),
        (200, b"[]", "no chat completion"),
        (200, b'{"choices":[]}', "no chat"),
    ]:
        with pytest.raises(ModelError, match=said) as caught:
            read_reply(status, raw)
        assert "\x1b" not in str(caught.value)
