"""How the processes of a cell are charged to steps: by cgroup, or by fork lineage where there is none.

Two variants of one small contract, so that the cell itself need not know which it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from vallum.core.errors import SandboxError
from vallum.sandbox.base import Usage
from vallum.sandbox.cgroup.base import LEAF_GRACE_S, CellGroup, Leaf
from vallum.sandbox.ns import lineage
from vallum.sandbox.ns.lineage import Keeper, ProcessStat

KILL_WITHIN_S = 0.5
_GIVE_UP_S = 3.0


class Steps(Protocol):
    """What a cell needs to know of its steps."""

    def pids(self, step: int | None) -> list[int]:
        """Host pids of the step, or of the whole cell without PID 1."""
        ...

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """(step, method, confidence)."""
        ...

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Step of a cgroup v2 id."""
        ...

    def usage(self, step: int | None) -> Usage:
        """What was used."""
        ...

    def move(self, pid: int, step: int) -> None:
        """Charge one process to ``step`` from now on."""
        ...

    async def kill(self, step: int, spare: int | None) -> int:
        """Kill the step's processes but ``spare``; they are gone on return."""
        ...

    async def freeze(self, step: int | None) -> None:
        """Stop them where they stand."""
        ...

    async def thaw(self, step: int | None) -> None:
        """Let them go on."""
        ...

    def remove(self) -> None:
        """The cell has ended; remove what is left of its bookkeeping in the kernel."""
        ...


class GroupSteps:
    """By cgroup: the kernel's own record, which a guest cannot leave."""

    def __init__(self, group: CellGroup, init: int) -> None:
        """``init`` is the host pid of PID 1."""
        self._group = group
        self._init = init
        self._leaves: dict[int, tuple[Leaf, float]] = {}
        self.turn = asyncio.Lock()
        """On cgroup v1 PID 1 itself visits the leaf, one command at a time."""

    def leaf(self, step: int) -> Leaf:
        """A leaf of the step to start a command in: the last one while it is surely still there."""
        held = self._leaves.get(step)
        if held is not None and time.monotonic() - held[1] < LEAF_GRACE_S / 2:
            return held[0]
        leaf = self._group.open_leaf(step)
        if len(self._leaves) > 256:
            self._leaves.clear()
        self._leaves[step] = (leaf, time.monotonic())
        return leaf

    def prepare(self, step: int) -> Leaf | None:
        """Make ready what the first command of a step will need."""
        return self._group.prepare_leaf(step)

    def visit(self, step: int) -> None:
        """cgroup v1: put PID 1 into the step, so that what it forks now is born there."""
        self._group.move(self._init, step)

    def leave(self) -> None:
        """cgroup v1: put PID 1 back."""
        self._group.park(self._init)

    def pids(self, step: int | None) -> list[int]:
        """See :class:`Steps`."""
        return [pid for pid in self._group.pids(step) if pid != self._init]

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """See :class:`Steps`."""
        step = self._group.step_of_pid(pid)
        return (step, "cgroup", 1.0) if step is not None else (None, "none", 0.0)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """See :class:`Steps`."""
        return self._group.step_of_cgroup(cgroup_id)

    def usage(self, step: int | None) -> Usage:
        """See :class:`Steps`."""
        return self._group.usage(step)

    def move(self, pid: int, step: int) -> None:
        """See :class:`Steps`."""
        self._group.move(pid, step)

    async def kill(self, step: int, spare: int | None) -> int:
        """See :class:`Steps`.

        Raises:
            SandboxError: a process does not end (it waits in the kernel and cannot be interrupted).
        """
        parked = spare is not None and self._group.step_of_pid(spare) == step
        if parked and spare is not None:
            self._group.park(spare)
        count = self._group.kill(step)
        # What is cloned into a group that was once killed is killed by some kernels, too (6.18): the next command gets another.
        self._leaves.pop(step, None)
        deadline = time.monotonic() + _GIVE_UP_S
        pause_s = 0.0
        while not self._group.await_dead(step, timeout_s=0.02):
            if time.monotonic() > deadline:
                raise SandboxError(f"processes of step {step} do not end: {self._group.pids(step)[:8]}; close the cell")
            pause_s = min(0.05, pause_s + 0.005)
            await asyncio.sleep(pause_s)
        if parked and spare is not None:
            with contextlib.suppress(SandboxError):  # it may have ended meanwhile
                self._group.move(spare, step)
        return count

    async def freeze(self, step: int | None) -> None:
        """See :class:`Steps`."""
        self._group.freeze(step)

    async def thaw(self, step: int | None) -> None:
        """See :class:`Steps`."""
        self._group.thaw(step)

    def remove(self) -> None:
        """See :class:`Steps`."""
        self._group.remove()


