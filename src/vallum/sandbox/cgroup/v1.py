"""The driver for machines without a v2 hierarchy: steps are ``freezer`` groups (and ``cpuacct`` ones, for CPU time).

Covered: attribution, freeze, kill and quotas, as on v2. Not covered: there is no cgroup id that sockets carry,
and no ``CLONE_INTO_CGROUP``, so commands start one at a time (see :class:`~vallum.sandbox.cgroup.base.Leaf`).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.base import Usage
from vallum.sandbox.cgroup import files, quota1
from vallum.sandbox.cgroup.base import Leaf
from vallum.sandbox.cgroup.group2 import parse_leaf
from vallum.sandbox.cgroup.mounts import parse_membership
from vallum.sandbox.cgroup.quota1 import CellQuotas1, Quotas1, missing_quota
from vallum.sandbox.cgroup.trial import attempt_leaf


@dataclass(frozen=True)
class _Trees:
    """Directories of one cell in the hierarchies that steps have groups in."""

    freezer: str
    cpuacct: str | None

    def each(self) -> list[str]:
        """Both, or the one."""
        return [self.freezer] if self.cpuacct is None else [self.freezer, self.cpuacct]


class V1Group:
    """The cgroups of one cell on v1."""

    def __init__(self, trees: _Trees, name: str, quotas: CellQuotas1) -> None:
        """``name`` is the cell's freezer group as ``/proc/PID/cgroup`` shows it. Makes the directories."""
        self._trees = trees
        self._name = name
        self._quotas = quotas
        self._steps: set[int] = set()
        self._frozen: set[int | None] = set()
        for tree in trees.each():
            files.make_dir(tree)
            files.make_dir(f"{tree}/init")

    def enter_paths(self) -> list[str]:
        """See the contract. Controllers may share a mount (``cpu,cpuacct``): the deeper group is entered last and wins."""
        return [*self._quotas.enter_paths(), *(f"{tree}/init/cgroup.procs" for tree in self._trees.each())]

    def delegate(self, uid: int) -> None:
        """Nothing to do: on v1 the owner itself moves processes, never PID 1."""

    def open_leaf(self, step: int) -> Leaf:
        """See the contract. One leaf a step: nothing holds a descriptor of it."""
        if step not in self._steps:
            for tree in self._trees.each():
                files.make_dir(f"{tree}/s{step}")
            self._steps.add(step)
            if None in self._frozen:
                self._set_state(step, "FROZEN")
        return Leaf(cgroup_id=None, fd=None)

    def move(self, pid: int, step: int) -> None:
        """See the contract."""
        self.open_leaf(step)
        self._put(pid, f"s{step}")

    def park(self, pid: int) -> None:
        """See the contract."""
        self._put(pid, "init")

    def prepare_leaf(self, step: int) -> Leaf | None:
        """See the contract. None: a command waits for PID 1's visit to the leaf much longer than for the leaf."""
        return None

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """None: v1 groups have no id that the kernel stamps on anything."""
        return None

    def step_of_pid(self, pid: int) -> int | None:
        """See the contract."""
        try:
            name = parse_membership(files.read_text(f"/proc/{pid}/cgroup"), "freezer")
        except OSError:
            return None
        if name is None or not name.startswith(self._name + "/"):
            return None
        return parse_leaf(name[len(self._name) + 1 :])

    def pids(self, step: int | None = None) -> list[int]:
        """See the contract."""
        return [
            pid for one in self._each(step) for pid in files.read_pids(f"{self._trees.freezer}/s{one}/cgroup.procs")
        ]

    def kill(self, step: int | None = None) -> int:
        """See the contract."""
        count = len(self.pids(step))
        for one in self._each(step):
            files.kill_without_kernel_help(
                lambda one=one: self.pids(one),  # type: ignore[misc]
                lambda one=one: self._set_state(one, "FROZEN"),  # type: ignore[misc]
                lambda one=one: self._set_state(one, "THAWED"),  # type: ignore[misc]
            )
        if step is None:
            files.send_kill(files.read_pids(f"{self._trees.freezer}/init/cgroup.procs"))
        return count

    def await_dead(self, step: int | None = None, *, timeout_s: float = 0.5) -> bool:
        """See the contract. v1 has no event for it, so the groups are read every few milliseconds."""
        deadline = time.monotonic() + timeout_s
        while self._alive(step):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    def freeze(self, step: int | None = None) -> None:
        """See the contract."""
        self._frozen.add(step)
        for one in self._each(step):
            self._set_state(one, "FROZEN")

    def thaw(self, step: int | None = None) -> None:
        """See the contract."""
        if step is None:
            self._frozen.clear()
        else:
            self._frozen.discard(step)
        for one in self._each(step):
            self._set_state(one, "THAWED")

    def usage(self, step: int | None = None) -> Usage:
        """See the contract."""
        accounts = self._trees.cpuacct
        if step is not None:
            cpu_ns = files.read_int(f"{accounts}/s{step}/cpuacct.usage") if accounts else None
            return Usage(cpu_ns=cpu_ns, pids=len(files.read_pids(f"{self._trees.freezer}/s{step}/tasks")))
        total = self._quotas.usage()
        inside = len(files.read_pids(f"{self._trees.freezer}/init/tasks"))
        return Usage(
            cpu_ns=files.read_int(f"{accounts}/cpuacct.usage") if accounts else None,
            memory_bytes=total.memory_bytes,
            memory_peak_bytes=total.memory_peak_bytes,
            oom_kills=total.oom_kills,
            pids=len(self.pids()) if total.pids is None else max(0, total.pids - inside),
        )

    def remove(self) -> None:
        """See the contract."""
        self.kill()
        self.await_dead(timeout_s=2.0)
        for tree in self._trees.each():
            quota1.remove_tree(tree)
        self._quotas.remove()

    def _alive(self, step: int | None) -> list[int]:
        inside = files.read_pids(f"{self._trees.freezer}/init/cgroup.procs") if step is None else []
        return [*self.pids(step), *inside]

    def _each(self, step: int | None) -> list[int]:
        return sorted(self._steps) if step is None else [step] if step in self._steps else []

    def _put(self, pid: int, name: str) -> None:
        for tree in self._trees.each():
            try:
                files.write_text(f"{tree}/{name}/cgroup.procs", str(pid))
            except OSError as error:
                raise SandboxError(f"process {pid} cannot be moved to {tree}/{name}: {error.strerror}") from error

    def _set_state(self, step: int, state: str) -> None:
        path = f"{self._trees.freezer}/s{step}/freezer.state"
        deadline = time.monotonic() + 0.5
        files.write_text(path, state)
        # FREEZING until every task stands; writing again makes the kernel look once more.
        while files.read_text(path).strip() != state and time.monotonic() < deadline:
            time.sleep(0.001)
            files.write_text(path, state)


