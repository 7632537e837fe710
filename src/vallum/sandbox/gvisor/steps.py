"""Steps of a gVisor cell: lineage decides whose a process is, PID 1 signals it.

Covered: what :mod:`vallum.sandbox.gvisor.lineage` covers. CPU and memory are known of the cell as a whole only: the
host's kernel sees one kernel, not its processes.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from vallum.core.errors import SandboxError
from vallum.sandbox.base import Usage
from vallum.sandbox.cgroup.base import CellGroup
from vallum.sandbox.gvisor.lineage import Lineage

_KILL_WITHIN_S = 0.4


class TraceSteps:
    """See :class:`vallum.sandbox.ns.steps.Steps`."""

    def __init__(
        self,
        group: CellGroup | None,
        *,
        drain: Callable[[], None],
        is_sure: Callable[[], bool],
        send: Callable[[list[int], int], None],
        end_cell: Callable[[], None],
    ) -> None:
        """
        Args:
            group: the cell's cgroup, for what the cell uses; None where there is none.
            drain: take what has been reported.
            is_sure: whether nothing was lost of what was reported.
            send: signal processes of the cell.
            end_cell: the last resort.
        """
        self.lineage = Lineage()
        self._group = group
        self._drain = drain
        self._is_sure = is_sure
        self._send = send
        self._end_cell = end_cell

    def pids(self, step: int | None) -> list[int]:
        """Process ids of the cell's own numbering."""
        self._drain()
        return self.lineage.pids(step)

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """``lineage``, with a confidence below 1."""
        return self.lineage.step_of(pid)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Always None: a step is no cgroup here."""
        return None

    def usage(self, step: int | None) -> Usage:
        """Of the cell, its kernel included; of a step only the number of processes."""
        if step is not None:
            return Usage(pids=len(self.lineage.pids(step)))
        return self._group.usage(None) if self._group is not None else Usage(pids=len(self.lineage.pids()))

    def move(self, pid: int, step: int) -> None:
        """What the process has made so far stays where it is."""
        self._drain()
        if not self.lineage.move(pid, step):
            raise SandboxError(f"process {pid} is gone, so it cannot be charged to step {step}")

    async def kill(self, step: int, spare: int | None) -> int:
        """Kill until nobody of the step is left.

        Raises:
            SandboxError: the step forked faster than it could be killed, or reports were lost; the cell was ended.
        """
        killed: set[int] = set()
        deadline = time.monotonic() + _KILL_WITHIN_S
        while targets := [pid for pid in self.pids(step) if pid != spare]:
            if time.monotonic() > deadline:
                self._end_cell()
                raise SandboxError(f"step {step} could not be killed process by process, so its cell was ended")
            self._send(targets, signal.SIGKILL)
            killed.update(targets)
            await asyncio.sleep(0.002)
        if not self._is_sure():
            self._end_cell()
            raise SandboxError(
                f"reports of processes were lost, so nobody knows that step {step} is dead: its cell was ended"
            )
        return len(killed)

    async def freeze(self, step: int | None) -> None:
        """Stop them; repeated until nobody new appears."""
        stopped: set[int] = set()
        for _ in range(100):
            fresh = [pid for pid in self.pids(step) if pid not in stopped]
            if not fresh:
                return
            self._send(fresh, signal.SIGSTOP)
            stopped.update(fresh)
            await asyncio.sleep(0.005)
        self._end_cell()
        raise SandboxError("the processes could not be stopped one by one, so their cell was ended")

    async def thaw(self, step: int | None) -> None:
        """Let them go on."""
        if pids := self.pids(step):
            self._send(pids, signal.SIGCONT)

    def remove(self) -> None:
        """The cell's cgroup goes."""
        if self._group is not None:
            self._group.remove()
