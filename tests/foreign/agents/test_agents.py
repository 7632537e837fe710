"""Agents that nobody here wrote, unmodified and offline: each tool call is a step, and everything it causes is charged to it."""

import pytest

from vallum.record.reader import read_records
from vallum.record.trajectory_fold import fold_trajectories

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CALLS = {
    "codex": lambda command: {"name": "exec_command", "arguments": {"cmd": command}},
    "claude-code": lambda command: {"name": "Bash", "arguments": {"command": command, "description": "work"}},
    "mini-swe-agent": lambda command: {"name": "bash", "arguments": {"command": command}},
    "opencode": lambda command: {"name": "bash", "arguments": {"command": command, "description": "work"}},
    "gemini-cli": lambda command: {"name": "run_shell_command", "arguments": {"command": command}},
}
ENDS = {
    "mini-swe-agent": [
        {"tool_calls": [CALLS["mini-swe-agent"]("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")]},
    ]
}
OTHERS = pytest.mark.agents
AGENTS = [
    "codex",
    "claude-code",
    "mini-swe-agent",
    pytest.param("opencode", marks=OTHERS),
    pytest.param("gemini-cli", marks=OTHERS),
]


def late(target, delay_s, word):
    """A command whose daemon acts when the command is long over."""
    inner = f"sleep {delay_s}; curl -s -m 3 {target.url}/{word}"
    return f"setsid -f sh -c '{inner}' >/dev/null 2>&1; echo {word}"


@pytest.mark.parametrize("name", AGENTS)
async def test_every_call_is_a_step(run_agent, target, name):
    call = CALLS[name]
    first = late(target, 1.0, "late")
    second = "sleep 0.3; echo second"
    third = f"curl -s -m 3 {target.url}/now; sleep 2; echo third"
    script = [{"tools": True, "tool_calls": [call(text)]} for text in (first, second, third)]
    worked = await run_agent(name, [*script, *ENDS.get(name, []), {"text": "finished", "repeat": True}])
    steps = [worked.steps[text] for text in (first, second, third)]
    assert steps == sorted(steps)
    assert len(set(steps)) == 3
    assert 0 not in steps  # the agent's own

    denied = worked.denied(target.port)
    assert target.received == []
    assert denied["late"]["scope"]["step"] == worked.steps[first]
    assert denied["now"]["scope"]["step"] == worked.steps[third]
    assert denied["late"]["attribution"] == denied["now"]["attribution"] == {"method": "cgroup", "confidence": 1.0}
    (opened,) = worked.of_step("step.opened", worked.steps[third])
    assert worked.index(denied["late"]) > worked.index(opened)  # two steps later

    for text, word in ((first, "sh"), (second, "sleep"), (third, "curl")):
        programs = [e["process"]["argv"][:1] for e in worked.of_step("process.started", worked.steps[text])]
        assert [word] in programs
    for event in worked.of("process.started"):
        shown = " ".join(event["process"]["argv"])
        for text, step in worked.steps.items():
            if text and text in shown and event["scope"]["step"] != 0:
                assert event["scope"]["step"] == step
    for made in worked.of("tool.call", source="model"):
        assert made["model_call"]
        (answered,) = worked.of("model.call", state="closed", call=made["model_call"])
        assert made["scope"]["step"] in answered["steps"]
        assert worked.index(made) < worked.index(answered)  # written ahead of the answer's last byte


@pytest.mark.parametrize("name", ["codex", "claude-code"])
async def test_the_same_is_let_out_where_it_is_granted(run_agent, target, name):
    first = late(target, 0.5, "late")
    script = [{"tools": True, "tool_calls": [CALLS[name](text)]} for text in (first, "sleep 1.5")]
    script += [*ENDS.get(name, []), {"text": "finished", "repeat": True}]
    worked = await run_agent(name, script, allow=[f"{target.address}:{target.port}"])
    (opened,) = worked.of("net.flow", state="opened", dst_port=target.port)
    assert opened["scope"]["step"] == worked.steps[first]
    assert len(target.received) == 1


@pytest.mark.parametrize("name", ["codex", "claude-code", "mini-swe-agent"])
async def test_parallel_calls_of_one_reply(run_agent, target, name):
    one = f"sleep 0.6; curl -s -m 3 {target.url}/one; echo 'it is one'"
    other = f'sleep 0.4; curl -s -m 3 {target.url}/other; echo "it\'s other"'
    script = [{"tools": True, "tool_calls": [CALLS[name](one), CALLS[name](other)]}]
    worked = await run_agent(name, [*script, *ENDS.get(name, []), {"text": "finished", "repeat": True}])
    denied = worked.denied(target.port)
    assert target.received == []
    for word, text in (("one", one), ("other", other)):
        assert denied[word]["scope"]["step"] == worked.steps[text]
        assert denied[word]["attribution"] == {"method": "argv", "confidence": 0.9}


async def test_two_sub_agents_at_once(run_agent, target, tmp_path):
    """Claude Code's own: both in one process, over one connection or two."""
    one = f"sleep 0.6; curl -s -m 3 {target.url}/one; echo one"
    other = f"sleep 0.5; curl -s -m 3 {target.url}/other; echo other"
    agents = [
        {
            "name": "Agent",
            "arguments": {"description": "work", "prompt": f"be number {n}", "subagent_type": "general-purpose"},
        }
        for n in (1, 2)
    ]
    bash = CALLS["claude-code"]
    script = [
        {"first": "be number 1", "tool_calls": [bash(one)]},
        {"first": "be number 2", "tool_calls": [bash(other)]},
        {"first": "be number", "text": "done", "repeat": True},
        {"first": "start both", "tools": True, "tool_calls": agents},
        {"text": "finished", "repeat": True},
    ]
    worked = await run_agent("claude-code", script, task="start both")
    assert len(set(worked.steps.values())) == 4
    denied = worked.denied(target.port)
    assert target.received == []
    assert denied["one"]["scope"]["step"] == worked.steps[one]
    assert denied["other"]["scope"]["step"] == worked.steps[other]
    branches = {e["branch"] for e in worked.of("model.call", state="closed") if e["steps"]}
    assert len(branches) == 3  # the agent's and one of each sub-agent
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir() and not path.is_symlink()]
    (episode,) = fold_trajectories(read_records(run))[1]
    main = next(one for one in episode.roots if one.kind == "main")
    assert [(one.kind, one.link) for one in main.subagents] == [("subagent", "prompt")] * 2
    for sub in main.subagents:
        turn = next(turn for turn in sub.turns if turn.calls)
        assert turn.calls[0].step in (worked.steps[one], worked.steps[other])
        assert turn.containment.denied == 1
