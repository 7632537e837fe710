"""Steps: what a step starts is charged to it, counted, frozen and killed with it."""

from __future__ import annotations

import asyncio
import time

import pytest

from vallum.core.errors import SandboxError
from vallum.core.limits import MIB, Limits
from vallum.sandbox.base import Cell
from vallum.testing.sandbox_conformance.driving import (
    MakeCell,
    become,
    close_pipes,
    is_alive,
    lives,
    python,
    read_until,
    sh,
    start,
    write_all,
)

KILL_WITHIN_S = 0.5

TREE = (
    "trap '' TERM HUP INT; "
    "(setsid sh -c 'trap \"\" TERM HUP; (sleep 60 & sleep 61) & wait' >/dev/null 2>&1 &); "
    "i=0; while [ $i -lt 20 ]; do sleep 62 & i=$((i+1)); done; echo up; wait"
)
"""Double-forked, in sessions of their own, deaf to SIGTERM."""


def is_by_cgroup(cell: Cell, pid: int) -> bool:
    """Whether this cell tells steps apart by cgroup."""
    return cell.step_of_pid(pid)[1] == "cgroup"


async def test_a_daemon_stays_charged_to_its_step(make_cell: MakeCell) -> None:
    """Also after its parent is gone and other steps have come."""
    cell = await make_cell()
    await sh(cell, "setsid sh -c 'sleep 60 & exec sleep 61' >/dev/null 2>&1 </dev/null & exit 0", step=3)
    assert await become(lambda: len(cell.pids(3)) == 2)
    await sh(cell, "true", step=4)
    await sh(cell, "true", step=5)
    pids = cell.pids(3)
    assert len(pids) == 2
    assert cell.pids(4) == cell.pids(5) == []
    assert sorted(cell.pids()) == sorted(pids)
    for pid in pids:
        step, method, confidence = cell.step_of_pid(pid)
        assert step == 3
        assert (method, confidence == 1.0) in (("cgroup", True), ("lineage", False))


async def test_a_process_outside_is_nobodys(make_cell: MakeCell) -> None:
    """Neither ours, nor PID 1, nor one of another cell."""
    cell, other = await make_cell(), await make_cell()
    child = await start(other, "sleep 30", step=0)
    await sh(cell, "true")
    for pid in (1, cell.pid, child.pid):
        assert cell.step_of_pid(pid)[0] is None
    assert child.pid in other.pids(0)
    close_pipes(child)


async def test_cgroup_ids_lead_back_to_their_step(make_cell: MakeCell) -> None:
    """As the kernel stamps them on sockets; ids of nobody give None."""
    cell = await make_cell()
    ids = [await cell.open_step(step) for step in (0, 1, 2)]
    if None in ids:
        pytest.skip("no cgroup v2 ids on this machine")
    assert [cell.step_of_cgroup(one) for one in ids if one is not None] == [0, 1, 2]
    assert cell.step_of_cgroup(1) is None


async def test_kill_ends_a_stubborn_tree_in_time(make_cell: MakeCell) -> None:
    """Everything of the step is gone on return, within half a second; the rest of the cell lives."""
    cell = await make_cell()
    other = await start(cell, "sleep 60", step=1)
    child = await start(cell, TREE, step=0)
    assert child.stdout is not None
    await read_until(child.stdout, b"up")
    assert await become(lambda: len(cell.pids(0)) >= 24)
    pids = cell.pids(0)
    begin = time.monotonic()
    assert await cell.kill_step(0) >= 24
    took_s = time.monotonic() - begin
    assert not [pid for pid in pids if lives(cell, pid)]
    assert took_s < KILL_WITHIN_S
    assert cell.pids(0) == []
    assert lives(cell, other.pid)
    assert (await cell.wait(child)).signal == 9
    assert (await sh(cell, "echo on", step=2)).text == "on"
    close_pipes(child)
    close_pipes(other)


async def test_a_step_goes_on_after_a_kill(make_cell: MakeCell) -> None:
    """A command that ran into its time limit is not the end of the step it belongs to."""
    cell = await make_cell()
    child = await start(cell, "exec sleep 600", step=3)
    await cell.kill_step(3)
    assert (await cell.wait(child)).signal == 9
    close_pipes(child)
    for step in (3, 3, 4):
        assert (await sh(cell, "echo on", step=step)).text == "on"


async def test_kill_outruns_a_fork_bomb(make_cell: MakeCell) -> None:
    """One that forks faster than a list of it can be read. By lineage a backend may end the whole cell and say so."""
    cell = await make_cell(limits=Limits(memory_bytes=None, pids=None))
    child = await start(
        cell, "i=0; while [ $i -lt 8 ]; do (while :; do (:) & (:); done) & i=$((i+1)); done; echo up; wait"
    )
    assert child.stdout is not None
    await read_until(child.stdout, b"up")
    by_cgroup = is_by_cgroup(cell, child.pid)
    await asyncio.sleep(0.1)
    try:
        await cell.kill_step(0)
    except SandboxError:
        assert not by_cgroup
        assert await become(lambda: not is_alive(cell.pid))
    else:
        assert cell.pids(0) == []
        await asyncio.sleep(0.1)
        assert cell.pids() == []
    close_pipes(child)


