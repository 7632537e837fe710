"""cgroup v2: leaves, kill, freeze and accounting of steps; quotas where the controllers are there too.

Which files ``clone3(CLONE_INTO_CGROUP)`` checks (kernel/cgroup/cgroup.c, ``cgroup_css_set_fork``): write
permission on ``cgroup.procs`` of the destination and of the common ancestor of source and destination, and,
on a mount with ``nsdelegate``, that both lie below the root of the caller's cgroup namespace.

Covered: a process cannot leave its leaf (a guest sees no cgroupfs and owns no file of it); a forking
tree dies as a whole (``cgroup.kill``); a frozen cell still dies with its owner (PID 1 is never frozen).
Not covered: kernels before 5.7 have no CLONE_INTO_CGROUP and are not supported.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.base import Usage
from vallum.sandbox.cgroup import files
from vallum.sandbox.cgroup.base import LEAF_GRACE_S, Leaf
from vallum.sandbox.cgroup.mounts import parse_membership
from vallum.sandbox.cgroup.quota1 import CellQuotas1

PERIOD_US = 100_000
"""Period of CPU quotas, the kernel's default."""

_PRUNE_ABOVE = 32
_PRUNE_AT_ONCE = 4
"""Leaves looked at when another is opened: more than one, so that their number falls, and few, so that a step opens fast."""


@dataclass
class _Leaf:
    """One leaf of ours and what is known of it."""

    step: int
    name: str
    fd: int
    id: int
    opened_s: float = 0.0


