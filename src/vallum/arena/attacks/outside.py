"""What lies outside of a cell, before and after an attack: canaries that are there to be touched, and the host's settings.

Covered: settings of the kernel, host name, clock, mounts, modules, swap, a directory of files, a process with its
priority and cgroup, an abstract and a named Unix socket that count who connects. Not covered: what leaves no trace
here (side channels, load).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT = (
    "kernel/core_pattern", "kernel/modprobe", "kernel/hostname", "kernel/domainname", "kernel/sysrq", "kernel/panic",
    "kernel/poweroff_cmd", "kernel/randomize_va_space", "kernel/kptr_restrict", "kernel/dmesg_restrict",
    "kernel/unprivileged_bpf_disabled", "kernel/perf_event_paranoid", "kernel/threads-max", "kernel/pid_max",
    "kernel/yama/ptrace_scope", "kernel/core_uses_pid", "fs/suid_dumpable", "fs/protected_symlinks", "fs/file-max",
    "fs/protected_hardlinks", "vm/overcommit_memory", "vm/swappiness", "vm/mmap_min_addr", "vm/panic_on_oom",
    "net/ipv4/ip_forward", "net/ipv4/tcp_fin_timeout", "net/ipv4/ip_unprivileged_port_start",
    "net/ipv6/conf/all/disable_ipv6", "user/max_user_namespaces",
)  # fmt: skip
CLOCK_SLACK_S = 5.0
_SLEEP = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\ntime.sleep(3600)"


class Canaries:
    """Made before the attacks, looked at after each, gone at the end. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        """Args: directory: ours; made world-readable, so that only the cell's walls protect what is in it."""
        self._directory = directory
        self._secret = secrets.token_hex(16)
        self._abstract = f"vallum-canary-{secrets.token_hex(6)}"

    def __enter__(self) -> Canaries:
        """Make them."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o755)
        for name in ("secret", "target", "data"):
            (self._directory / name).write_text(self._secret)
            (self._directory / name).chmod(0o666)
        self._listeners = []
        for address in ("\0" + self._abstract, str(self._directory / "socket")):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen(8)
            listener.setblocking(False)
            self._listeners.append(listener)
        (self._directory / "socket").chmod(0o666)
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-I", "-c", _SLEEP], stdin=subprocess.DEVNULL, env={"VALLUM_CANARY": self._secret}
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Take them away."""
        self._process.kill()
        self._process.wait()
        for listener in self._listeners:
            listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the attackers are told, as if they had found it out."""
        return {
            "canary_pid": self._process.pid,
            "canary_dir": str(self._directory),
            "canary_secret": self._secret,
            "canary_abstract": self._abstract,
            "node_uid": os.geteuid(),
            "ipc_key": 0x56414C4C,
        }

    def look(self) -> dict[str, str]:
        """Everything that must be the same after an attack."""
        seen = {name: _read(f"/proc/sys/{name}") for name in KEPT}
        seen["host name"] = socket.gethostname()
        seen["swaps"] = _read("/proc/swaps")
        seen["modules"] = " ".join(sorted(line.split()[0] for line in _read("/proc/modules").splitlines()))
        for path in sorted(self._directory.iterdir()):
            state = path.lstat()
            content = path.read_text() if path.is_file() else ""
            seen[f"canary file {path.name}"] = f"{state.st_mode:o} {state.st_uid} {state.st_mtime_ns} {content}"
        pid = self._process.pid
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        seen["canary process"] = (
            " ".join(["alive" if fields[0] in "RSD" else fields[0], *fields[15:17]]) if fields else "gone"
        )
        for name in ("cgroup", "oom_score_adj", "limits", "comm"):
            seen[f"canary {name}"] = _read(f"/proc/{pid}/{name}")
        seen["canary sockets"] = str(sum(_count(listener) for listener in self._listeners))
        seen["canary IPC"] = str(
            any(str(0x56414C4C) in _read(f"/proc/sysvipc/{kind}") for kind in ("shm", "sem", "msg"))
        )
        return seen

    @staticmethod
    def mounts() -> set[str]:
        """The host's mounts at the root and in /proc, /sys and /dev; elsewhere others may mount as they like."""
        lines = _read("/proc/self/mountinfo").splitlines()
        return {
            line for line in lines if line.split()[4].startswith(("/proc", "/sys", "/dev")) or line.split()[4] == "/"
        }

    @staticmethod
    def clock_offset_s() -> float:
        """Wall clock less monotonic clock: jumps when somebody sets the time."""
        return time.time() - time.monotonic()


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What was changed, one sentence each. Pure."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: was {before.get(name, 'not there')[:80]!r}, is {after.get(name, 'not there')[:80]!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return "unreadable"


def _count(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return count
        connection.close()
        count += 1
