"""What walls cost work that is already running: the same command inside a cell and outside, in turns.

Outside means: this machine, as this user, in a temporary directory, with nothing between.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vallum.arena.figures import OURS, Figure, missing, summarise
from vallum.client.face import Node, Sandbox

OUTSIDE = "the same outside (no walls)"
TIMEOUT_S = 300.0
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Outside, so that it is the same program as in the cell."""

_MAKE_TREE = """
import os, subprocess
for outer in range(100):
    os.makedirs(f"tree/d{outer}")
    for inner in range(200):
        with open(f"tree/d{outer}/f{inner}", "w") as file:
            file.write(f"{outer} {inner}\\n")
for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "tree"]):
    subprocess.run(["git", "-C", "tree", *words], check=True)
"""
_MAKE_SOURCE = """
with open("source.c", "w") as file:
    for number in range(250):
        file.write(f"int f{number}(int x) {{ int s = 0; for (int i = 0; i < x; i++) s += (i * {number}) ^ (s >> 3); return s; }}\\n")
"""


@dataclass(frozen=True)
class Workload:
    """One kind of work."""

    what: str
    program: str
    """Must be installed; it is the cell's, too (the host image)."""
    prepare: str
    """Python, run once in the work's directory."""
    argv: list[str]


WORKLOADS = (
    Workload(
        "cpu-bound loop",
        "python3",
        "",
        ["python3", "-I", "-c", "x = 0\nfor i in range(3_000_000): x = (x * 31 + i) & 0xFFFF"],
    ),
    Workload("git status of 20,000 files", "git", _MAKE_TREE, ["git", "-C", "tree", "status", "--short"]),
    Workload("compile of C", "cc", _MAKE_SOURCE, ["cc", "-O2", "-c", "-o", "out.o", "source.c"]),
)


async def measure_workloads(node: Node, repetitions: int) -> list[Figure]:
    """Milliseconds of each workload, inside and outside, in turns."""
    figures: list[Figure] = []
    for work in WORKLOADS:
        if shutil.which(work.program, path=PATH) is None:
            figures.append(missing(work.what, OUTSIDE, "ms", f"{work.program} is not installed"))
            continue
        figures += await _measure(node, work, repetitions)
    return figures


async def _measure(node: Node, work: Workload, repetitions: int) -> list[Figure]:
    inside: list[float] = []
    outside: list[float] = []
    async with node.sandbox() as cell:
        with tempfile.TemporaryDirectory(prefix="vallum-work-") as directory:
            if work.prepare:
                await _run_inside(cell, ["python3", "-I", "-c", work.prepare])
                await _run_outside(["python3", "-I", "-c", work.prepare], directory)
            for number in range(repetitions + 1):
                within = await _run_inside(cell, work.argv)
                without = await _run_outside(work.argv, directory)
                if number:  # the first fills caches
                    inside.append(within)
                    outside.append(without)
            await asyncio.to_thread(shutil.rmtree, Path(directory) / "tree", ignore_errors=True)
    return [summarise(work.what, OURS, "ms", inside), summarise(work.what, OUTSIDE, "ms", outside)]


async def _run_inside(cell: Sandbox, argv: list[str]) -> float:
    started = time.perf_counter()
    ran = await cell.exec(argv, timeout_s=TIMEOUT_S)
    taken = (time.perf_counter() - started) * 1000
    if ran.exit_code:
        raise RuntimeError(f"{argv[0]} failed in a cell: {ran.stderr.decode(errors='replace')[-300:]}")
    return taken


async def _run_outside(argv: list[str], directory: str) -> float:
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=directory, stdout=asyncio.subprocess.DEVNULL, env={"PATH": PATH, "HOME": directory}
    )
    status = await asyncio.wait_for(process.wait(), TIMEOUT_S)
    taken = (time.perf_counter() - started) * 1000
    if status:
        raise RuntimeError(f"{argv[0]} failed outside with {status}")
    return taken