class V1Driver:
    """Cells below ``<freezer mount>/<prefix>`` and the like."""

    name = "v1"

    def __init__(self, freezer: str, cgroup: str, cpuacct: str | None, quotas: Quotas1) -> None:
        """Directories ``<mount>/<prefix>``, which exist; ``cgroup`` is the name of the freezer one in ``/proc/PID/cgroup``."""
        self._freezer = freezer
        self._cgroup = cgroup
        self._cpuacct = cpuacct
        self._quotas = quotas

    def probe(self) -> dict[str, str]:
        """See the contract."""
        report = attempt_leaf(self)
        if report["cgroup.attribution"] == "enforced":
            report["cgroup.attribution"] = (
                "degraded: sockets carry no cgroup id on cgroup v1; mount cgroup2 (mount -t cgroup2 none /sys/fs/cgroup/unified)"
            )
        for controller in ("cpu", "memory", "pids"):
            error = missing_quota(_limit_of(controller), frozenset(self._quotas.prefixes))
            report[f"cgroup.{controller}"] = f"missing: {error}" if error else "enforced"
        return report

    def make(self, cell: str, limits: Limits) -> V1Group:
        """See the contract."""
        if error := missing_quota(limits, frozenset(self._quotas.prefixes)):
            raise error
        quotas = self._quotas.make(cell, limits)
        trees = _Trees(f"{self._freezer}/{cell}", self._cpuacct and f"{self._cpuacct}/{cell}")
        try:
            return V1Group(trees, f"{self._cgroup}/{cell}", quotas)
        except SandboxError:
            quotas.remove()
            for tree in trees.each():
                quota1.remove_tree(tree)
            raise

    def sweep(self) -> int:
        """See the contract."""
        count = 0
        for cell in sorted(Path(self._freezer).glob("*/")):
            for group in files.walk_bottom_up(str(cell)):
                with contextlib.suppress(FileNotFoundError):
                    files.write_text(f"{group}/freezer.state", "THAWED")
            count += quota1.remove_tree(str(cell))
        for cell in sorted(Path(self._cpuacct).glob("*/")) if self._cpuacct else []:
            count += quota1.remove_tree(str(cell))
        return count + self._quotas.sweep()

    def close(self) -> None:
        """See the contract."""
        self.sweep()
        for path in filter(None, (self._freezer, self._cpuacct)):
            files.remove_dir(path)
        self._quotas.close()


def _limit_of(controller: str) -> Limits:
    return Limits(
        cpus=1.0 if controller == "cpu" else None,
        memory_bytes=64 << 20 if controller == "memory" else None,
        pids=16 if controller == "pids" else None,
    )
