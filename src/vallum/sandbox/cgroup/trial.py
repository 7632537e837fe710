"""Attempting what a driver promises, on a real process: ``cat`` reading a pipe that ends with us."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.cgroup import files
from vallum.sandbox.cgroup.base import Driver

_NO_LIMITS = Limits(memory_bytes=None, pids=None)


@contextmanager
def hold_process() -> Iterator[int]:
    """A child that does nothing until it is killed or we end. Yields its pid; reaped on leaving.

    Raises:
        SandboxError: ``cat`` cannot be started.
    """
    read_end, write_end = os.pipe()
    try:
        pid = os.posix_spawn(
            _find_cat(),
            ["cat"],
            {},
            file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), (os.POSIX_SPAWN_CLOSE, write_end)],
        )
    except OSError as error:
        raise SandboxError(f"a process to try cgroups with cannot be started: {error.strerror}") from error
    finally:
        os.close(read_end)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(write_end)
        os.waitpid(pid, 0)


def may_host(path: str) -> bool:
    """Whether cells can live below the v2 group or v1 group ``path``: make a group there and move a process in."""
    group = f"{path}/probe-{os.getpid()}"
    home = Path(group)
    try:
        home.mkdir()
    except OSError:
        return False
    try:
        with hold_process() as pid:
            files.write_text(f"{group}/cgroup.procs", str(pid))
            moved = pid in files.read_pids(f"{group}/cgroup.procs")
        files.remove_dir(group)
    except OSError:
        home.rmdir()
        return False
    return moved


def attempt_leaf(driver: Driver) -> dict[str, str]:
    """``cgroup.attribution``, ``cgroup.kill`` and ``cgroup.freeze``, each by having done it to a process."""
    controls = ("cgroup.attribution", "cgroup.freeze", "cgroup.kill")
    try:
        group = driver.make(f"probe-{os.getpid()}", _NO_LIMITS)
    except SandboxError as error:
        return dict.fromkeys(controls, f"missing: {error}")
    report: dict[str, str] = {}
    try:
        with hold_process() as pid:
            group.open_leaf(7)
            group.move(pid, 7)
            known = group.step_of_pid(pid) == 7 and group.pids(7) == [pid]
            report["cgroup.attribution"] = (
                "enforced"
                if known
                else "missing: a process moved into a leaf is not seen there; check the cgroup mounts"
            )
            group.freeze(7)
            group.thaw(7)
            report["cgroup.freeze"] = "enforced"
            group.kill(7)
            gone = group.await_dead(7, timeout_s=1.0)
            report["cgroup.kill"] = "enforced" if gone else "missing: a killed process stays; see the kernel log"
    except (SandboxError, OSError) as error:
        for control in controls:
            report.setdefault(control, f"missing: {error}")
    finally:
        group.remove()
    return report


def _find_cat() -> str:
    return next((path for path in ("/bin/cat", "/usr/bin/cat") if Path(path).exists()), "/bin/cat")
