"""Budgets, holds and hostile load on the gateway. Every denial has an allowed twin; nothing but namespaces is contacted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import resource
import socket
import statistics
import struct
import sys
import time
from pathlib import Path

import pytest

from vallum.core.verdict import Decision
from vallum.rules.grants import Budget, Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("gateway_world_priv", Path(__file__).with_name("gateway_world_priv.py"))
assert _spec is not None and _spec.loader is not None
world_module = sys.modules.get(_spec.name) or importlib.util.module_from_spec(_spec)
if _spec.name not in sys.modules:
    sys.modules[_spec.name] = world_module
    _spec.loader.exec_module(world_module)
run_in_world, World, in_namespace = world_module.run_in_world, world_module.World, world_module.in_namespace

SERVER = "192.0.2.20"
HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET / HTTP/1.1\r\nHost: 192.0.2.20\r\n\r\n"


def grant(budget: Budget | None = None, *, port: int = 80, protocols: tuple[str, ...] = ("http", "unknown")) -> Rule:
    return Rule(id="server", cidr=f"{SERVER}/32", ports=(port,), protocols=protocols, budget=budget)


def states(events: list) -> list[tuple[str, str]]:
    return [(event.state, event.rule) for event in events]


# -- budgets ---------------------------------------------------------------------------------------------


def test_bytes_over_a_budget_never_leave(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(SERVER, 80) as tap:
            _, writer = await world.connect(SERVER, 80)
            writer.write(b"\xffwithin " + b"a" * 600)
            await asyncio.sleep(0.2)
            assert len(tap.received) == 608
            writer.write(b"b" * 600)
            events = await world.settled(3)
            assert states(events) == [("opened", "server"), ("denied", "budget"), ("closed", "budget")]
            assert (events[-1].bytes_out, events[1].scope.step) == (608, 3)
            assert b"b" not in tap.received
            # What is used up stays used up for the next connection.
            await world.say(SERVER, 80, b"\xff" + b"c" * 600)
            assert b"c" not in tap.received
            writer.close()

    run_in_world(tmp_path, Ruleset(allow=(grant(Budget(bytes_out=1000)),)), scenario)


def test_connections_at_once_and_a_minute_are_counted(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(SERVER, 80, HTTP_OK) as tap:
            held = []
            for _ in range(2):
                reader, writer = await world.connect(SERVER, 80)
                writer.write(GET)
                assert await asyncio.wait_for(reader.readexactly(len(HTTP_OK)), 3) == HTTP_OK
                held.append(writer)
            refused = await world.say(SERVER, 80, GET)
            assert b"403 Forbidden" in refused
            assert b"connections at once" in refused
            held.pop().close()
            await world.settled(4)  # opened, opened, denied, closed
            assert (await world.say(SERVER, 80, GET, wait_s=0.5)) == HTTP_OK
            await world.settled(6)
            assert b"4 connections a minute" not in await world.say(SERVER, 80, GET, wait_s=0.5)
            await world.settled(8)
            assert b"4 connections a minute" in await world.say(SERVER, 80, GET)
            assert tap.connections == 4
            held.pop().close()

    run_in_world(tmp_path, Ruleset(allow=(grant(Budget(connections=2, connections_per_minute=4)),)), scenario)


# -- holds -----------------------------------------------------------------------------------------------


def test_a_held_flow_waits_for_a_person(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(SERVER, 80, HTTP_OK) as tap:

            async def allow(frame) -> Decision:
                await asyncio.sleep(0.3)
                assert (tap.connections, tap.received) == (0, b""), "nothing leaves before the decision"
                return Decision(verdict="allow", rule=frame.rule, reason="a person said yes")

            world.decide = allow
            assert await world.say(SERVER, 80, GET, wait_s=1) == HTTP_OK
            opened = (await world.settled(1))[0]
            assert (opened.state, opened.verdict, opened.rule, opened.reason) == (
                *("opened", "allow", "server", "a person said yes"),
            )

            async def deny(frame) -> Decision:
                return Decision(verdict="deny", rule=frame.rule, reason="a person said no")

            world.decide = deny
            assert b"a person said no" in await world.say(SERVER, 80, GET)
            assert tap.connections == 1

    run_in_world(tmp_path, Ruleset(hold=(grant(),)), scenario)


def test_a_guest_that_leaves_ends_the_hold(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.tap(SERVER, 80, HTTP_OK) as tap:
            world.decide = lambda frame: asyncio.sleep(30)
            _, writer = await world.connect(SERVER, 80)
            writer.write(GET)
            while not world.holds:
                await asyncio.sleep(0.01)
            writer.close()
            (denied,) = await world.settled(1)
            assert (denied.state, denied.rule) == ("denied", "server")
            assert "left before it was decided" in denied.reason
            for _ in range(100):
                if world.given_up:
                    break
                await asyncio.sleep(0.01)
            assert world.given_up == world.holds
            assert (tap.connections, tap.received) == (0, b"")

    run_in_world(tmp_path, Ruleset(hold=(grant(),)), scenario)


# -- hostile load ----------------------------------------------------------------------------------------


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


async def refusal_s(pid: int) -> float:
    """How long a refused connection of the namespace of ``pid`` takes."""
    sock = in_namespace(pid, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    loop = asyncio.get_running_loop()
    with sock:
        sock.setblocking(False)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            await loop.sock_connect(sock, ("203.0.113.10", 81))
            await loop.sock_sendall(sock, b"x\r\n\r\n")
            await asyncio.wait_for(loop.sock_recv(sock, 1), 10)
        return time.monotonic() - began


def dial_many(count: int) -> list[socket.socket]:
    socks = []
    for _ in range(count):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.connect_ex((SERVER, 80))
        socks.append(sock)
    return socks


async def second_cell(world: World) -> int:
    pid = world.hold_namespace()
    world.lay_cell(pid)
    tcp, udp = world.doors(pid)
    await world.link.add_cell("c2", run="r1", episode="e1", rules=Ruleset(), tcp=tcp, dns=udp)
    return pid


def test_ten_thousand_silent_connections_cost_little_and_hold_up_no_other_cell(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        pytest.skip("needs 12,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (12_000 if soft < 12_000 else soft, hard))

    async def scenario(world: World) -> None:
        other = await second_cell(world)
        alone = statistics.median([await refusal_s(other) for _ in range(10)])
        before = memory(world.link.pid)
        socks = await asyncio.to_thread(in_namespace, world.cell, lambda: dial_many(10_000))
        try:
            crowded = [await refusal_s(other) for _ in range(30)]
            grown = memory(world.link.pid) - before
        finally:
            for sock in socks:
                sock.close()
        assert statistics.median(crowded) < max(0.1, 20 * alone)
        assert grown < 64 * 1024 * 1024, f"the gateway grew by {grown / 1e6:.0f} MB"
        assert world.link.is_alive

    try:
        run_in_world(tmp_path, Ruleset(allow=(grant(),)), scenario)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_that_does_not_read_costs_no_memory_and_its_bytes_are_not_called_sent(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        listener = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (SERVER, 80)))
        with listener:
            before = memory(world.link.pid)
            reader, writer = await world.connect(SERVER, 80)
            writer.write(b"\xff" + b"a" * 100_000_000)
            await asyncio.sleep(1)
            assert memory(world.link.pid) - before < 16 * 1024 * 1024
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
            *_, closed = await world.settled(2)
            assert closed.state == "closed"
            # Both sides' buffers in the kernel took some of it, and nobody took the rest.
            assert 0 < closed.bytes_out < 50_000_000
            del reader

    run_in_world(tmp_path, Ruleset(allow=(grant(),)), scenario)


def test_half_closed_ways_carry_on_and_a_server_that_refuses_is_told_in_the_record(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async def answer_at_the_end(reader, writer) -> None:
            got = await reader.read()
            writer.write(b"%d bytes" % len(got))
            writer.close()

        sock = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (SERVER, 80)))
        server = await asyncio.start_server(answer_at_the_end, sock=sock)
        reader, writer = await world.connect(SERVER, 80)
        writer.write(b"\xffhello")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 3) == b"6 bytes"
        writer.close()
        opened, closed = await world.settled(2)
        assert (opened.flow, closed.bytes_out, closed.bytes_in) == (closed.flow, 6, 7)
        server.close()
        await server.wait_closed()
        await world.say(SERVER, 80, b"\xffhello")
        *_, gone = await world.settled(4)
        assert (gone.state, gone.bytes_out) == ("closed", 0)
        assert "Connection refused" in gone.reason

    run_in_world(tmp_path, Ruleset(allow=(grant(),)), scenario)