class LineageSteps:
    """By fork lineage: each step has a keeper process inside the cell (see :mod:`vallum.sandbox.ns.lineage`)."""

    def __init__(self, init: int, end_cell: Callable[[], None]) -> None:
        """``end_cell`` is the last resort when a step cannot be killed."""
        self._init = init
        self._end_cell = end_cell
        self.keepers: dict[int, Keeper] = {}
        """By host pid."""

    def pids(self, step: int | None) -> list[int]:
        """See :class:`Steps`."""
        return [stat.pid for stat in self._find(lineage.read_processes(), step)]

    def _find(self, processes: Mapping[int, ProcessStat], step: int | None) -> list[ProcessStat]:
        found = []
        for pid in lineage.descendants(processes, self._init):
            if pid in self.keepers or processes[pid].state in "ZX":
                continue
            known = lineage.find_step(processes, pid, self.keepers)
            if step is None or (known is not None and known[0] == step):
                found.append(processes[pid])
        return found

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """See :class:`Steps`."""
        known = lineage.find_step(lineage.read_processes(), pid, self.keepers)
        return (known[0], "lineage", known[1]) if known is not None else (None, "none", 0.0)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """See :class:`Steps`."""
        return None

    def usage(self, step: int | None) -> Usage:
        """See :class:`Steps`. CPU time of processes that the kernel reaped by itself (SIGCHLD ignored) is missing."""
        processes = lineage.read_processes()
        found = self._find(processes, step)
        roots = [pid for pid, keeper in self.keepers.items() if step in (None, keeper.step) and not keeper.shells]
        ticks = sum(stat.cpu_ticks for stat in found) + sum(
            processes[pid].cpu_ticks for pid in roots if pid in processes
        )
        return Usage(cpu_ns=ticks * 1_000_000_000 // lineage.TICKS_PER_S, pids=len(found))

    def move(self, pid: int, step: int) -> None:
        """See :class:`Steps`."""
        chain = lineage.ancestry(lineage.read_processes(), pid, self._init)
        keeper = self.keepers.get(chain[-1]) if chain else None
        if keeper is None:
            raise SandboxError(f"process {pid} is gone, so it cannot be charged to step {step}")
        keeper.shells.setdefault(pid, [(0, keeper.step)]).append((lineage.now_ticks(), step))

    async def kill(self, step: int, spare: int | None) -> int:
        """See :class:`Steps`.

        Raises:
            SandboxError: the step forked faster than it could be killed; the cell was ended instead.
        """
        killed: set[tuple[int, int]] = set()
        deadline = time.monotonic() + KILL_WITHIN_S * 0.8
        while targets := [stat for stat in self._find(lineage.read_processes(), step) if stat.pid != spare]:
            if time.monotonic() > deadline:
                self._end_cell()
                raise SandboxError(f"step {step} could not be killed process by process, so its cell was ended")
            for stat in targets:
                if _send(stat, signal.SIGKILL):
                    killed.add((stat.pid, stat.start_ticks))
            await asyncio.sleep(0.002)
        return len(killed)

    async def freeze(self, step: int | None) -> None:
        """See :class:`Steps`. Repeated until nobody new appears."""
        stopped: set[tuple[int, int]] = set()
        for _ in range(100):
            fresh = [s for s in self._find(lineage.read_processes(), step) if (s.pid, s.start_ticks) not in stopped]
            if not fresh:
                return
            for stat in fresh:
                _send(stat, signal.SIGSTOP)
                stopped.add((stat.pid, stat.start_ticks))
            await asyncio.sleep(0.001)
        self._end_cell()
        raise SandboxError("the processes could not be stopped one by one, so their cell was ended")

    async def thaw(self, step: int | None) -> None:
        """See :class:`Steps`."""
        for stat in self._find(lineage.read_processes(), step):
            _send(stat, signal.SIGCONT)

    def remove(self) -> None:
        """See :class:`Steps`."""


def _send(stat: ProcessStat, signum: int) -> bool:
    """Signal exactly the process that was seen, not a later one with its number."""
    try:
        fd = os.pidfd_open(stat.pid)
    except OSError:
        return False
    try:
        with open(f"/proc/{stat.pid}/stat", errors="replace") as file:  # noqa: PTH123
            now = lineage.parse_stat(file.read())
        if now is None or now.start_ticks != stat.start_ticks:
            return False
        signal.pidfd_send_signal(fd, signum)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