class V2Group:
    """The cgroups of one cell in the v2 hierarchy; quotas that v2 does not carry are in ``quotas``."""

    def __init__(self, path: str, name: str, *, controllers: frozenset[str], quotas: CellQuotas1 | None) -> None:
        """``path`` is the cell's directory (made here), ``name`` the same as ``/proc/PID/cgroup`` shows it."""
        self._path = path
        self._name = name
        self._controllers = controllers
        self._quotas = quotas
        self._leaves: dict[str, _Leaf] = {}
        self._newest: dict[int, _Leaf] = {}
        self._by_step: dict[int, list[_Leaf]] = {}
        self._ready: dict[int, _Leaf] = {}
        self._count: dict[int, int] = {}
        self._step_of_id: dict[int, int] = {}
        self._retired_cpu_ns: dict[int, int] = {}
        self._frozen: set[int | None] = set()
        self._owner: int | None = None
        self._settled = False
        files.make_dir(path)
        files.make_dir(f"{path}/init")
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    # Who belongs where

    def enter_paths(self) -> list[str]:
        """See :class:`~vallum.sandbox.cgroup.base.CellGroup`."""
        procs = f"{self._path}/init/cgroup.procs" if self._settled else f"{self._path}/cgroup.procs"
        return [procs, *(self._quotas.enter_paths() if self._quotas else [])]

    def delegate(self, uid: int) -> None:
        """See the contract."""
        self._owner = uid
        self._give(f"{self._path}/cgroup.procs")
        for leaf in (*self._leaves.values(), *self._ready.values()):
            self._give(f"{self._path}/{leaf.name}/cgroup.procs")

    def open_leaf(self, step: int) -> Leaf:
        """See the contract. About 60 us: mkdir, open, stat, and chown where delegated; 5 us for one that was prepared."""
        if not self._settled:
            self._settle()
        if len(self._leaves) > _PRUNE_ABOVE:
            self._prune()
        leaf = self._ready.pop(step, None) or self._make_leaf(step)
        leaf.opened_s = time.monotonic()
        self._leaves[leaf.name] = leaf
        self._newest[step] = leaf
        self._by_step.setdefault(step, []).append(leaf)
        self._step_of_id[leaf.id] = step
        if None in self._frozen or step in self._frozen:
            files.write_text(f"{self._path}/{leaf.name}/cgroup.freeze", "1")
        return Leaf(cgroup_id=leaf.id, fd=leaf.fd)

    def prepare_leaf(self, step: int) -> Leaf | None:
        """See the contract."""
        if not self._settled:
            self._settle()
        if step in self._newest:
            return None
        leaf = self._ready.get(step)
        if leaf is None:
            leaf = self._ready[step] = self._make_leaf(step)
        return Leaf(cgroup_id=leaf.id, fd=leaf.fd)

    def _make_leaf(self, step: int) -> _Leaf:
        count = self._count.get(step, 0)
        name = f"s{step}" if count == 0 else f"s{step}.{count}"
        try:
            os.mkdir(name, 0o755, dir_fd=self._fd)
            fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise SandboxError(f"the cgroup of step {step} cannot be made in {self._path}: {error.strerror}") from error
        self._count[step] = count + 1
        if self._owner is not None:
            self._chown(f"{self._path}/{name}/cgroup.procs", self._owner)
        return _Leaf(step=step, name=name, fd=fd, id=os.fstat(fd).st_ino)

    def move(self, pid: int, step: int) -> None:
        """See the contract. Costs one RCU grace period (milliseconds) unless the mount has ``favordynmods``."""
        if step not in self._newest:
            self.open_leaf(step)
        self._put(pid, self._newest[step].name)

    def park(self, pid: int) -> None:
        """See the contract."""
        self._put(pid, "init")

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """See the contract. Leaves that are gone are remembered: a socket outlives the process that made it."""
        return self._step_of_id.get(cgroup_id)

    def step_of_pid(self, pid: int) -> int | None:
        """See the contract."""
        try:
            name = parse_membership(files.read_text(f"/proc/{pid}/cgroup"))
        except OSError:
            return None
        if name is None or not name.startswith(self._name + "/"):
            return None
        return parse_leaf(name[len(self._name) + 1 :])

    def pids(self, step: int | None = None) -> list[int]:
        """See the contract."""
        return [
            pid for leaf in self._leaves_of(step) for pid in files.read_pids(f"{self._path}/{leaf.name}/cgroup.procs")
        ]

    # Acting on them

    def kill(self, step: int | None = None) -> int:
        """See the contract."""
        count = len(self.pids(step))
        groups = [self._path] if step is None else [f"{self._path}/{leaf.name}" for leaf in self._leaves_of(step)]
        for group in groups:
            kill_group(group)
        return count

    def await_dead(self, step: int | None = None, *, timeout_s: float = 0.5) -> bool:
        """See the contract."""
        deadline = time.monotonic() + timeout_s
        groups = [self._path] if step is None else [f"{self._path}/{leaf.name}" for leaf in self._leaves_of(step)]
        return all(
            files.await_event(f"{group}/cgroup.events", "populated", 0, deadline - time.monotonic()) for group in groups
        )

    def freeze(self, step: int | None = None) -> None:
        """See the contract."""
        self._frozen.add(step)
        leaves = list(self._leaves_of(step))
        for leaf in leaves:
            files.write_text(f"{self._path}/{leaf.name}/cgroup.freeze", "1")
        deadline = time.monotonic() + 0.5
        for leaf in leaves:
            # "frozen" stays 0 for an empty group: there is nothing to wait for there.
            if files.read_pids(f"{self._path}/{leaf.name}/cgroup.procs"):
                files.await_event(f"{self._path}/{leaf.name}/cgroup.events", "frozen", 1, deadline - time.monotonic())

    def thaw(self, step: int | None = None) -> None:
        """See the contract. Thawing one step of a frozen cell thaws just that step."""
        if step is None:
            self._frozen.clear()
        else:
            self._frozen.discard(step)
        for leaf in self._leaves_of(step):
            files.write_text(f"{self._path}/{leaf.name}/cgroup.freeze", "0")

    # Counting

    def usage(self, step: int | None = None) -> Usage:
        """See the contract."""
        return self._usage_of_cell() if step is None else self._usage_of_step(step)

    def remove(self) -> None:
        """See the contract."""
        for leaf in (*self._leaves.values(), *self._ready.values()):
            _close(leaf)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        remove_tree(self._path)
        if self._quotas:
            self._quotas.remove()

    def _usage_of_cell(self) -> Usage:
        cpu_us = files.read_pairs(f"{self._path}/cpu.stat").get("usage_usec")
        quotas = self._quotas.usage() if self._quotas else Usage()
        memory, peak, ooms, pids = quotas.memory_bytes, quotas.memory_peak_bytes, quotas.oom_kills, quotas.pids
        if "memory" in self._controllers:
            memory = files.read_int(f"{self._path}/memory.current")
            peak = files.read_int(f"{self._path}/memory.peak")
            ooms = files.read_pairs(f"{self._path}/memory.events").get("oom_kill")
        if "pids" in self._controllers:
            pids = files.read_int(f"{self._path}/pids.current")
        if pids is None:
            pids = sum(self._threads(leaf.name) for leaf in self._leaves.values())
        else:
            pids = max(0, pids - self._threads("init"))
        return Usage(
            cpu_ns=None if cpu_us is None else cpu_us * 1000,
            memory_bytes=memory,
            memory_peak_bytes=peak,
            pids=pids,
            oom_kills=ooms,
        )

    def _usage_of_step(self, step: int) -> Usage:
        paths = [f"{self._path}/{leaf.name}" for leaf in self._leaves_of(step)]
        cpu_us = sum(files.read_pairs(f"{path}/cpu.stat").get("usage_usec", 0) for path in paths)
        with_memory = "memory" in self._controllers
        peaks = [files.read_int(f"{path}/memory.peak") for path in paths] if with_memory else []
        return Usage(
            cpu_ns=cpu_us * 1000 + self._retired_cpu_ns.get(step, 0),
            memory_bytes=sum(files.read_int(f"{path}/memory.current") or 0 for path in paths) if with_memory else None,
            memory_peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
            pids=sum(self._threads(leaf.name) for leaf in self._leaves_of(step)),
            oom_kills=sum(files.read_pairs(f"{path}/memory.events").get("oom_kill", 0) for path in paths)
            if with_memory
            else None,
        )

    def _threads(self, name: str) -> int:
        return len(files.read_pids(f"{self._path}/{name}/cgroup.threads"))

    # Inner workings

    def _leaves_of(self, step: int | None) -> Iterator[_Leaf]:
        return iter(list(self._leaves.values()) if step is None else self._by_step.get(step, []))

    def _settle(self) -> None:
        """Move PID 1 from the cell's directory into ``init``, then let leaves count memory and pids each."""
        for pid in files.read_pids(f"{self._path}/cgroup.procs"):
            # A short-lived child of PID 1 (a file read, say) may have ended since.
            with contextlib.suppress(ProcessLookupError):
                files.write_text(f"{self._path}/init/cgroup.procs", str(pid))
        for controller in ("memory", "pids"):
            if controller in self._controllers:
                files.set_quota(f"{self._path}/cgroup.subtree_control", f"+{controller}", controller)
        self._settled = True

    def _prune(self) -> None:
        """Remove a few of the oldest empty leaves, keeping what they have used, so that a long episode does not fill the kernel."""
        before_s = time.monotonic() - LEAF_GRACE_S
        for leaf in list(itertools.islice(self._leaves.values(), _PRUNE_AT_ONCE)):
            if leaf.opened_s >= before_s:
                return  # the others are younger still
            path = f"{self._path}/{leaf.name}"
            cpu_us = files.read_pairs(f"{path}/cpu.stat").get("usage_usec", 0)
            del self._leaves[leaf.name]
            try:
                Path(path).rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise SandboxError(f"the cgroup {path} cannot be removed: {error.strerror}") from error
                leaf.opened_s = time.monotonic()  # in use: to the end of the queue
                self._leaves[leaf.name] = leaf
                continue
            _close(leaf)
            self._by_step[leaf.step].remove(leaf)
            if not self._by_step[leaf.step]:
                del self._by_step[leaf.step]
            if self._newest.get(leaf.step) is leaf:
                del self._newest[leaf.step]
            self._retired_cpu_ns[leaf.step] = self._retired_cpu_ns.get(leaf.step, 0) + cpu_us * 1000

    def _give(self, path: str) -> None:
        if self._owner is not None and Path(path).stat().st_uid != self._owner:
            self._chown(path, self._owner)

    @staticmethod
    def _chown(path: str, owner: int) -> None:
        try:
            os.chown(path, owner, -1)
        except OSError as error:
            raise SandboxError(f"{path} cannot be given to user {owner}: {error.strerror}") from error

    def _put(self, pid: int, name: str) -> None:
        path = f"{self._path}/{name}/cgroup.procs"
        try:
            files.write_text(path, str(pid))
        except ProcessLookupError as error:
            raise SandboxError(f"process {pid} is gone, so it cannot be moved to {name}") from error
        except OSError as error:
            raise SandboxError(f"process {pid} cannot be moved to {path}: {error.strerror}") from error


