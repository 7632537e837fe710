"""Phases, live rules, credentials, canaries and approvals, through the public face and the command."""

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

FETCH = """
import sys, urllib.request, urllib.error
try:
    with urllib.request.urlopen(sys.argv[1], timeout=20) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print("OSError", error)
"""
SECRET = "s3cr3t/token+0123456789=="


class Web:
    """A server on loopback that keeps what it got."""

    def __init__(self):
        self.got = bytearray()
        self.connections = 0
        self.writers = []
        self.ended = asyncio.Event()

    async def handle(self, reader, writer):
        self.connections += 1
        self.writers.append(writer)
        try:
            while data := await reader.read(65536):
                self.got += data
                if b"\r\n\r\n" in data:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.ended.set()
            writer.close()


@pytest.fixture
async def web():
    web = Web()
    server = await asyncio.start_server(web.handle, "198.51.100.7", 0)
    web.port = server.sockets[0].getsockname()[1]
    web.url = f"http://web.test:{web.port}/"
    try:
        yield web
    finally:
        server.close()


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


@pytest.fixture
def rules(tmp_path, web):
    def write(text, name="rules.toml"):
        file = tmp_path / name
        file.write_text(text.replace("PORT", str(web.port)))
        return file

    return write


def rule(verb, more=""):
    return f'[[{verb}]]\nid = "{verb}-web"\nhost = "web.test"\nports = [PORT]\nprotocols = ["http"]\n{more}\n'


def fetch(url):
    return ["python3", "-c", FETCH, url]


