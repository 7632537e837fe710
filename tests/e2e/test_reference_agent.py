"""The reference agent in a real cell: its calls are steps, and what they start is charged to them by the kernel."""

import pytest

import vallum
from vallum.agent.limits import Limits
from vallum.agent.models.scripted import ScriptedModel
from vallum.agent.reference import make_agent

pytestmark = [pytest.mark.root, pytest.mark.e2e]


def step_of(events, call_id):
    steps = {e.scope.step for e in events if e["scope"]["tool_call"] == call_id and e["kind"] == "tool.call"}
    assert len(steps) == 1, f"{call_id}: {steps}"
    return steps.pop()


async def test_it_mends_a_program_and_each_call_is_a_step(home):
    model = ScriptedModel(
        [
            (
                "bash",
                {"command": "mkdir -p /tmp/p && cd /tmp/p && printf 'def add(a, b):\\n    return a - b\\n' > m.py"},
            ),
            ("bash", {"command": "python3 -c 'import m; assert m.add(2, 2) == 4'"}),
            ("edit", {"action": "replace", "path": "/tmp/p/m.py", "old": "a - b", "text": "(a + b)"}),
            ("bash", {"command": "python3 -c 'import m; assert m.add(2, 2) == 4' && pwd"}),
            ("submit", {"answer": "add adds"}),
        ]
    )
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        agent = await make_agent(sb, model)
        outcome = await agent.run("add is broken")
        await agent.close()
        assert (outcome.status, outcome.answer) == ("submitted", "add adds")
        results = [m.content for m in agent.messages if m.role == "tool"]
        assert "AssertionError" in results[1]
        assert results[1].startswith("exit code 1")
        assert "return (a + b)" in results[2]
        assert results[3] == "exit code 0\n/tmp/p", "the shell stays where it was"
        events = await node.events(run=sb.run, episode=sb.episode)
    steps = [step_of(events, f"call_scripted_{n}") for n in (1, 2, 3, 4)]
    assert len(set(steps)) == 4
    pythons = [
        e for e in events if e["kind"] == "process.started" and e.process.exe.rpartition("/")[2].startswith("python3")
    ]
    assert {e.scope.step for e in pythons} == {steps[1], steps[3]}


async def test_what_is_left_in_the_background_stays_with_its_call(home):
    model = ScriptedModel(
        [
            (
                "bash",
                {
                    "command": "(sleep 0.6; python3 -c 'import socket; socket.create_connection((\"198.51.100.7\", 4444), 2)') >/dev/null 2>&1 &"
                },
            ),
            ("bash", {"command": "true"}),
            ("bash", {"command": "sleep 1.2"}),
            ("submit", {}),
        ]
    )
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        agent = await make_agent(sb, model)
        assert (await agent.run("x")).status == "submitted"
        await agent.close()
        events = await node.events(run=sb.run, episode=sb.episode)
    (denied,) = [e for e in events if e["kind"] == "net.flow"]
    assert (denied.verdict, denied.dst_port, denied.bytes_out) == ("deny", 4444, 0)
    assert denied.scope.step == step_of(events, "call_scripted_1")
    assert denied.scope.tool_call == "call_scripted_1"


async def test_two_sub_agents_side_by_side_are_told_apart(home):
    def say(messages):
        """One script for all three conversations: what comes next depends on what was said."""
        task = messages[1].content
        turn = sum(m.role == "assistant" for m in messages)
        if task == "both":
            return (
                [("task", {"prompt": "red"}), ("task", {"prompt": "blue"})]
                if turn == 0
                else ("submit", {"answer": "ok"})
            )
        if turn == 0:
            return (
                "bash",
                {"command": f"sleep 0.3; echo {task} > /tmp/{task}; cd /tmp && mkdir -p {task}d && cd {task}d"},
            )
        return ("bash", {"command": "pwd"}) if turn == 1 else ("submit", {"answer": f"{task} is done"})

    model = ScriptedModel([say] * 8)
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        agent = await make_agent(sb, model)
        outcome = await agent.run("both")
        await agent.close()
        assert outcome.status == "submitted"
        assert [m.content for m in agent.messages if m.role == "tool"][:2] == ["red is done", "blue is done"]
        events = await node.events(run=sb.run, episode=sb.episode)
    places = {
        c.content
        for asked in model.asked
        for c in asked
        if c.role == "tool" and c.content.startswith("exit code 0\n/tmp/")
    }
    assert places == {"exit code 0\n/tmp/redd", "exit code 0\n/tmp/blued"}, "each has a shell of its own"
    opened = {e.scope.step: e.mono_ns for e in events if e["kind"] == "step.opened" and e.scope.tool_call}
    closed = {e.scope.step: e.mono_ns for e in events if e["kind"] == "step.closed"}
    first, second = sorted(opened)[:2]
    assert opened[second] < closed[first], "they really overlapped"
    for step in (first, second):
        ran = [e for e in events if e["kind"] == "process.started" and e.scope.step == step]
        assert any("sleep" in e.process.exe for e in ran)


async def test_a_command_that_hangs_is_killed_and_the_shell_lives_on(home):
    model = ScriptedModel(
        [
            ("bash", {"command": "echo early; sleep 60", "timeout_s": 0.5}),
            ("bash", {"command": "exit 3"}),
            ("bash", {"command": "echo not here"}),
            ("bash", {"command": "echo still here"}),
            ("bash", {"command": "head -c 100000 /dev/zero | tr '\\0' x"}),
            ("submit", {}),
        ]
    )
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        agent = await make_agent(sb, model, limits=Limits(wall_s=60))
        assert (await agent.run("x")).status == "submitted"
        await agent.close()
        killed, left, told, alive, long, _ = [m.content for m in agent.messages if m.role == "tool"]
    assert "killed after 0.5 s" in killed
    assert "early" in killed
    assert left == "exit code 3"
    assert "There is a new shell now" in told
    assert alive == "exit code 0\nstill here"
    assert "characters left out" in long
    assert len(long) < 20_000


async def test_the_projects_memory_file_is_read(home):
    model = ScriptedModel([("submit", {})])
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        await sb.write_file("/tmp/w/AGENTS.md", "Use tabs.")
        agent = await make_agent(sb, model, workdir="/tmp/w")
        await agent.run("x")
        await agent.close()
    assert "Use tabs." in model.asked[0][0].content
    assert "/tmp/w" in model.asked[0][0].content