async def test_a_spared_shell_survives_and_moves_on(make_cell: MakeCell) -> None:
    """The way persistent sessions work: one shell, a step a command."""
    cell = await make_cell()
    await cell.open_step(0)
    shell = await start(cell, 'while read line; do eval "$line"; done', step=0)
    assert shell.stdin is not None
    assert shell.stdout is not None
    await write_all(shell.stdin, b"sleep 60 & echo one\n", close=False)
    await read_until(shell.stdout, b"one")
    assert len(cell.pids(0)) == 2
    await cell.open_step(1)
    await cell.move(shell, step=1)
    await write_all(shell.stdin, b"sleep 61 & echo two\n", close=False)
    await read_until(shell.stdout, b"two")
    old = [pid for pid in cell.pids(0) if pid != shell.pid]
    assert len(old) == 1
    assert cell.step_of_pid(old[0])[0] == 0
    assert cell.step_of_pid(shell.pid)[0] == 1
    assert len([pid for pid in cell.pids(1) if pid != shell.pid]) == 1
    await cell.kill_step(1, spare=shell)
    assert lives(cell, shell.pid)
    assert lives(cell, old[0])
    await cell.open_step(2)
    await cell.move(shell, step=2)
    await write_all(shell.stdin, b"echo three\n", close=False)
    await read_until(shell.stdout, b"three")
    assert cell.step_of_pid(shell.pid)[0] == 2
    close_pipes(shell)


async def test_freeze_and_thaw(make_cell: MakeCell) -> None:
    """A frozen step stands where it is, others go on; a frozen step can be killed."""
    cell = await make_cell()
    child = await start(cell, "while :; do echo x >>/tmp/log; sleep 0.01; done", step=0)

    async def size() -> int:
        return int((await sh(cell, "wc -c </tmp/log", step=1)).text)

    await asyncio.sleep(0.2)
    await cell.freeze(step=0)
    before = await size()
    await asyncio.sleep(0.2)
    assert await size() == before
    await cell.thaw(step=0)
    await asyncio.sleep(0.2)
    assert await size() > before
    await cell.freeze(step=0)
    await cell.kill_step(0)
    assert not lives(cell, child.pid)
    close_pipes(child)


async def test_usage_grows_with_what_a_step_burns(make_cell: MakeCell) -> None:
    """CPU time is charged to the step that used it, and stays charged after the process has ended."""
    cell = await make_cell()
    await python(cell, "sum(range(20_000_000))", step=1)
    await sh(cell, "true", step=2)
    burnt, rested, total = cell.usage(1), cell.usage(2), cell.usage()
    if burnt.cpu_ns is None or rested.cpu_ns is None or total.cpu_ns is None:
        pytest.skip("no CPU accounting on this machine")
    assert burnt.cpu_ns > 50_000_000
    assert rested.cpu_ns < burnt.cpu_ns
    assert total.cpu_ns >= burnt.cpu_ns


async def test_memory_beyond_the_quota_kills_inside_only(make_cell: MakeCell) -> None:
    """And the cell can be used on."""
    probe = await make_cell()
    child = await start(probe, "sleep 30")
    by_cgroup = is_by_cgroup(probe, child.pid)
    close_pipes(child)
    if not by_cgroup or probe.usage().memory_bytes is None:
        pytest.skip("no memory controller on this machine")
    cell = await make_cell(limits=Limits(memory_bytes=96 * MIB))
    result = await python(cell, "b = bytearray(400 << 20); print(len(b))")
    assert result.stdout == b""
    assert result.exit.code != 0
    assert (await sh(cell, "echo on")).text == "on"
    assert (cell.usage().oom_kills or 0) >= 1


async def test_pids_beyond_the_quota_are_refused(make_cell: MakeCell) -> None:
    """A fork bomb stops; after its end the cell can be used on."""
    probe = await make_cell()
    child = await start(probe, "sleep 30")
    by_cgroup = is_by_cgroup(probe, child.pid)
    close_pipes(child)
    if not by_cgroup:
        pytest.skip("no pids controller on this machine")
    cell = await make_cell(limits=Limits(memory_bytes=None, pids=30))
    code = (
        "import os, time\nn = 0\ntry:\n  while n < 300:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\n"
        "except OSError as e: print(n, e.errno, flush=True)\nos.kill(0, 9)"
    )
    made, number = map(int, (await python(cell, code)).text.split())
    assert made < 32
    assert number == 11
    await cell.kill_step(0)
    assert (await sh(cell, "echo on", step=1)).text == "on"
