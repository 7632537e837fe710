"""How long a cell takes, next to its peers: the same command, one after the other, in one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from vallum.arena.bench_workloads import measure_workloads
from vallum.arena.figures import OURS, Figure, summarise
from vallum.arena.sandbox_peers import MANY, PEERS, Names, open_peer
from vallum.client.face import Node, Sandbox
from vallum.client.places import Places

PLAIN = "subprocess.run (no walls)"
CREATE, EXEC, SESSION, DESTROY = "create and first true", "true in a running one", "session.run of true", "destroy"
SUSTAINED = "create and first true, without a pause between"
AT_ONCE, MEMORY = f"{MANY} at once, time for each", "memory of an idle one (MemAvailable: the kernel's own included)"
PROCESSES = "memory of an idle one (PSS of its processes)"
TWENTY, LIVE = "20 at once, until the last is ready", "one of many live ones: create and first true"
IDLE_S = 0.05
"""Between one life and the next, as a caller has who does something with a cell: long enough for a spare to be built."""
LIVE_CELLS = 300


async def run(places: Places, repetitions: int) -> list[Figure]:
    """Every figure of cells and of peers.

    Raises:
        VallumError: a cell could not be had.
    """
    async with Node(places=places) as node:
        figures = await _measure_cells(node, repetitions)
        plain = [_time_plain() for _ in range(repetitions * 5)]
        figures += [summarise(what, PLAIN, "ms", plain) for what in (CREATE, EXEC)]
        figures += await _measure_many(node)
        figures += await _measure_live(node, min(LIVE_CELLS, repetitions * 10))
        figures += await measure_workloads(node, max(1, repetitions // 5))
    for peer in PEERS:
        async with open_peer(peer) as opened:
            figures += await opened.measure(
                repetitions, Names(create=CREATE, execute=EXEC, destroy=DESTROY, at_once=AT_ONCE)
            )
    return figures


def _time_plain() -> float:
    started = time.perf_counter()
    subprocess.run(["true"], check=True)
    return (time.perf_counter() - started) * 1000


async def _time_each(repetitions: int, action: Callable[[], Awaitable[object]]) -> list[float]:
    """Milliseconds of each repetition, after one that is not counted."""
    await action()
    samples: list[float] = []
    for _ in range(repetitions):
        started = time.perf_counter()
        await action()
        samples.append((time.perf_counter() - started) * 1000)
    return samples


async def _measure_cells(node: Node, repetitions: int) -> list[Figure]:
    created, destroyed = await _measure_lives(node, repetitions, IDLE_S)
    sustained, _ = await _measure_lives(node, repetitions, 0.0)
    async with node.sandbox() as cell:
        executed = await _time_each(repetitions * 5, lambda: cell.exec(["true"]))
        async with cell.session() as shell:
            ran = await _time_each(repetitions * 5, lambda: shell.run("true"))
    return [
        summarise(CREATE, OURS, "ms", created),
        summarise(SUSTAINED, OURS, "ms", sustained),
        summarise(EXEC, OURS, "ms", executed),
        summarise(SESSION, OURS, "ms", ran),
        summarise(DESTROY, OURS, "ms", destroyed),
    ]


async def _measure_lives(node: Node, repetitions: int, pause_s: float) -> tuple[list[float], list[float]]:
    created: list[float] = []
    destroyed: list[float] = []
    for number in range(repetitions + 2):
        started = time.perf_counter()
        cell = await node.sandbox()
        await cell.exec(["true"])
        made = time.perf_counter()
        await cell.close()
        if number > 1:  # the first one prepares the image, from the second on spares are built
            created.append((made - started) * 1000)
            destroyed.append((time.perf_counter() - made) * 1000)
        await asyncio.sleep(pause_s)
    return created, destroyed


async def _measure_live(node: Node, count: int) -> list[Figure]:
    """Many idle cells at a time: what each takes of the machine's memory, and whether they slow the next one down."""
    await asyncio.sleep(1.0)
    available = available_bytes()
    cells: list[Sandbox] = []
    made: list[float] = []
    while len(cells) < count:
        started = time.perf_counter()
        cells.append(await _open_one(node))
        made.append((time.perf_counter() - started) * 1000)
    await asyncio.sleep(1.0)
    taken = available - available_bytes()
    started = time.perf_counter()
    twenty = await asyncio.gather(*(_open_one(node) for _ in range(20)))
    ready = (time.perf_counter() - started) * 1000
    await asyncio.gather(*(cell.close() for cell in (*cells, *twenty)))
    return [
        summarise(f"{LIVE} ({count})", OURS, "ms", made[-max(1, count // 10) :]),
        summarise(MEMORY, OURS, "MiB", [max(taken, 1) / count / 2**20]),
        summarise(TWENTY, OURS, "ms", [ready]),
    ]


def available_bytes() -> int:
    """``MemAvailable`` of the machine: what others do shows in it, too."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


async def _measure_many(node: Node) -> list[Figure]:
    before = proportional_bytes(node.pid)
    started = time.perf_counter()
    cells = await asyncio.gather(*(_open_one(node) for _ in range(MANY)))
    made = time.perf_counter() - started
    await asyncio.sleep(0.5)
    grown = proportional_bytes(node.pid) - before
    await asyncio.gather(*(cell.close() for cell in cells))
    return [
        summarise(AT_ONCE, OURS, "ms", [made * 1000 / MANY]),
        summarise(PROCESSES, OURS, "MiB", [grown / MANY / 2**20]),
    ]


async def _open_one(node: Node) -> Sandbox:
    cell = await node.sandbox()
    await cell.exec(["true"])
    return cell


def proportional_bytes(root: int) -> int:
    """Proportional set size of a process and everything below it: shared pages are counted once in all."""
    total = 0
    for pid in (root, *_below(root)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _below(pid: int) -> Iterator[int]:
    for task in _children_files(pid):
        with contextlib.suppress(OSError):
            for child in task.read_text("ascii").split():
                yield int(child)
                yield from _below(int(child))


def _children_files(pid: int) -> list[Path]:
    try:
        return [Path(f"/proc/{pid}/task/{task}/children") for task in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208
    except OSError:
        return []
