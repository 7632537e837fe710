"""An agent inside its cell: each tool call of its model is a step, and what a call starts is charged to it."""

import json
import os
import shutil
from pathlib import Path

import pytest

import vallum
from vallum.testing.target import Target, make_address

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

AGENT = Path(__file__).with_name("chat_agent.py").read_bytes()


@pytest.fixture(scope="module")
def address():
    with make_address() as address:
        yield address


@pytest.fixture
def target(address):
    target = Target(address)
    yield target
    target.close()


def bash(command):
    return {"name": "bash", "arguments": {"command": command}}


async def work(home, script, *, allow=(), task="go", agent=AGENT, level="ns"):
    """Let the agent work by a script; its events and what it printed."""
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with vallum.Node(home=home) as node:
        async with node.sandbox(model=model, allow=allow, level=level) as sb:
            await sb.write_file("/tmp/agent.py", agent)
            ran = await sb.exec(["python3", "/tmp/agent.py", task], timeout_s=30)
        events = await node.events(run=sb.run)
    assert ran.exit_code == 0, ran.stderr.decode()
    return events, ran.stdout.decode()


def steps_by_call(events):
    """Text of the command -> the step that the model's reply opened for it."""
    found = {}
    for event in events:
        if event["kind"] == "tool.call" and event["source"] == "model":
            found[json.loads(event["arguments"]).get("command") or event["arguments"]] = event["scope"]["step"]
    return found


def flows_to(events, port, state):
    return [e for e in events if e["kind"] == "net.flow" and e["dst_port"] == port and e["state"] == state]


def started(events, needle):
    return [
        e for e in events if e["kind"] == "process.started" and any(needle in word for word in e["process"]["argv"])
    ]


async def test_a_call_is_a_step_and_its_daemon_stays_with_it(home, target):
    late = f"(sleep 1.2; curl -s -m 3 {target.url}/) >/dev/null 2>&1 & echo first"
    second, third = "sleep 0.2; echo second", "sleep 2.5; echo third"
    script = [{"tool_calls": [bash(text)]} for text in (late, second, third)] + [{"text": "finished"}]
    events, said = await work(home, script)
    assert said == "finished\n"
    steps = steps_by_call(events)
    assert [steps[late], steps[second], steps[third]] == [1, 2, 3]
    (denied,) = flows_to(events, target.port, "denied")
    assert denied["scope"]["step"] == steps[late]
    assert denied["attribution"] == {"method": "cgroup", "confidence": 1.0}
    assert denied["process"]["argv"][0] == "curl"
    assert target.received == []
    opened = next(i for i, e in enumerate(events) if e["kind"] == "step.opened" and e["scope"]["step"] == steps[third])
    assert events.index(denied) > opened  # it acted two steps later
    for command, step in steps.items():
        assert {e["scope"]["step"] for e in started(events, command)} == {step}
    calls = [e for e in events if e["kind"] == "model.call" and e["state"] == "closed"]
    assert [e["steps"] for e in calls] == [[1], [2], [3], []]
    assert {e["scope"]["step"] for e in calls} == {0}  # the agent's own
    # Written ahead: the step is in the record before the answer that proposes it is.
    for call in calls[:-1]:
        written = next(
            i for i, e in enumerate(events) if e["kind"] == "tool.call" and e["scope"]["step"] == call["steps"][0]
        )
        assert written < events.index(call)


async def test_the_same_daemon_is_let_out_when_it_is_granted(home, target):
    late = f"(sleep 0.5; curl -s -m 3 {target.url}/) >/dev/null 2>&1 & echo first"
    script = [{"tool_calls": [bash(late)]}, {"tool_calls": [bash("sleep 1.5")]}, {"text": "finished"}]
    events, _ = await work(home, script, allow=[f"{target.address}:{target.port}"])
    (opened,) = flows_to(events, target.port, "opened")
    assert opened["scope"]["step"] == steps_by_call(events)[late]
    assert len(target.received) == 1


async def test_parallel_calls_of_one_reply_are_told_apart(home, target):
    commands = [f"sleep 0.{n}; curl -s -m 3 {target.url}/{n}; echo {n}" for n in (3, 4, 5)]
    script = [{"tool_calls": [bash(text) for text in commands]}, {"text": "finished"}]
    events, _ = await work(home, script)
    steps = steps_by_call(events)
    assert sorted(steps.values()) == [1, 2, 3]
    for command in commands:
        (shell,) = started(events, command)
        assert shell["scope"]["step"] == steps[command]
        assert shell["attribution"] == {"method": "argv", "confidence": 0.9}
    denied = {e["process"]["argv"][-1].rpartition("/")[2]: e for e in flows_to(events, target.port, "denied")}
    for command in commands:
        flow = denied[command[-1]]
        assert flow["scope"]["step"] == steps[command]
        assert flow["attribution"]["method"] == "argv"
    assert target.received == []


async def test_parallel_sub_agents_of_one_process_are_told_apart(home, target):
    one = f"curl -s -m 3 {target.url}/one"
    other = f"sleep 0.3; curl -s -m 3 {target.url}/other"
    task = [{"name": "task", "arguments": {"prompt": f"be number {n}"}} for n in (1, 2)]
    script = [
        {"first": "go", "tool_calls": task},
        {"first": "be number 1", "tool_calls": [bash(one)]},
        {"first": "be number 2", "tool_calls": [bash(other)]},
        {"first": "be number", "text": "done", "repeat": True},
        {"first": "go", "text": "finished"},
    ]
    events, _ = await work(home, script)
    steps = steps_by_call(events)
    assert len(steps) == 4
    denied = {
        e["process"]["argv"][-1].rpartition("/")[2]: e["scope"]["step"] for e in flows_to(events, target.port, "denied")
    }
    assert denied == {"one": steps[one], "other": steps[other]}
    assert target.received == []


async def test_what_cannot_be_told_apart_is_charged_to_nobody_alone(home, target):
    """Two calls with the same text: both candidates are named, and none of them is charged."""
    same = f"curl -s -m 3 {target.url}/"
    events, _ = await work(home, [{"tool_calls": [bash(same), bash(same)]}, {"text": "finished"}])
    denied = flows_to(events, target.port, "denied")
    assert len(denied) == 2
    for flow in denied:
        assert flow["scope"]["step"] == 0
        assert flow["attribution"]["candidates"] == [1, 2]
        assert flow["attribution"]["confidence"] == 0.5
    assert target.received == []


@pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed")
async def test_behind_a_kernel_of_its_own(home, target):
    """Level gvisor: by lineage, as everything there; parallel calls are not told apart, and the record says so."""
    late = f"(sleep 0.6; curl -s -m 3 {target.url}/late) >/dev/null 2>&1 & echo first"
    pair = [f"sleep 0.{n}; curl -s -m 3 {target.url}/{n}" for n in (2, 3)]
    script = [
        {"tool_calls": [bash(late)]},
        {"tool_calls": [bash("sleep 1.5")]},
        {"tool_calls": [bash(c) for c in pair]},
    ]
    events, _ = await work(home, [*script, {"text": "finished"}], level="gvisor")
    steps = steps_by_call(events)
    denied = {e["process"]["argv"][-1].rpartition("/")[2]: e for e in flows_to(events, target.port, "denied")}
    assert denied["late"]["scope"]["step"] == steps[late]
    assert denied["late"]["attribution"]["method"] == "lineage"
    for word in ("2", "3"):
        assert denied[word]["scope"]["step"] == 0
        assert denied[word]["attribution"]["candidates"] == [steps[text] for text in pair]
    assert target.received == []
