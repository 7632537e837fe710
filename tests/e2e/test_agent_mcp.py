"""Tools of an MCP server inside the cell: each call is a step, and so is what the server and its children do in it."""

import json
from pathlib import Path

import pytest

import vallum
from vallum.agent.models.scripted import ScriptedModel
from vallum.agent.reference import make_agent
from vallum.agent.tools.base import BadArguments, ToolError
from vallum.core.errors import InvalidInput

mcp = pytest.importorskip("mcp")
from vallum.agent.tools.mcp import open_mcp_tools  # noqa: E402 - needs the extra

pytestmark = [pytest.mark.root, pytest.mark.e2e]
SITE = str(Path(mcp.__file__).parents[1])
SERVER = """
import os, socket, subprocess, sys, time
from mcp.server.mcpserver import MCPServer
server = MCPServer("probe")

def knock(port):
    try:
        socket.create_connection(("198.51.100.7", port), 2).close()
        return "reached"
    except OSError as error:
        return type(error).__name__

@server.tool()
def dial(port: int) -> str:
    "Dial out, oneself."
    return knock(port)

@server.tool()
def dial_from_child(port: int) -> str:
    "Dial out from a child."
    code = f"import socket; socket.create_connection(('198.51.100.7', {port}), 2)"
    return str(subprocess.run([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL).returncode)

@server.tool()
def dial_later(port: int) -> str:
    "Leave a process behind that dials out."
    code = f"import socket, time; time.sleep(0.8); socket.create_connection(('198.51.100.7', {port}), 2)"
    subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return "left"

@server.tool()
def fail() -> str:
    "Does not work."
    raise ValueError("no such thing")

@server.tool()
def end() -> str:
    "Ends the server."
    print("farewell", file=sys.stderr, flush=True)
    os._exit(3)

server.run("stdio")
"""


@pytest.fixture
async def sb(home):
    where = {"mounts": [f"{SITE}:/opt/site:ro"], "environ": {"PYTHONPATH": "/opt/site"}}
    async with vallum.Node(home=home) as node, node.sandbox(**where) as sb:
        sb.node = node
        await sb.write_file("/tmp/server.py", SERVER)
        # A wrapper stays in front of the server, as npx and uv do.
        await sb.write_file("/tmp/wrapper.sh", "python3 /tmp/server.py; exit 0\n")
        yield sb


async def test_what_a_server_does_in_a_call_is_charged_to_the_call(sb):
    model = ScriptedModel(
        [
            ("probe__dial", {"port": 4001}),
            ("probe__dial_from_child", {"port": 4002}),
            ("probe__dial_later", {"port": 4003}),
            ("probe__dial", {"port": 4004}),
            ("bash", {"command": "sleep 1.2"}),
            ("probe__fail", {}),
            ("submit", {"answer": "tried"}),
        ]
    )
    async with open_mcp_tools(sb, ["sh /tmp/wrapper.sh"]) as tools:
        assert sorted(t.spec.name for t in tools) == [
            f"probe__{name}" for name in ("dial", "dial_from_child", "dial_later", "end", "fail")
        ]
        agent = await make_agent(sb, model, tools=tools)
        outcome = await agent.run("try it")
        await agent.close()
    assert outcome.status == "submitted"
    said = [m.content for m in agent.messages if m.role == "tool"]
    assert said[2] == "left"
    assert said[5].startswith("Error executing tool fail")
    events = await sb.node.events(run=sb.run, episode=sb.episode)
    steps = {e.scope.tool_call: e.scope.step for e in events if e["kind"] == "step.opened" and e["scope"]["tool_call"]}
    assert len(set(steps.values())) == len(steps) == 6
    denied = {e.dst_port: e for e in events if e["kind"] == "net.flow"}
    assert {port: (e.verdict, e.bytes_out, e.scope.tool_call) for port, e in denied.items()} == {
        4001: ("deny", 0, "call_scripted_1"),
        4002: ("deny", 0, "call_scripted_2"),
        4003: ("deny", 0, "call_scripted_3"),
        4004: ("deny", 0, "call_scripted_4"),
    }
    assert all(e.scope.step == steps[e.scope.tool_call] for e in denied.values())
    children = [e for e in events if e["kind"] == "process.started" and "-S" in json.dumps(e.process)]
    assert {e.scope.tool_call for e in children} >= {"call_scripted_2", "call_scripted_3"}
    left = {e.scope.tool_call: e.left_running for e in events if e["kind"] == "step.closed"}
    assert (left["call_scripted_1"], left["call_scripted_3"]) == (0, 1), "the server itself is not left behind"


async def test_a_server_that_ends_is_told_and_nothing_is_left(sb):
    async with open_mcp_tools(sb, ["python3 /tmp/server.py"]) as tools:
        named = {t.spec.name: t for t in tools}
        with pytest.raises(ToolError):
            await named["probe__end"].call("one", "{}")
        with pytest.raises(ToolError, match="farewell"):
            await named["probe__dial"].call("two", '{"port": 1}')
        with pytest.raises(BadArguments):
            await named["probe__dial"].call("three", "[]")
    assert "server.py" not in (await sb.exec(["ps", "axww"])).stdout.decode()


@pytest.mark.parametrize("command", ["true", "no-such-program", "sh -c 'echo hello; echo why >&2; exit 1'", "'open"])
async def test_what_is_no_server_is_said(sb, command):
    with pytest.raises(InvalidInput, match=r"mcp|MCP"):
        async with open_mcp_tools(sb, [command]):
            pass


async def test_only_a_command_with_a_step_of_its_own_goes_from_step_to_step(sb):
    async with sb.step() as step:
        sleeping = sb.start(["sleep", "5"])
        with pytest.raises(InvalidInput, match="outside"):
            await sleeping.enter_step(step)
        sleeping.signal(9)
        await sleeping.wait()
    alone = sb.start(["sleep", "60"])
    with pytest.raises(InvalidInput, match="closed"):
        await alone.enter_step(step)
    async with sb.step(tool_call="x", is_current=False) as other:
        await alone.enter_step(other)
    alone.signal(9)
    assert (await alone.wait()).exit_code == 137


PLAIN_SERVER = r"""
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked: continue
    method, result = asked["method"], None
    if method == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "my files!", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": "count.lines", "description": "Counts.", "inputSchema": {"type": "object"}}]}
    elif method == "tools/call":
        result = {"content": [{"type": "text", "text": str(len(open(asked["params"]["arguments"]["path"]).readlines()))}]}
    answer = {"result": result} if result is not None else {"error": {"code": -32601, "message": "no"}}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer}), flush=True)
"""


def test_the_command_line_starts_a_server_without_the_sdk(cli, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "server.py").write_text(PLAIN_SERVER)
    (tmp_path / "work" / "notes").write_text("one\ntwo\n")
    script = tmp_path / "script.json"
    calls = [("my_files__count_lines", {"path": "/work/notes"}), ("submit", {"answer": "counted"})]
    script.write_text(json.dumps([{"tool_calls": [{"name": name, "arguments": given}]} for name, given in calls]))
    kept = tmp_path / "transcript.jsonl"
    ran = cli(
        *("agent", "--model-upstream", f"scripted:{script}", "--work", tmp_path / "work", "--transcript", kept, "-q"),
        *("--mcp", "python3 server.py", "count the lines"),
    )
    assert (ran.code, ran.out.strip()) == (0, "counted"), ran.err
    tool = [json.loads(line) for line in kept.read_text().splitlines()]
    assert '"2"' in json.dumps(tool), kept.read_text()
