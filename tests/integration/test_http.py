"""Requests read by the gateway process between a real cell network and fakes that count. Every denial has a twin."""

from __future__ import annotations

import asyncio
import base64
import gzip
import importlib.util
import os
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from vallum.core.verdict import Decision
from vallum.gateway.kit import Canary, Kit
from vallum.rules.grants import Budget, Rule, Ruleset

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
    """Everything that is said to these requests on one connection, which the last one ends."""
    *first, last = requests
    last = last.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    return await world.say(await reached(world), 80, b"".join([*first, last]))


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


CANARY = Canary(name="planted", value=b"vallum-canary-7f3a9c")


def encoded(kind: str) -> bytes:
    value = b"AKIA " + CANARY.value + b" end"
    return {
        "plain": value,
        "base64": base64.b64encode(value),
        "hexadecimal": value.hex().encode(),
        "percent": quote(value, safe="").replace("-", "%2d").encode(),
        "gzip": gzip.compress(value),
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "base64", "hexadecimal", "percent", "gzip"])
def test_a_canary_in_a_body_does_not_leave(tmp_path: Path, kind: str) -> None:
    body = encoded(kind)

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80) as tap:
            reader, writer = await world.connect(await reached(world), 80)
            writer.write(request("POST", "/in/a", "mirror.test", f"Content-Length: {len(body)}"))
            for at in range(0, len(body), 10):  # across the borders of pieces
                writer.write(body[at : at + 10])
                await writer.drain()
                await asyncio.sleep(0.005)
            reply = await asyncio.wait_for(reader.readuntil(b"sent\n"), 3)
            writer.close()
            assert b"403" in reply.split(b"\r\n")[0] and b"canary planted was about to be sent" in reply
            assert CANARY.value not in reply
            events = await world.settled(3, "http.request")
            assert [(e.state, e.rule) for e in events] == [
                ("opened", "posts"),
                ("denied", "canary"),
                ("closed", "canary"),
            ]
            received = bytes(tap.received)
            for form in (
                CANARY.value,
                base64.b64encode(b"AKIA " + CANARY.value)[8:28],
                CANARY.value.hex().encode()[:20],
            ):
                assert form not in received
            assert CANARY.value.decode() not in str(world.events)

    kit = Kit(canaries=(CANARY,))
    run_in_world(tmp_path, rules(POSTS), scenario, kit=kit)


def test_a_canary_in_a_head_or_in_a_relayed_flow_does_not_leave(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, HTTP_OK) as tap, world.tap(MIRROR, 9000, b"yes") as raw:
            said = await ask(world, request(path="/pub/" + CANARY.value.decode()))
            assert b"canary planted" in said
            said = await ask(world, request("GET", "/pub/a", "mirror.test", f"Cookie: a={CANARY.value.decode()}"))
            assert b"canary planted" in said
            assert tap.received == b""
            said = await ask(world, request())
            assert said.endswith(b"hello")
            ip = await reached(world)
            assert await world.say(ip, 9000, b"\x00\x01 nothing", wait_s=0.5) == b"yes"
            assert b"yes" not in await world.say(ip, 9000, b"\x00\x01 " + CANARY.value, wait_s=0.5)
            assert bytes(raw.received) == b"\x00\x01 nothing"

    raw_rule = Rule(id="raw", host="mirror.test", ports=(9000,), protocols=("unknown",))
    run_in_world(tmp_path, rules(GETS, raw_rule), scenario, kit=Kit(canaries=(CANARY,)))


def test_requests_over_their_budget_are_refused(tmp_path: Path) -> None:
    few = Rule(
        id="few",
        host="mirror.test",
        ports=(80,),
        methods=("GET", "POST"),
        budget=Budget(requests_per_minute=2, request_bytes=5),
    )

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, HTTP_OK) as tap:
            long = request("POST", "/a", "mirror.test", "Content-Length: 6", body=b"abcdef")
            assert b"HTTP/1.1 429" in await ask(world, long)
            chunked = request(
                "POST", "/a", "mirror.test", "Transfer-Encoding: chunked", body=b"6\r\nabcdef\r\n0\r\n\r\n"
            )
            assert b"budget" in await ask(world, chunked)
            assert b"abcdef" not in tap.received
            said = await ask(world, request(path="/a"), request(path="/b"))
            assert (said.count(b"HTTP/1.1 200"), said.count(b"HTTP/1.1 429")) == (1, 1)
            assert b"GET /b" not in tap.received

    run_in_world(tmp_path, rules(few), scenario)