async def command(home, *arguments, stdin=b""):
    """The `vallum` command in another process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vallum", *map(str, arguments)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "VALLUM_HOME": str(home)},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(stdin), 30)
    return process.returncode, out.decode(), err.decode()


async def wait_for_approval(node):
    revision = -1
    async with asyncio.timeout(20):
        while True:
            revision, pending = await node.wait_for_approvals(revision, 5)
            if pending:
                return pending[0]


async def kinds(node, sb, kind):
    return [event for event in await node.events(run=sb.run) if event["kind"] == kind]


async def test_a_held_connection_waits_and_goes_on_when_another_process_approves(home, node, web, rules):
    async with node.sandbox(rules=rules(rule("hold"))) as sb:
        running = asyncio.create_task(sb.exec(fetch(web.url)))
        held = await wait_for_approval(node)
        assert web.connections == 0, "nothing has left while it waits"
        code, out, _ = await command(home, "approvals", "--json")
        assert code == 0
        assert json.loads(out)["id"] == held.id
        code, _, err = await command(home, "approve", held.id, "--why", "looked at it")
        assert code == 0, err
        assert (await running).stdout == b"200 hello\n"
        (asked,), (decided,) = await kinds(node, sb, "approval.requested"), await kinds(node, sb, "approval.decided")
        assert asked["rule"] == "hold-web"
        assert asked["scope"]["step"] == 0
        assert decided["verdict"] == "allow"
        assert f"uid {os.geteuid()}" in decided["by"]
        assert decided["why"] == "looked at it"
        assert await node.approvals() == []
        code, _, err = await command(home, "deny", held.id)
        assert code == 2, "it was decided already"


async def test_a_held_protocol_in_which_servers_speak_first_is_not_connected_before(node, web, rules):
    silent = f"import socket; s = socket.create_connection(('web.test', {web.port})); print(s.recv(100))"
    held = rules(rule("hold").replace('["http"]', '["unknown", "ssh"]'))
    async with node.sandbox(rules=held) as sb:
        running = asyncio.create_task(sb.exec(["python3", "-c", silent]))
        approval = await wait_for_approval(node)
        assert web.connections == 0
        await node.decide(approval, "deny")
        await running
        assert web.connections == 0
        running = asyncio.create_task(sb.exec(["python3", "-c", silent], timeout_s=10))
        await node.decide(await wait_for_approval(node), "allow")
        async with asyncio.timeout(10):
            while not web.connections:
                await asyncio.sleep(0.05)
        for writer in web.writers:
            writer.close()
        await running


async def test_denied_and_timed_out_reach_nobody(home, node, web, rules):
    async with node.sandbox(rules=rules(rule("hold")), approval_timeout_s=1.0) as sb:
        running = asyncio.create_task(sb.exec(fetch(web.url)))
        held = await wait_for_approval(node)
        await command(home, "deny", held.id, "--why", "not today")
        assert b"200" not in (await running).stdout
        assert b"200" not in (await sb.exec(fetch(web.url))).stdout
        assert web.connections == 0
        decided = await kinds(node, sb, "approval.decided")
        assert [(one["verdict"], one["by"] == "timeout") for one in decided] == [("deny", False), ("deny", True)]
        assert decided[0]["why"] == "not today"
        denied = [
            e
            for e in await node.events(run=sb.run)
            if e.get("verdict") == "deny" and e["kind"] in ("net.flow", "http.request")
        ]
        assert {e["rule"] for e in denied} == {"hold-web"}
        assert {e["scope"]["step"] for e in denied} == {0, 1}


async def test_on_approval_answers_for_an_sdk_user_and_always_asks_once(node, web, rules):
    asked = []

    async def answer(approval):
        asked.append(approval)
        return "always"

    async with node.sandbox(rules=rules(rule("hold")), on_approval=answer) as sb:
        for _ in range(3):
            assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n"
        assert len(asked) == 1
        (changed,) = await kinds(node, sb, "rules.changed")
        assert changed["by"] == "approval"
        run = sb.run
    async with node.sandbox(rules=rules(rule("hold")), run=run) as other:
        assert (await other.exec(fetch(web.url))).stdout == b"200 hello\n", "for the whole run"


async def test_a_callback_that_fails_denies(node, web, rules):
    def answer(approval):
        raise ValueError("no idea")

    async with node.sandbox(rules=rules(rule("hold")), on_approval=answer) as sb:
        assert b"200" not in (await sb.exec(fetch(web.url))).stdout
        assert web.connections == 0
        (decided,) = await kinds(node, sb, "approval.decided")
        assert decided["why"] == "on_approval raised ValueError"


async def test_a_cell_that_ends_ends_what_it_asked(node, web, rules):
    sb = await node.sandbox(rules=rules(rule("hold")))
    running = asyncio.create_task(sb.exec(fetch(web.url)))
    await wait_for_approval(node)
    await sb.close()
    with contextlib.suppress(vallum.VallumError):
        await running
    assert await node.approvals() == []
    (decided,) = await kinds(node, sb, "approval.decided")
    assert (decided["verdict"], decided["by"]) == ("deny", "cell-closed")
    assert web.connections == 0


async def test_a_flood_of_one_cell_is_denied_unasked(node, web, rules):
    flood = (
        "import socket, sys, time\n"
        "socks = []\n"
        f"for _ in range(24):\n s = socket.create_connection(('web.test', {web.port})); s.sendall(b'GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n'); socks.append(s)\n"
        "time.sleep(3)\n"
    )
    async with node.sandbox(rules=rules(rule("hold"))) as sb:
        running = asyncio.create_task(sb.exec(["python3", "-c", flood]))
        async with asyncio.timeout(10):
            while not [
                e for e in await node.events(run=sb.run) if "too much put before a person" in e.get("reason", "")
            ]:
                await asyncio.sleep(0.2)
        assert len(await node.approvals()) <= 16
        assert web.connections == 0
        await running


async def test_set_up_may_what_the_run_may_not_and_there_is_no_way_back(node, web, rules):
    hold_open = f"""
