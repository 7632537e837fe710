"""A guest that wants to keep the node, its client or another cell waiting."""

import asyncio
import contextlib
import os
import statistics
import time

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

NOWHERE = "203.0.113.9"  # documentation address: a door of the cell answers, nothing is contacted


async def slowest_exec(sandbox, seconds):
    """How long `true` takes in a cell that does nothing wrong."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        await sandbox.exec(["true"])
        times.append(time.monotonic() - began)
    return max(times), statistics.median(times)


STOP_ALL = """
import os, signal
for _ in range(2): os.fork()
while True:
    try: os.kill(-1, signal.SIGSTOP)
    except OSError: pass
"""


async def test_helpers_that_are_stopped_keep_nobody_waiting(node, code):
    """SIGSTOP reaches our helper between its start and its end, as both are of the guest's user."""
    async with node.sandbox() as sb, node.sandbox() as other:
        await sb.exec(["sh", "-c", f"(setsid python3 -c '{STOP_ALL}' >/dev/null 2>&1 &)"])
        for _ in range(4):
            for attempt in (
                sb.write_file("/tmp/x", b"a" * 4_000_000),
                sb.read_file("/tmp/x"),
                sb.exec(["true"], timeout_s=1),
            ):
                began = time.monotonic()
                with contextlib.suppress(
                    vallum.SandboxError
                ):  # it may fail; it must not hang, nor be the node's failure
                    await asyncio.wait_for(attempt, 10)
                assert time.monotonic() - began < 5
        assert (await other.exec(["true"])).exit_code == 0
    assert (await node.status()).cells == 0


CONNECT_ALL = """
import os, socket, time
os.fork()
for i in range(500): os.dup(0)
socks = []
for i in range(250):
    s = socket.socket(); s.setblocking(False); s.connect_ex(("%s", 443)); socks.append(s)
time.sleep(8)
"""


async def test_many_connections_at_once_hold_up_no_other_cell(node, code):
    async with node.sandbox() as sb, node.sandbox() as other:
        await other.exec(["true"])
        flood = sb.start(code(CONNECT_ALL % NOWHERE), timeout_s=12)
        worst, median = await slowest_exec(other, 5)
        flood.signal(9)
        await flood.wait()
        assert worst < 2, "one look through the guest's processes for each of its connections took the node 6 s"
        assert median < 0.5
        events = await node.events(run=sb.run, episode=sb.episode)
    flows = [event for event in events if event["kind"] == "net.flow"]
    assert len(flows) == 500
    assert {flow["scope"]["step"] for flow in flows} == {0}, "the step is known however many there are"


DRIP = """
import socket, time
hello = b"\\x01\\x00\\x20\\x00\\x03\\x03" + b"A" * 2000
records = b"".join(b"\\x16\\x03\\x01\\x00\\x01" + bytes([c]) for c in hello)
socks = []
for i in range(200):
    s = socket.create_connection(("%s", 443)); s.setsockopt(6, 1, 1); s.setblocking(False); socks.append(s)
end = time.time() + 6
at = 0
while time.time() < end:
    for s in socks:
        try: s.send(records[at : at + 1])
        except OSError: pass
    at += 1
    time.sleep(0.001)
"""

DENIED = f"""
import socket, time
began = time.time()
s = socket.create_connection(("{NOWHERE}", 81))
try: s.recv(1)
except OSError: pass
print(time.time() - began)
"""


async def test_beginnings_that_drip_hold_up_no_other_cell(node, code):
    async with node.sandbox(allow=[f"{NOWHERE}/32:443"]) as sb, node.sandbox() as other:
        drip = sb.start(code(DRIP % NOWHERE), timeout_s=15)
        await asyncio.sleep(1.5)
        times = [float((await other.exec(code(DENIED))).stdout) for _ in range(15)]
        drip.signal(9)
        await drip.wait()
        assert statistics.median(times) < 0.25


FLOOD_UDP = """
import os, random, socket
for _ in range(2): os.fork()
s = socket.socket(2, 2)
while True:
    try: s.sendto(b"x", ("203.0.113.%d" % random.randrange(250), random.randrange(1000, 60000)))
    except OSError: pass
"""


async def test_a_cell_that_ends_in_a_flood_of_packets_ends(node, code):
    async with node.sandbox() as other:
        for _ in range(3):
            sb = await node.sandbox()
            flood = sb.start(code(FLOOD_UDP))
            await slowest_exec(other, 1)
            await sb.close()
            with pytest.raises(vallum.VallumError):
                await flood.wait()
            kinds = [event["kind"] for event in await node.events(run=sb.run, episode=sb.episode)]
            assert "net.packet" in kinds
            assert "episode.ended" in kinds
    assert (await node.status()).cells == 0


async def test_words_without_end_end_no_run(node):
    """A record that the ledger cannot take ended every cell of the run."""
    async with node.sandbox(run="long") as sb, node.sandbox(run="long") as other:
        for attempt in (
            sb.exec(["\x01" * 12_000_000]),
            sb.exec(["true"], cwd="/" + "\x01" * 12_000_000),
            sb.exec(["true"], user="\x01" * 12_000_000),
            sb.exec(["true", *["\x01"] * 300_000]),
            sb.exec(["true"], tool_call="x" * 70_000_000),
            sb.write_file("/tmp/" + "\x01" * 12_000_000, b""),
        ):
            began = time.monotonic()
            with pytest.raises(vallum.VallumError) as caught:
                await attempt
            assert time.monotonic() - began < 4
            assert len(str(caught.value)) < 2000
        async with sb.session() as shell:
            with pytest.raises(vallum.VallumError):
                await shell.run(": " + "\x01" * 10_000_000, timeout_s=0.5)
        assert (await sb.exec(["true"])).exit_code == 0
        assert (await other.exec(["true"])).exit_code == 0
        calls = [e for e in await node.events(run="long") if e["kind"] == "tool.call"]
    assert max(len(call["arguments"]) for call in calls) < 2_000_000
    assert any("sha256" in call["arguments"] for call in calls)


async def test_shells_that_end_leave_no_descriptors(node):
    def count():
        return len(os.listdir(f"/proc/{node.pid}/fd"))

    async with node.sandbox() as sb:
        before = count()
        for _ in range(12):
            shell = await sb.session()
            with contextlib.suppress(vallum.VallumError):
                await shell.run("exit 0")
        for _ in range(4):
            await sb.session()
    for _ in range(100):
        if count() <= before:
            break
        await asyncio.sleep(0.1)
    assert count() <= before + 8