def parse_leaf(name: str) -> int | None:
    """Step of a leaf's directory name (``s5``, ``s5.2``); None for ``init`` and anything else."""
    head, _, tail = name.partition(".")
    if head[:1] != "s" or not head[1:].isdigit() or (tail and not tail.isdigit()):
        return None
    return int(head[1:])


def set_limits(path: str, limits: Limits, controllers: frozenset[str]) -> None:
    """Write the quotas that v2 carries here. ``pids`` gets one more, for PID 1.

    Raises:
        SandboxError: the kernel refuses a value.
    """
    if limits.cpus is not None and "cpu" in controllers:
        files.set_quota(f"{path}/cpu.max", f"{int(limits.cpus * PERIOD_US)} {PERIOD_US}", "cpu")
    if limits.memory_bytes is not None and "memory" in controllers:
        files.set_quota(f"{path}/memory.max", str(limits.memory_bytes), "memory")
        if Path(f"{path}/memory.swap.max").exists():  # missing where the kernel counts no swap
            files.set_quota(f"{path}/memory.swap.max", "0", "memory")
    if limits.pids is not None and "pids" in controllers:
        files.set_quota(f"{path}/pids.max", str(limits.pids + 1), "pids")


def kill_group(path: str) -> None:
    """Kill every process at and below ``path``, frozen or not. A group that is gone is fine."""
    try:
        files.write_text(f"{path}/cgroup.kill", "1")
    except OSError as error:
        if not Path(path).is_dir():
            return
        if error.errno != errno.ENOENT:
            raise SandboxError(f"the processes of {path} cannot be killed: {error.strerror}") from error
        groups = files.walk_bottom_up(path)
        files.kill_without_kernel_help(
            lambda: [pid for group in groups for pid in files.read_pids(f"{group}/cgroup.procs")],
            lambda: _freeze_and_wait(path),
            lambda: files.write_text(f"{path}/cgroup.freeze", "0"),
        )


def remove_tree(path: str) -> int:
    """Kill everything at and below ``path`` and remove the directories. Returns how many there were.

    Raises:
        SandboxError: a process does not end within two seconds.
    """
    if not Path(path).is_dir():
        return 0
    kill_group(path)
    files.await_event(f"{path}/cgroup.events", "populated", 0, 2.0)
    groups = files.walk_bottom_up(path)
    for group in groups:
        files.remove_dir(group)
    return len(groups)


def _freeze_and_wait(path: str) -> None:
    files.write_text(f"{path}/cgroup.freeze", "1")
    files.await_event(f"{path}/cgroup.events", "frozen", 1, 0.2)


def _close(leaf: _Leaf) -> None:
    if leaf.fd >= 0:
        os.close(leaf.fd)
        leaf.fd = -1
