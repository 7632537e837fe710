"""The contract of a cgroup driver: quotas of a cell, and one leaf (or more) a step.

Layout, whatever the hierarchy: ``<mount>/<prefix>/<cell>/`` carries the quotas, ``<cell>/init`` holds
PID 1, and ``<cell>/s<step>`` (``s<step>.<k>`` for later commands of the same step) holds what a step started.
A guest never sees any of it: cgroupfs is not mounted in a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vallum.core.limits import Limits
from vallum.sandbox.base import Usage


@dataclass(frozen=True)
class Leaf:
    """A cgroup that processes are started in."""

    cgroup_id: int
    """Inode of the cgroup v2 directory: what the kernel stamps on sockets and what BPF calls the cgroup id."""
    fd: int
    """O_PATH|O_DIRECTORY (or O_RDONLY) descriptor for ``clone3(CLONE_INTO_CGROUP)``; closed by the group."""


class CellGroup(Protocol):
    """The cgroups of one cell."""

    def enter_paths(self) -> list[str]:
        """``cgroup.procs`` files (one a hierarchy) that PID 1's host pid is written to before it runs anything."""
        ...

    def delegate(self, uid: int) -> None:
        """Let host user ``uid`` (that of the cell's PID 1, never of a guest user) start processes in leaves of
        this cell: chown exactly the files that ``clone3(CLONE_INTO_CGROUP)`` checks."""
        ...

    def open_leaf(self, step: int) -> Leaf:
        """A fresh leaf charged to ``step``."""
        ...

    def move(self, pid: int, step: int) -> None:
        """Move one process (all its threads) into the newest leaf of ``step``."""
        ...

    def park(self, pid: int) -> None:
        """Move one process into ``init``, so that its step can be killed around it."""
        ...

    def step_of_cgroup(self, cgroup_id: int) -> int | None: ...

    def step_of_pid(self, pid: int) -> int | None:
        """From /proc/PID/cgroup; None when it is not in a leaf of this cell."""
        ...

    def pids(self, step: int | None = None) -> list[int]: ...

    def kill(self, step: int | None = None) -> int:
        """``cgroup.kill`` (SIGKILL sweep where the kernel lacks it). Returns how many were alive."""
        ...

    def freeze(self, step: int | None = None) -> None: ...

    def thaw(self, step: int | None = None) -> None: ...

    def usage(self, step: int | None = None) -> Usage: ...

    def remove(self) -> None:
        """Remove every directory; waits (bounded) for the last processes to be reaped."""
        ...


class Driver(Protocol):
    """How this machine does cgroups."""

    name: str
    """``v2``, ``hybrid``, ``v1``."""

    def probe(self) -> dict[str, str]:
        """``cgroup.attribution``, ``cgroup.cpu``, ``cgroup.memory``, ``cgroup.pids``, ``cgroup.kill``, ``cgroup.freeze``
        -> ``enforced`` | ``degraded: why; remedy`` | ``missing: why; remedy``, by having attempted it."""
        ...

    def make(self, cell: str, limits: Limits) -> CellGroup:
        """
        Raises:
            SandboxError: a quota that was asked for cannot be set (names controller and remedy).
        """
        ...

    def sweep(self) -> int:
        """Kill and remove everything under our prefix that a crash left. Returns how many cgroups."""
        ...
