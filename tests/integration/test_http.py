"""Requests read by the gateway process between a real cell network and fakes that count. Every denial has a twin."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from vallum.rules.grants import Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("http_world_priv", Path(__file__).with_name("gateway_world_priv.py"))
assert _spec is not None and _spec.loader is not None
world_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world_module
_spec.loader.exec_module(world_module)
run_in_world, World = world_module.run_in_world, world_module.World

MIRROR = "192.0.2.20"
HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GETS = Rule(id="gets", host="mirror.test", ports=(80,), methods=("GET", "HEAD"), paths=("/pub/**",))
POSTS = Rule(id="posts", host="mirror.test", ports=(80,), methods=("POST", "GET"), paths=("/in/**",))


def rules(*allow: Rule, hold: tuple[Rule, ...] = ()) -> Ruleset:
    return Ruleset(allow=allow, hold=hold)


async def reached(world: World) -> str:
    """The address of mirror.test as a guest that asked for it knows it."""
    return (await world.ask("mirror.test")).answer[0][0].address


def request(
    method: str = "GET", path: str = "/pub/a", host: str = "mirror.test", *lines: str, body: bytes = b""
) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", f"Host: {host}", *lines))
    return head.encode() + b"\r\n" + body


async def ask(world: World, *requests: bytes) -> bytes:
    return await world.say(await reached(world), 80, b"".join(requests), wait_s=1.0)


def test_each_request_of_a_connection_is_judged_by_method_and_path(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, HTTP_OK) as tap:
            ip = await reached(world)
            reader, writer = await world.connect(ip, 80)
            for path, status in (
                ("/pub/a", b"200"),
                ("/private", b"403"),
                ("/pub/../private", b"403"),
                ("/pub/b", b"200"),
            ):
                writer.write(request(path=path))
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
                assert head.split()[1] == status, (path, head)
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                body = await reader.readexactly(length)
                assert (status == b"200") == (body == b"hello")
                if status == b"403":
                    assert body.startswith(b"vallum: blocked by rule ")
            writer.write(request("POST", "/pub/a", "mirror.test", "Content-Length: 3", body=b"abc"))
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)).startswith(b"HTTP/1.1 403")
            writer.close()
            events = await world.settled(7, "http.request")
            assert [e.state for e in events] == ["opened", "closed", "denied", "denied", "opened", "closed", "denied"]
            assert {e.scope.step for e in events} == {3}
            assert [e.path for e in events if e.state == "denied"] == ["/private", "/private", "/pub/a"]
            assert b"private" not in tap.received and b"POST" not in tap.received
            assert tap.received.count(b"GET /pub/") == 2
            (opened,) = [e for e in await world.settled(1) if e.state == "opened"]
            assert opened.inspected

    run_in_world(tmp_path, rules(GETS), scenario)
