"""Life and death of a cell: nothing survives it, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from vallum.core.errors import CellGone
from vallum.sandbox.base import Cell
from vallum.testing.sandbox_conformance.driving import (
    MakeCell,
    become,
    close_pipes,
    is_alive,
    lives,
    read_until,
    run,
    sh,
    start,
)


def find_traces(cell_id: str) -> list[str]:
    """Mounts and cgroups of this machine that carry the cell's name."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if cell_id in line]
    # Not a glob: groups of others come and go meanwhile, which walk() takes in its stride.
    groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(f"/{cell_id}")]
    return mounts + groups


async def start_tree(cell: Cell) -> list[int]:
    """A stubborn tree in two steps; returns its pids."""
    for step in (0, 1):
        script = "trap '' TERM HUP; (setsid sleep 60 &) ; sleep 61 & echo up; wait"
        child = await start(cell, script, step=step)
        assert child.stdout is not None
        await read_until(child.stdout, b"up")
        close_pipes(child)
    assert await become(lambda: len(cell.pids()) >= 6)
    return cell.pids()


async def test_close_ends_everything(make_cell: MakeCell) -> None:
    """Returns how many were alive; mounts and cgroups are gone; closing twice is fine."""
    cell = await make_cell()
    pids = await start_tree(cell)
    assert await cell.close() >= 6
    assert not [pid for pid in pids if lives(cell, pid)]
    assert not is_alive(cell.pid)
    assert find_traces(cell.id) == []
    await cell.close()


async def test_after_the_end_everything_says_so(make_cell: MakeCell) -> None:
    """And nothing hangs."""
    cell = await make_cell()
    child = await start(cell, "sleep 60")
    await cell.close()
    close_pipes(child)
    async with asyncio.timeout(5):
        for call in (
            run(cell, ["true"]),
            cell.read_file("/etc/passwd", limit_bytes=1 << 20),
            cell.write_file("/tmp/x", b""),
            cell.kill_step(0),
        ):
            with pytest.raises(CellGone):
                await call


async def test_the_death_of_pid_1_is_the_end(make_cell: MakeCell) -> None:
    """Also when it was killed from outside: waiting commands are told, nothing of the cell runs on."""
    cell = await make_cell()
    pids = await start_tree(cell)
    child = await start(cell, "sleep 60", step=2)
    waiting = asyncio.create_task(cell.wait(child))
    await asyncio.sleep(0)
    os.kill(cell.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        try:
            ended = await waiting
        except CellGone:
            pass
        else:
            assert ended.signal == signal.SIGKILL
    assert await become(lambda: not any(lives(cell, pid) for pid in pids), 2.0)
    close_pipes(child)
    await cell.close()
    assert find_traces(cell.id) == []


async def test_ten_cells_at_once(make_cell: MakeCell) -> None:
    """Built together, each its own."""
    begin = time.monotonic()
    cells = await asyncio.gather(*(make_cell() for _ in range(10)))
    results = await asyncio.gather(*(sh(cell, f"echo {n} >/tmp/n; cat /tmp/n") for n, cell in enumerate(cells)))
    assert [result.text for result in results] == [str(n) for n in range(10)]
    assert len({cell.id for cell in cells}) == len({cell.pid for cell in cells}) == 10
    await asyncio.gather(*(cell.close() for cell in cells))
    assert [trace for cell in cells for trace in find_traces(cell.id)] == []
    assert time.monotonic() - begin < 20


async def test_a_closed_cell_frees_its_descriptors(make_cell: MakeCell) -> None:
    """Twenty cells later we hold as many as before."""
    cell = await make_cell()
    await sh(cell, "true")
    await cell.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        cell = await make_cell()
        await sh(cell, "true")
        await cell.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
