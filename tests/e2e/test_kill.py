"""kill -9 of client, node and gateway at random moments: no guest survives, nothing acknowledged is lost, the next start is clean."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vallum
from vallum.core.events import ToolResult
from vallum.record.reader import list_ids, read_records
from vallum.record.verify import verify

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.timeout(400)]

ROUNDS = 50

CLIENT = r"""
import asyncio, sys, vallum

async def work(sandbox, marker):
    await sandbox.exec(["sh", "-c", f"setsid sleep 4{marker} >/dev/null 2>&1 & setsid setsid sleep 4{marker} &"])
    while True:
        result = await sandbox.exec(["sh", "-c", "echo x; sleep 0.01"])
        print("ack", sandbox.run, sandbox.episode, result.step, flush=True)

async def main(home, marker):
    async with vallum.Node(home=home) as node:
        print("node", node.pid, flush=True)
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(work(await node.sandbox(), marker))

try:
    asyncio.run(main(*sys.argv[1:]))
except* vallum.VallumError as group:
    print("error", type(group.exceptions[0]).__name__, flush=True)
"""


def guests(marker):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if f"sleep\x004{marker}".encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                    found.append(int(entry))
            except OSError:
                continue
    return found


def gateway_of(node_pid):
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                cmdline = Path(f"/proc/{entry}/cmdline").read_bytes()
                if b"vallum.gateway" in cmdline and f"PPid:\t{node_pid}\n" in Path(f"/proc/{entry}/status").read_text():
                    return int(entry)
            except OSError:
                continue
    return None


def mounts_and_cgroups(home):
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line]
    return mounts, sorted(p.name for p in (home / "cells").iterdir()) if (home / "cells").exists() else []


async def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.02)
    return found


async def test_fifty_kills_at_random_moments(tmp_path):
    seed = int(os.environ.get("VALLUM_KILL_SEED", "20261121"))
    dice = random.Random(seed)
    acknowledged: list[tuple[str, str, int]] = []
    survivors = []
    for number in range(ROUNDS):
        victim = ("client", "node", "gateway")[number % 3]
        marker = f"{os.getpid()}{number:03d}"
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(tmp_path), marker], stdout=subprocess.PIPE, text=True
        )
        word = client.stdout.readline().split()
        assert word[0] == "node", f"round {number} (seed {seed}): the node did not start: {word}"
        node = int(word[1])
        await asyncio.sleep(dice.uniform(0.0, 0.5))
        target = {"client": client.pid, "node": node, "gateway": gateway_of(node)}[victim]
        if target is not None:
            os.kill(target, signal.SIGKILL)
        if victim == "gateway":
            # Its cells are ended by the node; a client that was not told would hang.
            await until(lambda m=marker: not guests(m), 5)
            client.kill()
        elif victim == "client":
            client.wait(timeout=10)
        else:
            client.wait(timeout=10)
        if not await until(lambda m=marker: not guests(m), 5):
            survivors.append((number, victim, guests(marker)))
        client.wait(timeout=10)
        for line in client.stdout.read().splitlines():
            if line.startswith("ack "):
                _, run, episode, step = line.split()
                acknowledged.append((run, episode, int(step)))
        client.stdout.close()
    assert not survivors, f"seed {seed}: guests outlived {survivors}"

    # The next start is clean.
    async with vallum.Node(home=tmp_path) as node, node.sandbox() as sandbox:
        assert (await sandbox.exec(["true"])).exit_code == 0
        mounts, cells = mounts_and_cgroups(tmp_path)
        assert cells == [sandbox.id], "the layers of dead cells were removed"
    # The node's name goes first, then what is left of its cells.
    await until(lambda: not (tmp_path / "run/node.sock").exists() and not mounts_and_cgroups(tmp_path)[1], 10)
    mounts, cells = mounts_and_cgroups(tmp_path)
    assert mounts == []
    assert cells == []

    # Nothing that was acknowledged is lost, and every chain holds.
    recorded = set()
    for run in list_ids(tmp_path / "runs"):
        verify(tmp_path / "runs" / run)
        for record in read_records(tmp_path / "runs" / run):
            if isinstance(record.event, ToolResult):
                scope = record.event.scope
                recorded.add((scope.run, scope.episode, scope.step))
    assert len(acknowledged) > ROUNDS, "the clients did work between the kills"
    assert set(acknowledged) <= recorded