import socket
s = socket.create_connection(("web.test", {web.port}))
s.sendall(b"GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n")
print(s.recv(100)[:12].decode(), flush=True)
print(s.recv(100))
"""
    async with node.sandbox(rules=rules(rule("allow", 'phase = "setup"')), phase="setup") as sb:
        assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n"
        seen = asyncio.Event()
        lingering = asyncio.create_task(sb.exec(["python3", "-c", hold_open], on_output=lambda *_: seen.set()))
        await asyncio.wait_for(seen.wait(), 10)
        assert await sb.set_phase("run") == 1, "the open flow of the set-up is cut"
        await asyncio.wait_for(lingering, 10)
        before = web.connections
        assert b"200" not in (await sb.exec(fetch(web.url))).stdout
        assert web.connections == before
        with pytest.raises(vallum.InvalidInput, match="no way back"):
            await sb.set_phase("setup")
        changed = await kinds(node, sb, "rules.changed")
        assert [(one["phase"], one["by"], one["flows_cut"]) for one in changed] == [
            ("setup", "sdk", 0),
            ("run", "phase", 1),
        ]


def test_run_setup_then_run(cli, rules, web):
    file = rules(rule("allow", 'phase = "setup"'))
    ran = cli("run", "--rules", file, "--setup", "echo in set-up", "--", "echo", "in run")
    assert (ran.code, ran.out) == (0, "in run\n")
    assert "in set-up" in ran.err
    assert [e["phase"] for e in cli.events(kind="rules.changed")] == ["setup", "run"]


async def test_rules_change_while_the_cell_runs_all_or_nothing(home, node, web, rules, tmp_path):
    async with node.sandbox() as sb:
        assert b"200" not in (await sb.exec(fetch(web.url))).stdout
        await sb.update_rules(allow=[f"web.test:{web.port}"])
        assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n"
        (tmp_path / "broken.toml").write_text('[[allow]]\nhost = "a b"\n')
        code, _, err = await command(home, "rules", "apply", tmp_path / "broken.toml", sb.run)
        assert code == 2
        assert "line 2" in err
        assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n", "nothing has changed"
        code, _, err = await command(home, "rules", "apply", rules("", "none.toml"), sb.run)
        assert code == 0, err
        before = web.connections
        assert b"200" not in (await sb.exec(fetch(web.url))).stdout
        assert web.connections == before
        changed = await kinds(node, sb, "rules.changed")
        assert [one["by"] for one in changed] == ["sdk", "cli"]
        assert changed[0]["digest"] != changed[1]["digest"]
        assert any(f"port {web.port}" in line for line in changed[0]["rules"])


async def test_a_stored_secret_is_sent_by_the_door_and_found_nowhere_else(home, web, rules):
    code, _, err = await command(home, "credentials", "add", "svc", "--host", "web.test", stdin=SECRET.encode() + b"\n")
    assert code == 0, err
    code, out, _ = await command(home, "credentials", "list", "--json")
    assert json.loads(out)["name"] == "svc"
    assert SECRET not in out
    look = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null; env; cat /etc/vallum/* 2>/dev/null; true"
    async with vallum.Node(home=home) as node:
        async with node.sandbox(rules=rules(rule("allow", 'credential = "svc"'))) as sb:
            assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n"
            assert f"Bearer {SECRET}".encode() in web.got
            assert SECRET.encode() not in (await sb.exec(["sh", "-c", look])).stdout
            with pytest.raises(vallum.InvalidInput, match="credential svc") as refused:
                await sb.exec(["true"], environ={"TOKEN": SECRET})
            assert SECRET not in str(refused.value)
            # A user who leaks it into the cell by hand: the record has it nowhere.
            await sb.exec(["sh", "-c", f"echo {SECRET} | base64 >/dev/null"])
            run = sb.run
        with pytest.raises(vallum.InvalidInput, match="credential svc"):
            await node.sandbox(environ={"TOKEN": f"x{SECRET}"})
        pid = node.pid
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert SECRET.encode() not in command_line
        events = await node.events(run=run)
    requests = [e for e in events if e["kind"] == "http.request" and e["state"] == "opened"]
    assert [e["verdict"] for e in requests] == ["allow"]
    assert "svc" in [e["credential"] for e in events if e["kind"] == "http.request"]
    calls = json.dumps([e for e in events if e["kind"] == "tool.call"])
    assert "[credential svc]" in calls
    code, _, err = await command(home, "report", run, "-o", home / "report.html")
    assert code == 0, err
    code, _, err = await command(home, "verify", run)
    assert code == 0, err
    for file in home.rglob("*"):
        if file.is_file() and file.parent.name != "credentials":
            content = file.read_bytes()
            assert SECRET.encode() not in content, file
            assert base64.b64encode(SECRET.encode())[:-3] not in content, file


@pytest.mark.parametrize(
    ("more", "message"),
    [('credential = "nosuch"', "not stored"), ('credential = "other"', "is for api.example only")],
)
async def test_a_credential_that_does_not_fit_its_rule_stops_the_sandbox(home, node, rules, more, message):
    await command(home, "credentials", "add", "other", "--host", "api.example", stdin=b"0123456789abcdef")
    with pytest.raises(vallum.RuleError, match=message):
        await node.sandbox(rules=rules(rule("allow", more)))
    async with node.sandbox() as sb:
        assert (await sb.exec(["true"])).exit_code == 0


async def test_a_loose_credential_file_stops_every_cell(home, node):
    await command(home, "credentials", "add", "one", "--host", "api.example", stdin=b"0123456789abcdef")
    file = home / "credentials" / "one.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o640)
    with pytest.raises(vallum.NodeError, match="chmod 600"):
        await node.sandbox()
    file.chmod(0o600)
    async with node.sandbox() as sb:
        assert (await sb.exec(["true"])).exit_code == 0


async def test_a_canary_does_not_leave_in_a_request(node, web, rules):
    canary = "canary-7f3e19aa"
    grant = rules(rule("allow", 'methods = ["GET", "POST"]'))
    async with node.sandbox(rules=grant, canaries={"bait": canary}, plant_canaries=True) as sb:
        assert (await sb.exec(fetch(web.url))).stdout == b"200 hello\n", "without it a request passes"
        before = bytes(web.got)
        assert b"200" not in (await sb.exec(fetch(f"{web.url}?q={canary}"))).stdout
        planted = (await sb.exec(["sh", "-c", "grep -o AKIA.* ~/.aws/credentials"])).stdout.decode().strip()
        assert len(planted) == 20
        assert b"200" not in (await sb.exec(fetch(f"{web.url}?q={planted}"))).stdout
        assert bytes(web.got) == before, "no byte of either left"
        denied = [e for e in await node.events(run=sb.run) if e["kind"] == "http.request" and e["verdict"] == "deny"]
        assert {e["rule"] for e in denied} == {"canary"}
        reasons = {e["reason"] for e in denied}
        assert any("bait" in reason for reason in reasons)
        assert any("planted-aws-key" in reason for reason in reasons), reasons
        assert canary not in json.dumps(await node.events(run=sb.run))


class Terminal:
    """`vallum run` on a terminal of its own."""

    def __init__(self, home, *arguments):
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vallum", "run", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "VALLUM_HOME": str(home)},
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self.master, False)
        self.shown = b""

    async def wait_for(self, text, count=1):
        async with asyncio.timeout(25):
            while self.shown.count(text) < count:
                with contextlib.suppress(BlockingIOError, OSError):
                    self.shown += os.read(self.master, 65536)
                await asyncio.sleep(0.02)

    def type(self, data):
        os.write(self.master, data)

    async def end(self):
        code = await asyncio.to_thread(self.process.wait, 20)
        with contextlib.suppress(BlockingIOError, OSError):
            self.shown += os.read(self.master, 65536)
        os.close(self.master)
        return code


async def test_the_terminal_asks_and_takes_only_what_a_person_typed(home, web, rules):
    terminal = Terminal(home, "--rules", rules(rule("hold")), "--", *fetch(web.url))
    await terminal.wait_for(b"allow it?")
    terminal.type(b"\x1b[24;80Ry\r")  # what a terminal says when it is asked where the cursor is
    await terminal.wait_for(b"allow it?", 2)
    assert web.connections == 0
    terminal.type(b"y\r")
    await terminal.wait_for(b"200 hello")
    assert await terminal.end() == 0


async def test_no_on_the_terminal_denies_and_output_waits_for_the_answer(home, web, rules):
    noisy = f"sh -c 'sleep 0.3; i=0; while [ $i -lt 40 ]; do echo PAINTED; i=$((i+1)); sleep 0.05; done' & exec python3 -c \"$0\" {web.url}"
    terminal = Terminal(home, "--rules", rules(rule("hold")), "--", "sh", "-c", noisy, FETCH)
    await terminal.wait_for(b"allow it?")
    asked = terminal.shown.rindex(b"allow it?")
    await asyncio.sleep(1)
    with contextlib.suppress(BlockingIOError):
        terminal.shown += os.read(terminal.master, 65536)
    assert b"PAINTED" not in terminal.shown[asked:]
    terminal.type(b"n\r")
    await terminal.wait_for(b"403")
    await terminal.end()
    assert b"PAINTED" in terminal.shown[asked:]
    assert web.connections == 0
