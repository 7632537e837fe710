"""The agent without walls: its commands as plain processes of the near namespace.

Only a pid namespace is put around them, so that what they leave running goes when they go.
``python -m vallum.arena.unwalled DIRECTORY`` reads one JSON array ``[command, timeout]`` a line and
answers each with ``[exit code, output]``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import msgspec

from vallum.arena import namespaces_priv
from vallum.core.errors import NodeError

OUTPUT_LIMIT_BYTES = 64 * 1024
ENVIRON = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


class Unwalled:
    """A shell without walls: :meth:`run` commands one after the other. An async context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Unwalled:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", "vallum.arena.unwalled", str(self._directory),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1024 * 1024,
        )  # fmt: skip
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def run(self, command: str, timeout_s: float) -> tuple[int, str]:
        """(exit code, output) of a command line; 124 when its time was up.

        Raises:
            NodeError: the helper process is gone.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode([command, timeout_s]) + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise NodeError("the agent without walls could not be run: its helper process ended; the reason is above")
        return msgspec.json.decode(line, type=tuple[int, str])


def _run(command: str, timeout_s: float, directory: str) -> tuple[int, str]:
    output = Path(directory, ".output")
    with output.open("wb") as target:
        child = subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=directory, env={**ENVIRON, "HOME": directory}, stdin=subprocess.DEVNULL, stdout=target,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = 124
    return status, output.read_bytes()[:OUTPUT_LIMIT_BYTES].decode("utf-8", "replace")


def main() -> None:
    """Be PID 1 of a pid namespace and run commands until stdin ends."""
    namespaces_priv.die_with_parent(os.getppid())
    namespaces_priv.unshare(namespaces_priv.NEWPID | namespaces_priv.NEWNS)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    namespaces_priv.die_with_parent(0)  # a parent outside the pid namespace has the number 0
    namespaces_priv.detach_mounts()
    namespaces_priv.mount_proc()
    for line in sys.stdin.buffer:
        command, timeout_s = msgspec.json.decode(line, type=tuple[str, float])
        answer = _run(command, timeout_s, sys.argv[1])
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
