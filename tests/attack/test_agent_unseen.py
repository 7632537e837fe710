"""A process that asks the model over a socket which nobody holds while the node looks whose it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

AGENT = (Path(__file__).parent.parent / "e2e" / "chat_agent.py").read_bytes()
UNSEEN = """
import json, os, socket, time
from urllib.parse import urlsplit
url = urlsplit(os.environ["OPENAI_BASE_URL"])
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "rogue"}],
    "tools": [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}]}).encode()
ip = socket.getaddrinfo(url.hostname, 80, socket.AF_INET)[0][4][0]
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
s = socket.socket(); s.setblocking(False)
try: s.connect((ip, url.port or 80))
except BlockingIOError: pass
socket.send_fds(here, [b"x"], [s.fileno()]); s.close()  # in flight: no process has it
time.sleep(0.4)
s = socket.socket(fileno=socket.recv_fds(there, 1, 1)[1][0]); s.setblocking(True)
s.sendall((f"POST {url.path}/chat/completions HTTP/1.1\\r\\nHost: {url.hostname}\\r\\nConnection: close\\r\\n"
    f"Authorization: Bearer {os.environ['OPENAI_API_KEY']}\\r\\nContent-Type: application/json\\r\\n"
    f"Content-Length: {len(body)}\\r\\n\\r\\n").encode() + body)
while s.recv(65536): pass
"""


def bash(command: str) -> dict[str, object]:
    return {"name": "bash", "arguments": {"command": command}}


async def test_an_asker_that_cannot_be_seen_moves_nobody(node: vallum.Node) -> None:
    first, second, third = "python3 /tmp/unseen.py", "echo second; sleep 0.1", "sleep 0.3; echo third"
    script = [
        {"first": "rogue", "tool_calls": [bash("echo rogue")]},
        *({"first": "go", "tool_calls": [bash(text)]} for text in (first, second, third)),
        {"first": "go", "text": "finished"},
    ]
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with node.sandbox(model=model) as sb:
        await sb.write_file("/tmp/agent.py", AGENT)
        await sb.write_file("/tmp/unseen.py", UNSEEN)
        ran = await sb.exec(["python3", "/tmp/agent.py", "go"], timeout_s=40)
        assert ran.exit_code == 0, ran.stderr.decode()
    events = await node.events(run=sb.run)
    steps = {
        json.loads(e["arguments"]).get("command"): e["scope"]["step"]
        for e in events
        if e["kind"] == "tool.call" and e["source"] == "model"
    }
    assert "echo rogue" in steps
    assert not [e for e in events if e["kind"] == "process.started" and e["scope"]["step"] == steps["echo rogue"]]
    for text in (second, third):
        programs = [e for e in events if e["kind"] == "process.started" and text in e["process"]["argv"]]
        assert programs and {e["scope"]["step"] for e in programs} == {steps[text]}
        # Not one doubt: the step that the rogue's reply opened is no candidate for what the agent does.
        assert {e["attribution"]["method"] for e in programs} == {"cgroup"}
        assert {e["attribution"]["confidence"] for e in programs} == {1.0}
