"""What the model door adds to a call: from inside a cell, next to the same call without any door.

The provider is a local fake, so that what is measured is the way there and back. The client is the same program, in
the cell and outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import msgspec

from vallum.arena.figures import OURS, Figure, summarise
from vallum.client.model import Model
from vallum.client.node import Node
from vallum.client.places import Places
from vallum.client.sandbox import Sandbox
from vallum.core.errors import NodeError
from vallum.testing.fakes.models import FakeModels, Said

DIRECT = "direct, no door"
WHOLE, STREAMED = "model call with a tool call, whole", "model call with a tool call, streamed to its end"
OWN = "of that, the door itself, as it records it"
STREAMS = 100
IDLE, MEMORY = "gateway memory, idle", f"gateway memory, {STREAMS} parallel streams"
_SAID = Said(text="I look at the files. " * 20, calls=(("call_1", "bash", {"command": "ls -l"}),), pieces=20)
_LONG = Said(text="word " * 20_000, pieces=400, pause_s=0.005)

CLIENT = r"""
import http.client, json, os, sys, threading, time, urllib.parse
base, mode, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
url = urllib.parse.urlsplit(base)
key = os.environ.get("OPENAI_API_KEY", "none")
tools = [{"type": "function", "function": {"name": "bash", "description": "x" * 2000, "parameters": {"type": "object"}}}]

def ask(conn, words, stream, talk=()):
    body = {"model": "m", "stream": stream, "tools": tools,
            "messages": [{"role": "system", "content": "s" * 6000}, *talk, {"role": "user", "content": words}]}
    started = time.perf_counter()
    conn.request("POST", url.path + "/chat/completions", json.dumps(body),
                 {"authorization": "Bearer " + key, "content-type": "application/json"})
    answer = conn.getresponse()
    data = answer.read()
    assert answer.status == 200, data
    return (time.perf_counter() - started) * 1e3

def connect():
    return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=120)

if mode == "streams":
    threads = [threading.Thread(target=lambda n=n: ask(connect(), "long %d" % n, True)) for n in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print("[]")
else:
    conn, talk, samples = connect(), [], []
    for n in range(count + 5):
        talk = talk if n % 10 else []  # conversations of ten calls
        samples.append(ask(conn, "%s %d" % (mode, n), mode == "streamed", talk))
        talk += [{"role": "user", "content": "%s %d" % (mode, n)}, {"role": "assistant", "content": "I called it."}]
    print(json.dumps(samples[5:]))
"""


async def run(places: Places, repetitions: int) -> list[Figure]:
    """Every figure.

    Raises:
        NodeError: a client failed.
    """
    others = _gateways()
    async with FakeModels([_SAID], choose=_choose) as server, Node(places=places) as node:
        model = Model(upstream=server.url)
        async with node.sandbox(model=model) as cell:
            figures: list[Figure] = []
            for mode, what in (("whole", WHOLE), ("streamed", STREAMED)):
                direct, ours = await _outside(server.url, mode, repetitions), await _inside(cell, mode, repetitions)
                figures += [summarise(what, OURS, "ms", ours), summarise(what, DIRECT, "ms", direct)]
            events = await node.events(run=cell.run, episode=cell.episode)
            own = [
                event["overhead_ns"] / 1e6 for event in events if event["kind"] == "model.call" and event["overhead_ns"]
            ]
            figures.append(summarise(OWN, OURS, "ms", own))
            await _inside(cell, "streams", STREAMS)  # what the first time makes is no growth
            idle = peak = _resident_bytes(others)
            streams = asyncio.create_task(_inside(cell, "streams", STREAMS))
            while not streams.done():
                peak = max(peak, _resident_bytes(others))
                await asyncio.sleep(0.05)
            await streams
            figures += [summarise(what, OURS, "MiB", [size / 2**20]) for what, size in ((IDLE, idle), (MEMORY, peak))]
    return figures


def _choose(body: dict[str, object]) -> Said:
    return _LONG if '"content": "long' in json.dumps(body["messages"]) else _SAID


async def _inside(cell: Sandbox, mode: str, count: int) -> list[float]:
    command = ["python3", "-c", CLIENT, "http://model.vallum.internal/v1", mode, str(count)]
    done = await cell.exec(command, timeout_s=240)
    return _samples(done.exit_code or 0, done.stdout, done.stderr)


async def _outside(base: str, mode: str, count: int) -> list[float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, f"{base}/v1", mode, str(count),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return _samples(process.returncode or 0, out, err)


def _samples(status: int, out: bytes, err: bytes) -> list[float]:
    if status != 0:
        raise NodeError(f"the bench's client failed: {err.decode('utf-8', 'replace')[-400:]}")
    return msgspec.json.decode(out, type=list[float])


def _gateways() -> set[Path]:
    """The gateway processes that run now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if b"vallum.gateway" in (path / "cmdline").read_bytes().split(b"\0"):
                found.add(path)
    return found


def _resident_bytes(others: set[Path]) -> int:
    """Resident memory of the gateway processes that are not ``others``."""
    total = 0
    for path in _gateways() - others:
        with contextlib.suppress(OSError):
            lines = (path / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return total
