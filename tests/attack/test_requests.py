"""Requests and flows that want past the gateway's reading of them. Each refusal has its allowed twin."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from vallum.core.verdict import Decision
from vallum.gateway.kit import Canary, Credential, Kit
from vallum.rules.facts import FlowFacts, Pin, RequestFacts
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.sessions import read_session
from vallum.rules.verdicts import judge_request, judge_session

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_path = Path(__file__).parents[1] / "integration" / "gateway_world_priv.py"
_spec = importlib.util.spec_from_file_location("attack_world_priv", _path)
assert _spec is not None and _spec.loader is not None
world_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world_module
_spec.loader.exec_module(world_module)
run_in_world, World = world_module.run_in_world, world_module.World

MIRROR = "192.0.2.20"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
WHOLE = Rule(id="whole", host="mirror.test", ports=(80,))
HEAD = "Host: mirror.test\r\n"


async def reached(world: World, name: str = "mirror.test") -> str:
    return (await world.ask(name)).answer[0][0].address


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    return head + await reader.readexactly(length)


@pytest.mark.parametrize("change", ["narrower", "denial", "phase"])
def test_a_connection_that_went_unread_does_not_outlive_the_rules_that_let_it(tmp_path: Path, change: str) -> None:
    """Kept open from set-up, it would carry any request past terms that only bind who is read."""
    in_setup = Rule(id="free", host="mirror.test", ports=(80,), phase="setup")
    in_run = Rule(id="gets", host="mirror.test", ports=(80,), phase="run", methods=("GET",))
    before, kit, after, later = {
        "narrower": (Ruleset(allow=(WHOLE,)), Kit(), Ruleset(allow=(Rule(id="gets", host="mirror.test", ports=(80,), methods=("GET",)),)), Kit()),
        "denial": (Ruleset(allow=(WHOLE,)), Kit(), Ruleset(allow=(WHOLE,), deny=(Rule(id="no-posts", host="mirror.test", methods=("POST",)),)), Kit()),
        "phase": (Ruleset(allow=(in_setup, in_run)), Kit(phase="setup"), Ruleset(allow=(in_setup, in_run)), Kit(phase="run")),
    }[change]  # fmt: skip

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, OK) as tap:
            ip = await reached(world)
            reader, writer = await world.connect(ip, 80)
            writer.write(f"GET /a HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert b"hello" in await answer(reader)
            is_read = (await world.settled(1))[0].inspected
            assert world.link is not None
            await world.link.update_rules("c1", after, later)
            writer.write(f"POST /upload HTTP/1.1\r\n{HEAD}Content-Length: 6\r\n\r\nSECRET".encode())
            try:
                said = await asyncio.wait_for(reader.read(65536), 3)
            except ConnectionError:
                said = b""
            assert b"hello" not in said
            await asyncio.sleep(0.1)
            assert b"SECRET" not in tap.received and b"POST" not in tap.received
            if not is_read:
                denied = [e for e in await world.settled(3) if e.state == "denied"]
                assert [e.rule for e in denied] == ["not-inspectable"] and denied[0].scope.step == 3
            writer.close()
            # What the rules grant still goes, over a new connection.
            assert b"hello" in await world.say(ip, 80, f"GET /b HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())

    run_in_world(tmp_path, before, scenario, kit=kit)


def test_rules_that_do_not_ask_to_read_leave_open_connections_alone(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, OK):
            reader, writer = await world.connect(await reached(world), 80)
            for rules in (Ruleset(allow=(WHOLE,)), Ruleset(allow=(WHOLE, Rule(id="more", host="other.test")))):
                assert world.link is not None
                await world.link.update_rules("c1", rules, Kit())
                writer.write(f"GET /a HTTP/1.1\r\n{HEAD}\r\n".encode())
                assert b"hello" in await answer(reader)
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(WHOLE,)), scenario)


def test_a_request_under_way_is_cut_when_the_rules_begin_to_hold_it(tmp_path: Path) -> None:
    free = Rule(id="posts", host="mirror.test", ports=(80,), methods=("POST",))

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80) as tap:
            ip = await reached(world)
            reader, writer = await world.connect(ip, 80)
            writer.write(f"POST /in HTTP/1.1\r\n{HEAD}Content-Length: 99\r\n\r\nfirst".encode())
            while b"first" not in tap.received:
                await asyncio.sleep(0.01)
            assert world.link is not None
            await world.link.update_rules("c1", Ruleset(hold=(free,)), Kit())
            writer.write(b"second")
            assert b"200" not in await asyncio.wait_for(reader.read(65536), 3)
            await asyncio.sleep(0.1)
            assert b"second" not in tap.received
            denied = [e for e in await world.settled(2, "http.request") if e.state == "denied"]
            assert [(e.rule, e.verdict) for e in denied] == [("posts", "deny")]
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(free,)), scenario)


def test_a_request_that_a_person_let_pass_goes_on_when_the_rules_change(tmp_path: Path) -> None:
    held = Rule(id="posts", host="mirror.test", ports=(80,), methods=("POST",))

    async def scenario(world: World) -> None:
        async def decide(frame):
            return Decision(verdict="allow", rule=frame.rule, reason="fine")

        world.decide = decide
        async with world.tap(MIRROR, 80) as tap:
            _, writer = await world.connect(await reached(world), 80)
            writer.write(f"POST /in HTTP/1.1\r\n{HEAD}Content-Length: 11\r\n\r\nfirst".encode())
            while b"first" not in tap.received:
                await asyncio.sleep(0.01)
            assert world.link is not None
            await world.link.update_rules("c1", Ruleset(hold=(held,), allow=(Rule(id="x", host="other.test"),)), Kit())
            writer.write(b"second")
            for _ in range(100):
                if b"second" in tap.received:
                    break
                await asyncio.sleep(0.02)
            assert b"second" in tap.received
            writer.close()

    run_in_world(tmp_path, Ruleset(hold=(held,)), scenario)


def test_a_method_that_is_denied_cannot_be_named_in_a_header(tmp_path: Path) -> None:
    rules = Ruleset(allow=(WHOLE,), deny=(Rule(id="no-deletes", host="mirror.test", methods=("DELETE",)),))

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, OK) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            writer.write(f"DELETE /x HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert b"403" in (await answer(reader)).split(b"\r\n")[0]
            lines = "X-HTTP-Method-Override: DELETE\r\nX-Method-Override: DELETE\r\nX-Kept: yes\r\n"
            writer.write(f"POST /x HTTP/1.1\r\n{HEAD}{lines}Content-Length: 0\r\n\r\n".encode())
            assert b"hello" in await answer(reader)
            assert b"DELETE" not in tap.received and b"x-kept: yes" in tap.received.lower()
            writer.close()

    run_in_world(tmp_path, rules, scenario)


def test_a_tool_that_is_denied_cannot_be_called_by_a_get_that_says_it_is_a_post(tmp_path: Path) -> None:
    rules = Ruleset(allow=(WHOLE,), deny=(Rule(id="no-shell", host="mirror.test", tools=("shell",)),))
    call = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"shell","arguments":{}}}'

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, OK) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            lines = f"X-HTTP-Method-Override: POST\r\nContent-Type: application/json\r\nContent-Length: {len(call)}\r\n"
            writer.write(f"GET /mcp HTTP/1.1\r\n{HEAD}{lines}\r\n{call}".encode())
            assert b"hello" in await answer(reader)
            assert b"GET /mcp" in tap.received and b"override" not in tap.received.lower()
            writer.write(f"POST /mcp HTTP/1.1\r\n{HEAD}{lines}\r\n{call}".encode())
            assert b"no-shell" in await answer(reader)
            assert b"POST /mcp" not in tap.received
            writer.close()

    run_in_world(tmp_path, rules, scenario)


PUSHES = [
    ("POST", "/r.git/git-receive-pack", ""),
    ("POST", "/r.git/git-receive-pack", "x=1"),
    ("POST", "/r.git/git-receive-pack/", ""),
    ("POST", "/r.git%2Fgit-receive-pack", ""),
    ("GET", "/r.git/info/refs", "service=git-receive-pack"),
    ("GET", "/r.git/info/refs", "service=git-receive-pack&service=git-upload-pack"),
    ("HEAD", "/r.git/info/refs", "service=git%2Dreceive-pack"),
]


@pytest.mark.parametrize(("method", "path", "query"), PUSHES)
def test_a_push_that_is_denied_has_no_second_spelling(method: str, path: str, query: str) -> None:
    facts = FlowFacts(dst_ip="203.0.113.1", dst_port=80, names=(Pin(name="mirror.test"),), protocol="http")
    rules = Ruleset(allow=(WHOLE,), deny=(Rule(id="no-pushes", host="mirror.test", git="write"),))
    asked = RequestFacts(method=method, scheme="http", host="mirror.test", port=80, path=path, query=query)
    assert judge_request(rules, facts, asked).rule == "no-pushes"
    fetch = RequestFacts(
        method=method,
        scheme="http",
        host="mirror.test",
        port=80,
        path=path.replace("receive", "upload"),
        query=query.replace("receive", "upload"),
    )
    assert judge_request(rules, facts, fetch).rule == "whole"


KEY = Canary(name="planted", value=b"AKIAVALLUM7Q2X4Z6R8T")


def test_a_canary_in_the_place_of_the_method_does_not_leave(tmp_path: Path) -> None:
    reads = Rule(id="reads", host="mirror.test", ports=(80,), paths=("/**",))

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, OK) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            writer.write(f"{KEY.value.decode()} /x HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert b"403" in (await answer(reader)).split(b"\r\n")[0]
            writer.write(f"PURGE /x HTTP/1.1\r\n{HEAD}\r\n".encode())
            assert b"hello" in await answer(reader)
            assert KEY.value not in tap.received and b"PURGE" in tap.received
            denied = [e for e in await world.settled(5, "http.request") if e.state == "denied"]
            assert [e.rule for e in denied] == ["canary"] and denied[0].scope.step == 3
            assert KEY.value.decode() not in str(world.events)
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(reads,)), scenario, kit=Kit(canaries=(KEY,)))


def test_a_server_that_declines_a_websocket_cannot_echo_the_credential(tmp_path: Path) -> None:
    rule = Rule(id="it", host="mirror.test", ports=(80,), websocket=True, credential="deploy")
    secret = b"s3cr3t-deploy-key-0123456789"
    credential = Credential(name="deploy", hosts=("mirror.test",), secret=secret)
    echo = json.dumps({"you": "sent", "authorization": f"Bearer {secret.decode()}"}).encode()
    reply = b"HTTP/1.1 400 No\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s" % (secret, len(echo), echo)

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, reply) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            writer.write(f"GET /ws HTTP/1.1\r\n{HEAD}{upgrade}{key}\r\n".encode())
            said = await answer(reader)
            assert secret in tap.received
            assert b"400" in said.split(b"\r\n")[0] and b'"you": "sent"' in said
            assert secret not in said
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(rule,)), scenario, kit=Kit(credentials=(credential,)))


@pytest.mark.parametrize("kind", ["plain", "hexadecimal", "base32", "labels"])
def test_a_canary_in_the_name_of_a_query_is_asked_of_nobody(tmp_path: Path, kind: str) -> None:
    value = KEY.value
    label = {
        "plain": value.decode().lower(),
        "hexadecimal": value.hex(),
        "base32": base64.b32encode(value).decode().rstrip("=").lower(),
        "labels": ".".join(value.decode().lower()[at : at + 4] for at in range(0, 20, 4)),
    }[kind]

    async def scenario(world: World) -> None:
        await world.ask(f"{label}.wild.test")
        await world.ask("harmless.wild.test")
        assert set(world.queries) == {"harmless.wild.test"}
        refused, allowed = await world.settled(2, "dns.query")
        assert (refused.verdict, refused.rule, refused.scope.step) == ("deny", "canary", 3)
        assert allowed.verdict == "allow"

    run_in_world(tmp_path, Ruleset(allow=(Rule(id="wild", host="*.wild.test"),)), scenario, kit=Kit(canaries=(KEY,)))


@pytest.mark.parametrize("is_denied", [True, False])
def test_a_call_of_a_tool_that_was_held_is_judged_again_once_it_is_approved(tmp_path: Path, is_denied: bool) -> None:
    held = Rule(id="ask", host="mirror.test", ports=(80,), tools=("shell",))
    deny = (Rule(id="no-shell", host="mirror.test", tools=("shell",)),) if is_denied else ()
    call = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"shell","arguments":{"x":"SENT"}}}'
    result = b'{"jsonrpc":"2.0","id":1,"result":{"content":[]}}'
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(result), result)

    async def scenario(world: World) -> None:
        async def decide(frame):
            await world.link.update_rules("c1", Ruleset(allow=(WHOLE,), hold=(held,), deny=deny), Kit())
            return Decision(verdict="allow", rule=frame.rule, reason="fine")

        world.decide = decide
        async with world.tap(MIRROR, 80, reply) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            lines = f"Content-Type: application/json\r\nContent-Length: {len(call)}\r\n"
            writer.write(f"POST /mcp HTTP/1.1\r\n{HEAD}{lines}\r\n{call}".encode())
            said = await answer(reader)
            assert (b"no-shell" in said) == is_denied and (b"SENT" in tap.received) != is_denied
            assert len(world.holds) == 1
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(WHOLE,), hold=(held,)), scenario)


def test_a_push_that_is_denied_does_not_go_over_ssh() -> None:
    facts = FlowFacts(dst_ip="203.0.113.1", dst_port=22, names=(Pin(name="mirror.test"),), protocol="ssh")
    grant = Rule(id="git", host="mirror.test", ports=(22,), ssh=("git-write",))
    rules = Ruleset(allow=(grant,), deny=(Rule(id="no-pushes", host="mirror.test", git="write", paths=("/team/**",)),))

    def judged(command: str) -> str:
        return judge_session(rules, facts, read_session(command, None)).rule

    assert judged("git-receive-pack 'team/r.git'") == "no-pushes"
    assert judged("git-receive-pack '/x/../team/r.git'") == "no-pushes"
    assert judged("git-receive-pack '/own/r.git'") == "git"
    assert judged("git-upload-pack '/team/r.git'") == "git"
