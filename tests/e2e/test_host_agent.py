"""An agent on the host that works through a sandbox: its model calls go through the cell's door, its calls are steps."""

import json

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]


async def ask(sb, messages):
    body = json.dumps({"model": "m", "messages": messages, "tools": TOOLS}).encode()
    answer = await sb.model_request("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["choices"][0]["message"]


def calls_of(message):
    return [(call["id"], json.loads(call["function"]["arguments"])["command"]) for call in message["tool_calls"]]


async def test_a_command_joins_the_step_of_its_call(home):
    def bash(command):
        return {"name": "bash", "arguments": {"command": command}}

    script = [
        {"tool_calls": [bash("echo one"), bash("echo two")]},
        {"tool_calls": [bash("echo three")]},
        {"text": "end"},
    ]
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with vallum.Node(home=home) as node:
        async with node.sandbox(model=model) as sb:
            messages = [{"role": "user", "content": "go"}]
            reply = await ask(sb, messages)
            (one, _), (two, _) = calls_of(reply)
            joined = await sb.exec(["echo", "one"], tool_call=one)
            async with sb.step(tool_call=two) as step:
                first = await sb.exec(["echo", "two"])
                second = await sb.exec(["echo", "again"])
            assert (joined.step, step, first.step, second.step) == (0, 1, 1, 1)
            messages += [reply, *({"role": "tool", "tool_call_id": c, "content": "x"} for c in (one, two))]
            reply = await ask(sb, messages)
            ((three, _),) = calls_of(reply)
            assert (await sb.exec(["echo", "three"], tool_call=three)).step == 2
            messages += [reply, {"role": "tool", "tool_call_id": three, "content": "x"}]
            assert (await ask(sb, messages))["content"] == "end"
            # Its step is over: what is run for that call now is a step of its own.
            assert (await sb.exec(["echo", "late"], tool_call=three)).step == 3
        events = await node.events(run=sb.run)
    made = [(e["source"], e["scope"]["step"]) for e in events if e["kind"] == "tool.call"]
    assert made == [
        ("model", 0),
        ("model", 1),
        ("sdk", 0),
        ("sdk", 1),
        ("sdk", 1),
        ("model", 2),
        ("sdk", 2),
        ("sdk", 3),
    ]
    closed = [e["scope"]["step"] for e in events if e["kind"] == "step.closed"]
    assert sorted(closed) == [0, 1, 2, 3]


async def test_without_a_model_there_is_no_door(home):
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        answer = await sb.model_request("/v1/chat/completions", b"{}")
        assert answer.status == 404
        assert (b"x-vallum-rule", b"no-model-door") in answer.headers
        environ = await sb.exec(["env"])
        assert b"API_KEY" not in environ.stdout
