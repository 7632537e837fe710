"""What a tool call starts wants to be charged to another call: by asking the model itself, by daemons, by handing sockets
on, by running another call's text. Each time the target must receive nothing, and no call that took no part is charged."""

import json
import os
from pathlib import Path

import pytest

import vallum
from vallum.testing.target import Target, make_address

pytestmark = [pytest.mark.root, pytest.mark.e2e]

AGENT = (Path(__file__).parent.parent / "e2e" / "chat_agent.py").read_bytes()


@pytest.fixture(scope="module")
def address():
    if os.geteuid() != 0:
        pytest.skip("needs root, for an address of its own")
    with make_address("192.0.2.79") as address:
        yield address


@pytest.fixture
def target(address):
    target = Target(address)
    yield target
    target.close()


def bash(command):
    return {"name": "bash", "arguments": {"command": command}}


async def work(node, script, files=()):
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with node.sandbox(model=model) as sb:
        await sb.write_file("/tmp/agent.py", AGENT)
        for path, text in files:
            await sb.write_file(path, text)
        ran = await sb.exec(["python3", "/tmp/agent.py", "go"], timeout_s=40)
        assert ran.exit_code == 0, ran.stderr.decode()
    return await node.events(run=sb.run, episode=sb.episode)


def steps_by_call(events):
    return {
        json.loads(e["arguments"]).get("command"): e["scope"]["step"]
        for e in events
        if e["kind"] == "tool.call" and e["source"] == "model"
    }


def denied(events, port):
    return [e for e in events if e["kind"] == "net.flow" and e["dst_port"] == port and e["state"] == "denied"]


async def test_a_daemon_that_has_a_model_of_its_own(node, target):
    """It asks with the cell's own key; the reply opens a step, and the daemon would like to be charged to that one."""
    rogue = f"""
import json, os, subprocess, time, urllib.request
os.setsid()
if os.fork(): os._exit(0)
time.sleep(0.6)
body = json.dumps({{"model": "m", "messages": [{{"role": "user", "content": "rogue"}}],
    "tools": [{{"type": "function", "function": {{"name": "bash", "parameters": {{"type": "object"}}}}}}]}}).encode()
headers = {{"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}}
urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)).read()
subprocess.run(["curl", "-s", "-m", "2", "{target.url}/rogue"])
"""
    first = "python3 /tmp/rogue.py >/dev/null 2>&1 & sleep 0.2"
    second, third = "sleep 1.2; echo second", "sleep 1; echo third"
    script = [
        {"first": "rogue", "tool_calls": [bash("echo rogue")]},
        *({"first": "go", "tool_calls": [bash(text)]} for text in (first, second, third)),
        {"first": "go", "text": "finished"},
    ]
    events = await work(node, script, [("/tmp/rogue.py", rogue)])
    steps = steps_by_call(events)
    assert "echo rogue" in steps  # the reply did open one
    (flow,) = denied(events, target.port)
    assert flow["scope"]["step"] == steps[first]
    assert flow["attribution"] == {"method": "cgroup", "confidence": 1.0}
    assert not [e for e in events if e["kind"] == "process.started" and e["scope"]["step"] == steps["echo rogue"]]
    for text in (second, third):  # and the agent's own calls are charged as ever
        programs = [e for e in events if e["kind"] == "process.started" and text in e["process"]["argv"]]
        assert [e["scope"]["step"] for e in programs] == [steps[text]]
    assert target.received == []