async def open_websocket(world: World, path: str = "/ws", *lines: str):
    reader, writer = await world.connect(await reached(world), 80)
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    asked = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        *lines,
    )
    writer.write(request("GET", path, "mirror.test", *asked))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
    return reader, writer, head


def masked(payload: bytes, *, first: int = 0x81) -> bytes:
    return bytes((first, 0x80 | len(payload))) + b"abcd" + bytes(b ^ b"abcd"[i % 4] for i, b in enumerate(payload))


SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


class WebSocketTap(world_module.Tap):
    """Agrees to a WebSocket and answers each piece with a frame."""

    async def handle(self, reader, writer) -> None:
        self.connections += 1
        self.writers.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        self.received += head
        writer.write(SWITCHED)
        try:
            while data := await reader.read(65536):
                self.received += data
                writer.write(b"\x81\x02ok")
        except ConnectionError:
            pass
        writer.close()


def unmask_all(data: bytes) -> bytes:
    """The payloads of short masked frames."""
    out = b""
    while data:
        length = data[1] & 0x7F
        mask, payload = data[2:6], data[6 : 6 + length]
        out += bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        data = data[6 + length :]
    return out


def test_a_websocket_where_granted_and_only_frames_without_canaries(tmp_path: Path) -> None:
    sockets = Rule(id="sockets", host="mirror.test", ports=(80,), websocket=True)

    async def scenario(world: World) -> None:
        async with WebSocketTap(world, MIRROR, 80) as tap:
            reader, writer, head = await open_websocket(world, "/ws", "Sec-WebSocket-Extensions: permessage-deflate")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"permessage-deflate" not in tap.received
            for _ in range(2):
                writer.write(masked(b"hello"))
                assert await asyncio.wait_for(reader.readexactly(4), 3) == b"\x81\x02ok"
            tap.received.clear()
            # A message in two frames that has the canary only when it is put together.
            writer.write(masked(b"xx" + CANARY.value[:12], first=0x01) + masked(CANARY.value[12:], first=0x80))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(5), 3)
            writer.close()
            assert CANARY.value[:8] not in unmask_all(bytes(tap.received))
            events = await world.settled(3, "http.request")
            assert [(e.state, e.rule) for e in events] == [
                *(("opened", "sockets"), ("denied", "canary"), ("closed", "canary")),
            ]
            closed = events[-1]
            assert (closed.upgrade, closed.status, closed.messages_out, closed.messages_in) == ("websocket", 101, 2, 2)

    run_in_world(tmp_path, rules(sockets), scenario, kit=Kit(canaries=(CANARY,)))


@pytest.mark.parametrize(
    "bad",
    [
        b"\x81\x05hello",
        b"\xc1\x85abcd" + bytes(5),
        b"\x83\x80abcd",
        b"\x80\x80abcd",
        b"\x81\xfe\x00\x05abcd" + bytes(5),
    ],
    ids=["unmasked", "reserved bit", "opcode 3", "continuation of nothing", "long length"],
)
def test_what_is_no_frame_ends_a_websocket_and_nothing_after_it_is_sent(tmp_path: Path, bad: bytes) -> None:
    sockets = Rule(id="sockets", host="mirror.test", ports=(80,), websocket=True)

    async def scenario(world: World) -> None:
        async with WebSocketTap(world, MIRROR, 80) as tap:
            reader, writer, _ = await open_websocket(world)
            tap.received.clear()
            writer.write(bad + masked(b"after"))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            writer.close()
            assert bytes(tap.received) == b""

    run_in_world(tmp_path, rules(sockets), scenario)


