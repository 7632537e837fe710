"""Other sandboxes, driven as their users drive them: one command line for each life and each command.

Root file systems are made on the fly from this machine's own tree, read-only, so that everyone runs
the same ``true``. A peer that is not installed, or does not run here, is said to be missing and why.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vallum.arena.figures import Figure, missing, summarise

_TOP_LINKS = ("bin", "sbin", "lib", "lib32", "lib64")
_NAMESPACES = ("pid", "network", "ipc", "uts", "mount")
COMMAND_TIMEOUT_S = 60.0
MANY = 50
"""How many are started at once."""


@dataclass(frozen=True)
class PeerKind:
    """A peer and how to have it."""

    name: str
    install: str
    is_oci: bool
    options: tuple[str, ...] = ()


PEERS = (
    PeerKind("bwrap", "apt-get install bubblewrap", False),
    PeerKind("runc", "apt-get install runc", True),
    PeerKind("crun", "apt-get install crun", True),
    PeerKind("runsc", "apt-get install runsc, or gvisor.dev", True, ("--network=none", "--ignore-cgroups")),
)


@dataclass(frozen=True)
class Names:
    """What the figures are called."""

    create: str
    execute: str
    destroy: str
    at_once: str


class Missing(Exception):
    """The peer cannot be measured here."""


class Peer:
    """One peer with a directory of its own."""

    def __init__(self, kind: PeerKind, directory: Path) -> None:
        self.kind = kind
        self._directory = directory
        self._bundle = directory / "bundle"
        self._base = [kind.name, *kind.options, "--root", str(directory / "state")] if kind.is_oci else [kind.name]

    async def measure(self, repetitions: int, names: Names) -> list[Figure]:
        """Its figures, or why there are none."""
        subject = self.kind.name
        if shutil.which(subject) is None:
            return [missing(names.create, subject, "ms", f"not installed: {self.kind.install}")]
        try:
            if self.kind.is_oci:
                self._make_bundle()
            once = self._run_once if self.kind.is_oci else self._bwrap
            figures = [summarise(names.create, subject, "ms", await self._time(repetitions, once))]
            figures.append(summarise(names.at_once, subject, "ms", [await self._time_many(once)]))
            return figures + (await self._measure_running(repetitions, names) if self.kind.is_oci else [])
        except Missing as error:
            return [missing(names.create, subject, "ms", str(error))]

    async def _time_many(self, make: Callable[[], list[str]]) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(self._call(make()) for _ in range(MANY)))
        return (time.perf_counter() - started) * 1000 / MANY

    async def _time(self, repetitions: int, make: Callable[[], list[str]]) -> list[float]:
        await self._call(make())
        samples: list[float] = []
        for _ in range(repetitions):
            argv = make()
            started = time.perf_counter()
            await self._call(argv)
            samples.append((time.perf_counter() - started) * 1000)
        return samples

    async def _measure_running(self, repetitions: int, names: Names) -> list[Figure]:
        self._write_config(["sleep", "600"])
        name = _make_id()
        await self._call([*self._base, "run", "--detach", "--bundle", str(self._bundle), name])
        try:
            executed = await self._time(repetitions, lambda: [*self._base, "exec", name, "/usr/bin/true"])
        finally:
            started = time.perf_counter()
            await self._call([*self._base, "delete", "--force", name])
            gone = (time.perf_counter() - started) * 1000
        return [
            summarise(names.execute, self.kind.name, "ms", executed),
            summarise(names.destroy, self.kind.name, "ms", [gone]),
        ]

    def _run_once(self) -> list[str]:
        return [*self._base, "run", "--bundle", str(self._bundle), _make_id()]

    def _bwrap(self) -> list[str]:
        links = [
            word
            for name in _TOP_LINKS
            if Path("/", name).is_symlink()
            for word in ("--symlink", f"usr/{name}", f"/{name}")
        ]
        return [
            "bwrap",
            "--unshare-all",
            "--die-with-parent",
            "--ro-bind",
            "/usr",
            "/usr",
            *links,
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "true",
        ]

    def _make_bundle(self) -> None:
        root = self._bundle / "rootfs"
        for name in ("usr", "proc", "dev", "tmp"):
            (root / name).mkdir(parents=True)
        for name in _TOP_LINKS:
            if Path("/", name).is_symlink():
                (root / name).symlink_to(f"usr/{name}")
        self._write_config(["/usr/bin/true"])

    def _write_config(self, argv: list[str]) -> None:
        config: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "process": {"terminal": False, "user": {"uid": 0, "gid": 0}, "args": argv, "env": ["PATH=/usr/bin:/bin"], "cwd": "/", "noNewPrivileges": True},
            "root": {"path": "rootfs", "readonly": True},
            "hostname": "peer",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
            ],
            "linux": {"namespaces": [{"type": name} for name in _NAMESPACES]},
        }  # fmt: skip
        if os.geteuid() != 0:
            identity = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
            config["linux"]["namespaces"].append({"type": "user"})
            config["linux"] |= {"uidMappings": identity, "gidMappings": [{**identity[0], "hostID": os.getegid()}]}
        (self._bundle / "config.json").write_text(json.dumps(config), "utf-8")

    async def _call(self, argv: list[str]) -> None:
        log = self._directory / f"log-{secrets.token_hex(4)}"
        with log.open("wb") as target:  # a detached container keeps what it is given, so no pipe
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=target, stderr=target
            )
        try:
            status = await asyncio.wait_for(process.wait(), COMMAND_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Missing(f"does not run here: `{argv[0]}` took more than {COMMAND_TIMEOUT_S:.0f} s") from None
        if status != 0:
            said = log.read_text("utf-8", "replace").strip().splitlines()
            raise Missing(f"does not run here: {said[-1][:200] if said else f'exit code {status}'}")


def _make_id() -> str:
    return f"vallum-bench-{secrets.token_hex(4)}"


@asynccontextmanager
async def open_peer(kind: PeerKind) -> AsyncIterator[Peer]:
    """A peer with a temporary directory that goes with it."""
    with tempfile.TemporaryDirectory(prefix="vallum-peer-") as directory:
        yield Peer(kind, Path(directory))


def describe_machine() -> str:
    """Kernel, processors and Python, in a line."""
    return f"{platform.system()} {platform.release()}, {os.cpu_count()} processors, Python {platform.python_version()}"
