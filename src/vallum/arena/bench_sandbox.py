"""How long a cell takes, next to its peers: the same command, one after the other, in one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from vallum.arena.figures import OURS, Figure, summarise
from vallum.arena.sandbox_peers import MANY, PEERS, Names, open_peer
from vallum.client.face import Node, Sandbox
from vallum.client.places import Places

CREATE, EXEC, SESSION, DESTROY = "create and first true", "true in a running one", "session.run of true", "destroy"
AT_ONCE, MEMORY = f"{MANY} at once, time for each", "memory of an idle one (PSS; the kernel's own not counted)"


async def run(places: Places, repetitions: int) -> list[Figure]:
    """Every figure of cells and of peers.

    Raises:
        VallumError: a cell could not be had.
    """
    async with Node(places=places) as node:
        figures = await _measure_cells(node, repetitions)
        figures += await _measure_many(node)
    figures.append(summarise(CREATE, "subprocess.run (no walls)", "ms", await _time_each(repetitions, _run_plain)))
    for peer in PEERS:
        async with open_peer(peer) as opened:
            figures += await opened.measure(
                repetitions, Names(create=CREATE, execute=EXEC, destroy=DESTROY, at_once=AT_ONCE)
            )
    return figures


async def _run_plain() -> None:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()


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
    created: list[float] = []
    destroyed: list[float] = []
    for number in range(repetitions + 1):
        started = time.perf_counter()
        cell = await node.sandbox()
        await cell.exec(["true"])
        made = time.perf_counter()
        await cell.close()
        if number:  # the first one prepares the image
            created.append((made - started) * 1000)
            destroyed.append((time.perf_counter() - made) * 1000)
    async with node.sandbox() as cell:
        executed = await _time_each(repetitions * 5, lambda: cell.exec(["true"]))
        async with cell.session() as shell:
            ran = await _time_each(repetitions * 5, lambda: shell.run("true"))
    return [
        summarise(CREATE, OURS, "ms", created),
        summarise(EXEC, OURS, "ms", executed),
        summarise(SESSION, OURS, "ms", ran),
        summarise(DESTROY, OURS, "ms", destroyed),
    ]


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
        summarise(MEMORY, OURS, "MiB", [grown / MANY / 2**20]),
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
