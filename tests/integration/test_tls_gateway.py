"""TLS at the gateway process: what is not the granted name, not TLS or too late reaches nobody. Every denial has its twin."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vallum.gateway.kit import Kit
from vallum.node.authority import make_authority
from vallum.rules.grants import Rule, Ruleset
from vallum.testing.certificates import PrivateAuthority

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("tls_world_priv", Path(__file__).with_name("gateway_world_priv.py"))
assert _spec is not None and _spec.loader is not None
world_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world_module
_spec.loader.exec_module(world_module)
run_in_world, World = world_module.run_in_world, world_module.World

MIRROR = "192.0.2.20"
UPSTREAM = PrivateAuthority()
AUTHORITY = make_authority("r1")
KIT = Kit(authority=AUTHORITY, upstream_roots=UPSTREAM.certificate_pem)
READ = Ruleset(allow=(Rule(id="read", host="mirror.test", ports=(443,), methods=("GET",)),))
RELAY = Ruleset(allow=(Rule(id="relay", host="mirror.test", ports=(443,)),))
ODD = Ruleset(allow=(Rule(id="odd", host="mirror.test", ports=(8443,)),))
REQUEST = b"GET /x HTTP/1.1\r\nHost: mirror.test\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@contextlib.asynccontextmanager
async def mirror(world: World, port: int = 443, name: str = "mirror.test") -> AsyncIterator[list[bytes]]:
    """A TLS server; what was said to it inside TLS, one item a connection that said something."""
    heard: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if said := await reader.read(65536):
                heard.append(said)
                writer.write(ANSWER)
                await writer.drain()
        writer.close()

    sock = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (MIRROR, port)))
    async with await asyncio.start_server(handle, sock=sock, ssl=UPSTREAM.serve(name)):
        yield heard


def guest(roots: bytes, **fields: object) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=roots.decode())
    for name, value in fields.items():
        setattr(context, name, value)
    return context


def hello(name: str | None, extra: bytes = b"") -> bytes:
    """A ClientHello, with one more extension."""
    context = guest(AUTHORITY.certificate_pem, check_hostname=False)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    data = bytearray(outgoing.read())
    at = 9 + 2 + 32
    at += 1 + data[at]
    at += 2 + int.from_bytes(data[at : at + 2], "big")
    at += 1 + data[at]
    for start, size in ((3, 2), (6, 3), (at, 2)):
        grown = int.from_bytes(data[start : start + size], "big") + len(extra)
        data[start : start + size] = grown.to_bytes(size, "big")
    return bytes(data) + extra


async def fetch(world: World, context: ssl.SSLContext, port: int = 443, wait_s: float = 0.0) -> bytes:
    ip = (await world.ask("mirror.test")).answer[0][0].address
    reader, writer = await world.connect(ip, port)
    await asyncio.sleep(wait_s)
    try:
        await asyncio.wait_for(writer.start_tls(context, server_hostname="mirror.test"), 5)
        writer.write(REQUEST)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(("rules", "roots"), [(READ, AUTHORITY.certificate_pem), (RELAY, UPSTREAM.certificate_pem)])
def test_the_granted_name_is_served(tmp_path: Path, rules: Ruleset, roots: bytes) -> None:
    async def scenario(world: World) -> None:
        async with mirror(world) as heard:
            assert (await fetch(world, guest(roots))).endswith(b"hello")
            assert len(heard) == 1
            opened, closed = await world.settled(2)
            assert (opened.rule, opened.inspected) == (rules.allow[0].id, rules is READ)
            assert closed.bytes_in > 0

    run_in_world(tmp_path, rules, scenario, kit=KIT)


ECH = b"\xfe\x0d\x00\x28" + b"\0" * 40
BAD_BEGINNINGS = {
    "no-name": (hello(None), "sni-mismatch"),
    "another-name": (hello("other.test"), "sni-mismatch"),
    "ech": (hello("mirror.test", ECH), "encrypted-sni"),
    "not-tls": (REQUEST, "protocol-mismatch"),
    "two-hellos": (hello("mirror.test")[:-1], "malformed"),
    "garbage-in-tls": (b"\x16\x03\x01\x00\x05hello", "malformed"),
}


@pytest.mark.parametrize("rules", [READ, RELAY], ids=["read", "relay"])
@pytest.mark.parametrize(("said", "rule"), BAD_BEGINNINGS.values(), ids=BAD_BEGINNINGS)
def test_what_is_not_the_granted_name_reaches_nobody(tmp_path: Path, rules: Ruleset, said: bytes, rule: str) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(MIRROR, 443) as tap:
            ip = (await world.ask("mirror.test")).answer[0][0].address
            reader, writer = await world.connect(ip, 443)
            writer.write(said)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            writer.transport.abort()
            (denied,) = await world.settled(1)
            assert (denied.state, denied.rule, denied.bytes_out) == ("denied", rule, 0)
            assert denied.scope.step == 3
            assert (tap.connections, tap.received) == (0, b"")

    run_in_world(tmp_path, rules, scenario, kit=KIT)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
def test_what_ends_the_handshake_reaches_nobody(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        old = guest(
            AUTHORITY.certificate_pem, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1
        )
        old.set_ciphers("ALL:@SECLEVEL=0")
        async with world.tap(MIRROR, 443) as tap:
            for context in (old, guest(UPSTREAM.certificate_pem)):
                with pytest.raises(OSError, match=r"(?i)ssl|reset|verify"):
                    await fetch(world, context)
            ip = (await world.ask("mirror.test")).answer[0][0].address
            got = await world.say(
                ip, 443, hello("mirror.test") + b"\x17\x03\x03\x00\x20" + b"POST /stolen HTTP/1.1" * 3
            )
            assert got.endswith(b"RST")
            denied = [event for event in await world.settled(9) if event.state == "denied"]
            assert [event.rule for event in denied] == ["tls-handshake"] * 3
            assert (tap.connections, tap.received) == (0, b"")

    run_in_world(tmp_path, READ, scenario, kit=KIT)


def test_tls_that_comes_late_is_not_relayed_to_an_unknown_server(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        context = guest(UPSTREAM.certificate_pem)
        async with mirror(world, 8443) as heard:
            # So late that the server was connected to in case it speaks first: its certificate was not seen yet.
            with pytest.raises(OSError, match=r"reset|Connection"):
                await fetch(world, context, 8443, wait_s=0.4)
            denied = [event for event in await world.settled(3) if event.state == "denied"]
            assert [(event.rule, event.bytes_out) for event in denied] == [("upstream-certificate", 0)]
            assert heard == []
            assert (await fetch(world, context, 8443)).endswith(b"hello")
            assert (await fetch(world, context, 8443, wait_s=0.4)).endswith(b"hello")
            assert heard == [REQUEST, REQUEST]

    run_in_world(tmp_path, ODD, scenario, kit=KIT)


def test_a_wrong_server_is_refused_and_switching_verification_off_is_heard(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with mirror(world, name="other.test") as heard:
            context = guest(UPSTREAM.certificate_pem, check_hostname=False)
            if kit.verify_upstream:
                with pytest.raises(OSError, match=r"reset|Connection"):
                    await fetch(world, context)
                denied = [event for event in await world.settled(3) if event.state == "denied"]
                assert denied[0].rule == "certificate-mismatch"
                assert heard == []
            else:
                assert (await fetch(world, context)).endswith(b"hello")

    for verify in (True, False):
        kit = Kit(upstream_roots=UPSTREAM.certificate_pem, verify_upstream=verify)
        directory = tmp_path / str(verify)
        directory.mkdir()
        run_in_world(directory, RELAY, scenario, kit=kit)


def test_what_vetting_costs(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        context = guest(UPSTREAM.certificate_pem)
        async with mirror(world):
            took = []
            for _ in range(8):
                started = time.monotonic()
                assert (await fetch(world, context)).endswith(b"hello")
                took.append(time.monotonic() - started)
            print(f"first {took[0] * 1e3:.1f} ms, then {sorted(took[1:])[3] * 1e3:.1f} ms")
            # The first one pays for reading the roots and a handshake; the others must not.
            assert min(took[1:]) < took[0]

    run_in_world(tmp_path, RELAY, scenario, kit=KIT)