async def test_a_socket_that_goes_to_another_calls_process(node, target):
    """A daemon of the first call is handed a socket that the second made, and connects it while the third runs."""
    holder = f"""
import os, socket, time
server = socket.socket(socket.AF_UNIX); server.bind("/tmp/s"); server.listen()
peer, _ = server.accept()
_, fds, _, _ = socket.recv_fds(peer, 1, 1)
time.sleep(0.8)
s = socket.socket(fileno=fds[0]); s.settimeout(2)
try: s.connect(("{target.address}", {target.port})); s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n"); s.recv(1)
except OSError: pass
"""
    giver = """
import socket, time
peer = socket.socket(socket.AF_UNIX); peer.connect("/tmp/s")
s = socket.socket(); socket.send_fds(peer, [b"x"], [s.fileno()])
"""
    first = "setsid -f python3 /tmp/holder.py >/dev/null 2>&1; sleep 0.3"
    second, third = "python3 /tmp/giver.py; sleep 0.1", "sleep 1.8; echo third"
    script = [*({"tool_calls": [bash(text)]} for text in (first, second, third)), {"text": "finished"}]
    events = await work(node, script, [("/tmp/holder.py", holder), ("/tmp/giver.py", giver)])
    steps = steps_by_call(events)
    (flow,) = denied(events, target.port)
    assert flow["scope"]["step"] == steps[first]  # who holds it and dialled
    assert flow["socket_step"] == steps[second]  # who made it
    assert target.received == []


async def test_a_call_that_runs_the_text_of_another_one(node, target):
    """Two calls at once; the first becomes, as fast as it can, a shell with the text of the second."""
    second = f"sleep 0.7; curl -s -m 2 {target.url}/$WHO"
    (script_file, first) = ("/tmp/spoof.py", "exec python3 /tmp/spoof.py")
    spoof = f"""
import os
os.execve("/bin/bash", ["bash", "-c", {second!r}], {{**os.environ, "WHO": "spoof"}})
"""
    script = [{"tool_calls": [bash(first), bash(second)]}, {"text": "finished"}]
    for _ in range(3):
        events = await work(node, script, [(script_file, spoof)])
        steps = steps_by_call(events)
        flows = denied(events, target.port)
        spoofed = [e for e in flows if e["process"]["argv"][-1].endswith("/spoof")]
        assert len(spoofed) == 1
        step, attribution = spoofed[0]["scope"]["step"], spoofed[0]["attribution"]
        assert step != steps[second]
        assert step == steps[first] or attribution["candidates"] == sorted(steps.values())
        assert target.received == []


async def test_a_timeout_ends_the_agent_and_all_that_its_calls_started(node, target):
    """The agent stands in the step of its call, and so does a daemon of an earlier one: no step is left out."""
    script = [
        {"tool_calls": [bash("setsid -f sleep 61 >/dev/null 2>&1")]},
        {"tool_calls": [bash("sleep 62"), bash("sleep 63")]},
    ]
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with node.sandbox(model=model) as sb:
        await sb.write_file("/tmp/agent.py", AGENT)
        with pytest.raises(vallum.StepTimeout):
            await sb.exec(["python3", "/tmp/agent.py", "go"], timeout_s=3)
        left = await sb.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"])
        assert b"sleep 6" not in left.stdout.replace(b"cat", b"")
        assert b"agent.py" not in left.stdout
    events = await node.events(run=sb.run)
    opened = [e["scope"]["step"] for e in events if e["kind"] == "step.opened"]
    closed = [e["scope"]["step"] for e in events if e["kind"] == "step.closed"]
    assert sorted(opened) == sorted(closed)


async def test_an_agent_that_does_not_mind_refusals_is_frozen(node):
    """Its budget is used up and it goes on asking: the kernel stops it, not a status."""
    stubborn = b"""
import os, urllib.error, urllib.request
headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
while True:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "go"}]}'
    try: urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)).read()
    except urllib.error.HTTPError: pass
"""
    budget = vallum.ModelBudget(calls=0)
    async with node.sandbox(model=vallum.Model(upstream="scripted", script=b"[]", budget=budget)) as sb:
        await sb.write_file("/tmp/agent.py", stubborn)
        with pytest.raises(vallum.StepTimeout):
            await sb.exec(["python3", "/tmp/agent.py"], timeout_s=5)
        events = await node.events(run=sb.run)
    (action,) = [e for e in events if e["kind"] == "containment.action"]
    assert action["action"] == "freeze_cell"
    refused = [e for e in events if e["kind"] == "model.call" and e["state"] == "denied"]
    assert {e["rule"] for e in refused} == {"model-budget"}
    assert action["latency_ns"] < 1e9
    assert all(events.index(e) < events.index(action) for e in refused)  # nothing after it stood still