def test_a_websocket_without_a_grant_is_refused(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with WebSocketTap(world, MIRROR, 80) as tap:
            _, writer, head = await open_websocket(world, "/pub/ws")
            writer.close()
            assert head.startswith(b"HTTP/1.1 403")
            assert (tap.connections, tap.received) == (0, b"")

    run_in_world(tmp_path, rules(GETS), scenario)


ANSWERS = {
    "no HTTP": (b"SSH-2.0-x\r\n\r\n", 502),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 502),
    "an endless head": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, 502),
    "many interim answers": (b"HTTP/1.1 102 Processing\r\n\r\n" * 100, 502),
    "a switch nobody asked for": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        502,
    ),
    "an answer behind the answer": (HTTP_OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", 200),
    "length beside chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        200,
    ),
    "an early hint first": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HTTP_OK, 200),
    "headers of the connection": (
        b"HTTP/1.1 200 OK\r\nConnection: X-Evil\r\nX-Evil: 1\r\nProxy-Authenticate: y\r\nContent-Length: 5\r\n\r\nhello",
        200,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_a_server_that_lies(tmp_path: Path, name: str) -> None:
    answer, status = ANSWERS[name]

    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 80, answer):
            said = await ask(world, request())
            assert said.split()[1] == str(status).encode(), said[:200]
            assert b"evil" not in said.lower()
            if status == 200:
                assert said.count(b"hello") == 1
            else:
                assert b"vallum: blocked by rule upstream" in said
            await world.settled(2, "http.request")

    run_in_world(tmp_path, rules(GETS), scenario)


def test_an_answer_that_is_cut_off_is_cut_off_for_the_guest(tmp_path: Path) -> None:
    class Short(world_module.Tap):
        async def handle(self, reader, writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello")
            writer.close()

    async def scenario(world: World) -> None:
        async with Short(world, MIRROR, 80):
            said = await ask(world, request())
            assert said.endswith(b"RST")
            closed = (await world.settled(2, "http.request"))[-1]
            assert closed.state == "closed" and "it ended with" in closed.reason and closed.bytes_in == 5

    run_in_world(tmp_path, rules(GETS), scenario)


def test_a_held_request_waits_for_a_person_on_its_connection(tmp_path: Path) -> None:
    asked: list[str] = []
    verdicts = ["allow", "deny"]

    async def decide(frame):
        asked.append(frame.subject)
        await asyncio.sleep(0.2)
        return Decision(verdict=verdicts.pop(0), rule=frame.rule, reason="decided by root: why not")

    held = Rule(id="ask-me", host="mirror.test", ports=(80,), methods=("DELETE",))

    async def scenario(world: World) -> None:
        world.hold = decide
        async with world.tap(MIRROR, 80, HTTP_OK) as tap:
            said = await ask(world, request("DELETE", "/a"), request("DELETE", "/b"), request())
            assert (said.count(b"HTTP/1.1 200"), said.count(b"HTTP/1.1 403")) == (2, 1)
            assert b"decided by root" in said
            assert asked == ["DELETE http://mirror.test/a", "DELETE http://mirror.test/b"]
            assert b"DELETE /b" not in tap.received and b"DELETE /a" in tap.received

    run_in_world(tmp_path, rules(GETS, hold=(held,)), scenario)


def test_a_request_that_the_rules_no_longer_grant_is_cut(tmp_path: Path) -> None:
    class Slow(world_module.Tap):
        async def handle(self, reader, writer) -> None:
            self.writers.append(writer)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello")
            await reader.read()

    async def scenario(world: World) -> None:
        async with Slow(world, MIRROR, 80):
            reader, writer = await world.connect(await reached(world), 80)
            writer.write(request())
            await asyncio.wait_for(reader.readuntil(b"hello"), 3)
            await world.link.update_rules("c1", rules(POSTS))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 3)
            writer.close()
            events = await world.settled(3, "http.request")
            assert [e.state for e in events] == ["opened", "denied", "closed"]

    run_in_world(tmp_path, rules(GETS), scenario)
