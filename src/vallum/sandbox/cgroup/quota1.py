"""Quotas of a cell on cgroup v1 controllers: one directory a controller, PID 1 enters all, its children inherit.

Steps have no v1 groups of their own on a hybrid machine: only ``CLONE_INTO_CGROUP`` puts a process into its
group at birth, and it knows v2 alone; moving each command by pid would cost a grace period and leave a gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.base import Usage
from vallum.sandbox.cgroup import files

PERIOD_US = 100_000

NAMES = {"cpu": "cpu", "memory": "memory", "pids": "pids"}
"""Controllers that carry quotas; the value is what a person calls it."""


@dataclass(frozen=True)
class Quotas1:
    """The v1 controllers usable here."""

    prefixes: dict[str, str]
    """Controller -> our directory ``<mount>/<prefix>``."""

    def make(self, cell: str, limits: Limits) -> CellQuotas1:
        """Make the cell's groups and write its quotas. Nothing is left behind when one fails.

        Raises:
            SandboxError: a quota cannot be set.
        """
        groups = CellQuotas1({name: f"{prefix}/{cell}" for name, prefix in self.prefixes.items()})
        try:
            groups.write(limits)
        except SandboxError:
            groups.remove()
            raise
        return groups

    def sweep(self) -> int:
        """Kill and remove everything under our prefixes. Returns how many groups."""
        count = 0
        for prefix in self.prefixes.values():
            for cell in sorted(Path(prefix).glob("*/")):
                count += remove_tree(str(cell))
        return count

    def close(self) -> None:
        """Remove our prefixes, which are empty after :meth:`sweep`."""
        for prefix in self.prefixes.values():
            files.remove_dir(prefix)


class CellQuotas1:
    """v1 groups of one cell."""

    def __init__(self, paths: dict[str, str]) -> None:
        """``paths``: controller -> directory, not yet made."""
        self._paths = paths

    def write(self, limits: Limits) -> None:
        """Make the directories and set the limits.

        Raises:
            SandboxError: the kernel refuses.
        """
        for path in self._paths.values():
            files.make_dir(path)
        if limits.cpus is not None and (cpu := self._paths.get("cpu")):
            files.set_quota(f"{cpu}/cpu.cfs_period_us", str(PERIOD_US), "cpu")
            files.set_quota(f"{cpu}/cpu.cfs_quota_us", str(int(limits.cpus * PERIOD_US)), "cpu")
        if limits.memory_bytes is not None and (memory := self._paths.get("memory")):
            files.set_quota(f"{memory}/memory.limit_in_bytes", str(limits.memory_bytes), "memory")
            memsw = Path(memory) / "memory.memsw.limit_in_bytes"
            if memsw.exists():
                files.set_quota(str(memsw), str(limits.memory_bytes), "memory and swap")
        if limits.pids is not None and (pids := self._paths.get("pids")):
            # One more, for PID 1.
            files.set_quota(f"{pids}/pids.max", str(limits.pids + 1), "pids")

    def enter_paths(self) -> list[str]:
        """``cgroup.procs`` of each controller."""
        return [f"{path}/cgroup.procs" for path in self._paths.values()]

    def pids(self) -> list[int]:
        """Every process of the cell, PID 1 included."""
        return sorted({pid for path in self._paths.values() for pid in files.read_pids(f"{path}/cgroup.procs")})

    def usage(self) -> Usage:
        """Memory, pids (PID 1 included) and OOM kills of the cell; None for what has no controller here."""
        memory, pids = self._paths.get("memory"), self._paths.get("pids")
        return Usage(
            memory_bytes=files.read_int(f"{memory}/memory.usage_in_bytes") if memory else None,
            memory_peak_bytes=files.read_int(f"{memory}/memory.max_usage_in_bytes") if memory else None,
            oom_kills=files.read_pairs(f"{memory}/memory.oom_control").get("oom_kill") if memory else None,
            pids=files.read_int(f"{pids}/pids.current") if pids else None,
        )

    def remove(self) -> None:
        """Kill what is left, remove the directories.

        Raises:
            SandboxError: a group stays busy.
        """
        for path in self._paths.values():
            remove_tree(path)


def remove_tree(path: str) -> int:
    """Kill everything at and below a v1 group and remove it. Returns how many directories there were.

    Raises:
        SandboxError: a process does not end within two seconds.
    """
    groups = files.walk_bottom_up(path)
    for group in groups:
        # Without the freezer a fork bomb can outrun one sweep, not several: each round only has what the last one missed.
        files.kill_without_kernel_help(
            lambda procs=f"{group}/cgroup.procs": files.read_pids(procs),  # type: ignore[misc]
            lambda: None,
            lambda: None,
        )
        files.remove_dir(group)
    return len(groups)


def missing_quota(limits: Limits, available: frozenset[str]) -> SandboxError | None:
    """The error for the first quota that is asked for and has no controller here; None when all can be set. Pure."""
    for controller, value in (("cpu", limits.cpus), ("memory", limits.memory_bytes), ("pids", limits.pids)):
        if value is not None and controller not in available:
            return SandboxError(
                f"a {controller} quota was asked for, but no writable cgroup {controller} controller is here; "
                f"run as root or in a subtree delegated with it (systemd: Delegate={controller}), or ask for no {controller} limit"
            )
    return None
