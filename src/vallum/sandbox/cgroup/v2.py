"""The driver for cgroup v2 alone: leaves and quotas in one hierarchy."""

from __future__ import annotations

import os
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.cgroup import files, group2
from vallum.sandbox.cgroup.quota1 import CellQuotas1, missing_quota
from vallum.sandbox.cgroup.trial import attempt_leaf


class V2Driver:
    """Cells below ``<path>``, one directory each."""

    name = "v2"

    def __init__(self, path: str, cgroup: str, controllers: frozenset[str]) -> None:
        """``path`` is ``<base>/<prefix>`` and exists, ``cgroup`` is its name in ``/proc/PID/cgroup``,
        ``controllers`` those of cpu, memory and pids that its children have."""
        self._path = path
        self._cgroup = cgroup
        self._controllers = controllers

    def probe(self) -> dict[str, str]:
        """See the contract. Makes a cell, sets every quota, freezes and kills a real process in it."""
        report = attempt_leaf(self)
        for controller in ("cpu", "memory", "pids"):
            report[f"cgroup.{controller}"] = self._attempt_quota(controller)
        return report

    def make(self, cell: str, limits: Limits) -> group2.V2Group:
        """See the contract."""
        if error := missing_quota(limits, self._quota_names()):
            raise error
        quotas = self._make_quotas(cell, limits)
        path = f"{self._path}/{cell}"
        try:
            group = group2.V2Group(path, f"{self._cgroup}/{cell}", controllers=self._controllers, quotas=quotas)
        except (SandboxError, OSError):
            if quotas:
                quotas.remove()
            raise
        try:
            group2.set_limits(path, limits, self._controllers)
        except SandboxError:
            group.remove()
            raise
        return group

    def sweep(self) -> int:
        """See the contract."""
        return sum(group2.remove_tree(str(cell)) for cell in sorted(Path(self._path).glob("*/")))

    def close(self) -> None:
        """See the contract."""
        self.sweep()
        files.remove_dir(self._path)

    def _quota_names(self) -> frozenset[str]:
        return self._controllers

    def _make_quotas(self, cell: str, limits: Limits) -> CellQuotas1 | None:
        return None

    def _attempt_quota(self, controller: str) -> str:
        limits = {
            "cpu": Limits(cpus=1.0, memory_bytes=None, pids=None),
            "memory": Limits(memory_bytes=64 << 20, pids=None),
            "pids": Limits(memory_bytes=None, pids=16),
        }[controller]
        try:
            self.make(f"probe-{os.getpid()}-{controller}", limits).remove()
        except SandboxError as error:
            return f"missing: {error}"
        return "enforced"


def enable_controllers(base: str, prefix: str, *, own: bool) -> frozenset[str]:
    """Let ``<base>/<prefix>``'s children have cpu, memory and pids, as far as the kernel grants it.

    ``own`` says that ``base`` is the caller's own cgroup. Then a base that still has processes, which v2 does
    not allow beside controllers for children, is emptied into ``<base>/vallum-host`` first, as systemd asks of
    the owner of a delegated subtree.
    """
    enabled = set()
    for controller in ("cpu", "memory", "pids"):
        there = _enable(base, controller) or (own and _move_aside(base) and _enable(base, controller))
        if there and _enable(f"{base}/{prefix}", controller):
            enabled.add(controller)
    return frozenset(enabled)


def _enable(path: str, controller: str) -> bool:
    try:
        if controller in files.read_text(f"{path}/cgroup.subtree_control").split():
            return True
        if controller not in files.read_text(f"{path}/cgroup.controllers").split():
            return False
        files.write_text(f"{path}/cgroup.subtree_control", f"+{controller}")
    except OSError:
        return False
    return True


def _move_aside(base: str) -> bool:
    target = f"{base}/vallum-host"
    try:
        files.make_dir(target)
        for pid in files.read_pids(f"{base}/cgroup.procs"):
            files.write_text(f"{target}/cgroup.procs", str(pid))
    except (OSError, SandboxError):
        return False
    return True
