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

LEAF_GRACE_S = 15.0
"""An empty leaf younger than this is never removed: a command may be on its way into it."""


@dataclass(frozen=True)
class Leaf:
    """A cgroup that processes are started in."""

    cgroup_id: int | None
    """Inode of the cgroup v2 directory: what the kernel stamps on sockets and what BPF calls the cgroup id.
    None on cgroup v1, which has no such id."""
    fd: int | None
    """O_PATH|O_DIRECTORY descriptor for ``clone3(CLONE_INTO_CGROUP)``; closed by the group, at the earliest
    ``LEAF_GRACE_S`` after it was opened. None on cgroup v1: there the owner moves PID 1 into the leaf
    (``move``), lets it fork, and takes it back (``park``), one command at a time, so that a command is in
    its leaf from its first instruction there too."""


class CellGroup(Protocol):
    """The cgroups of one cell."""

    def enter_paths(self) -> list[str]:
        """``cgroup.procs`` files (one a hierarchy) that PID 1's host pid is written to before it runs anything.

        On v2 this is the cell's own directory, so that a cgroup namespace made then is rooted at the cell; the
        first :meth:`open_leaf` moves what it finds there into ``init``.
        """
        ...

    def delegate(self, uid: int) -> None:
        """Let host user ``uid`` (that of the cell's PID 1, never of a guest user) start processes in leaves of
        this cell: chown exactly the files that ``clone3(CLONE_INTO_CGROUP)`` checks, ``cgroup.procs`` of the
        cell (common ancestor of PID 1's group and the leaf) and of each leaf, also of later ones."""
        ...

    def open_leaf(self, step: int) -> Leaf:
        """A fresh leaf charged to ``step``."""
        ...

    def prepare_leaf(self, step: int) -> Leaf | None:
        """The leaf that the first :meth:`open_leaf` of ``step`` will open; None where none can be made before, or it is open."""
        ...

    def move(self, pid: int, step: int) -> None:
        """Move one process (all its threads) into the newest leaf of ``step``, made when there is none.

        Raises:
            SandboxError: the process is gone, or the kernel refuses.
        """
        ...

    def park(self, pid: int) -> None:
        """Move one process into ``init``, so that its step can be killed around it."""
        ...

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Step of a leaf of this cell, also of one that is gone; None for any other id."""
        ...

    def step_of_pid(self, pid: int) -> int | None:
        """From /proc/PID/cgroup; None when it is not in a leaf of this cell."""
        ...

    def pids(self, step: int | None = None) -> list[int]:
        """Host pids in the leaves of the step, or of every step; never PID 1."""
        ...

    def kill(self, step: int | None = None) -> int:
        """``cgroup.kill`` (SIGKILL sweep where the kernel lacks it). Returns how many processes of steps were alive.

        Does not wait for them to be gone: see :meth:`await_dead`. Without ``step`` PID 1 is killed too.
        """
        ...

    def await_dead(self, step: int | None = None, *, timeout_s: float = 0.5) -> bool:
        """Block until no process of the step (or of the whole cell, PID 1 included) runs any more; False when
        some still do after ``timeout_s``. Zombies count as dead. Takes about a millisecond after :meth:`kill`."""
        ...

    def freeze(self, step: int | None = None) -> None:
        """Stop the step, or every step of the cell, those opened later included. Never PID 1: a frozen PID 1
        could not end the cell when its owner dies. Returns when they stand, at the latest after half a second."""
        ...

    def thaw(self, step: int | None = None) -> None:
        """Undo :meth:`freeze`."""
        ...

    def usage(self, step: int | None = None) -> Usage:
        """From the kernel's accounting, leaves that are gone included. Per step, ``memory_bytes``,
        ``memory_peak_bytes`` and ``oom_kills`` are None unless cgroup v2 has the memory controller, and
        ``memory_peak_bytes`` is the largest peak of one leaf."""
        ...

    def remove(self) -> None:
        """Kill what is left and remove every directory; waits (bounded) for the last processes to be gone.

        Raises:
            SandboxError: a group is still busy after the bound (a process in an uninterruptible wait).
        """
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

    def close(self) -> None:
        """Like :meth:`sweep`, and remove our prefix too. The driver is of no use afterwards."""
        ...
