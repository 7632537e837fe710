"""Driving a cell from a test: run a command to its end, talk to one that stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vallum.core.limits import Limits
from vallum.sandbox.base import Cell, Child, Command, Exit
from vallum.sandbox.traced import TracedCell


class MakeCell(Protocol):
    """What the fixture ``make_cell`` gives."""

    def __call__(self, *, limits: Limits = ..., mounts: Sequence[str] = ..., hostname: str = ...) -> Awaitable[Cell]:
        """Build a cell."""
        ...


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    exit: Exit
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode("utf-8", "replace").removesuffix("\n")


async def read_all(fd: int) -> bytes:
    """Everything up to the end; closes the descriptor. EIO is how a terminal says end."""
    parts = []
    try:
        while True:
            try:
                part = os.read(fd, 262144)
            except BlockingIOError:
                await _ready(fd, write=False)
                continue
            except OSError:
                break
            if not part:
                break
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts)


async def read_until(fd: int, mark: bytes, timeout_s: float = 10.0) -> bytes:
    """Read until ``mark`` has been seen; the descriptor stays open."""
    seen = b""
    async with asyncio.timeout(timeout_s):
        while mark not in seen:
            try:
                part = os.read(fd, 65536)
            except BlockingIOError:
                await _ready(fd, write=False)
                continue
            assert part, f"ended before {mark!r}: {seen!r}"
            seen += part
    return seen


async def write_all(fd: int, data: bytes, *, close: bool = True) -> None:
    """Write everything; a reader that is gone is fine."""
    view = memoryview(data)
    try:
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                await _ready(fd, write=True)
    except BrokenPipeError:
        pass
    finally:
        if close:
            os.close(fd)


async def run(
    cell: Cell,
    argv: Sequence[str | bytes],
    *,
    step: int = 0,
    stdin: bytes = b"",
    environ: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    timeout_s: float = 30.0,
) -> Result:
    """Run a command to its end."""
    await cell.open_step(step)
    command = Command(
        argv=[os.fsencode(arg) for arg in argv], environ=dict(environ) if environ else None, cwd=cwd, user=user
    )
    child = await cell.spawn(command, step=step)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    async with asyncio.timeout(timeout_s):
        _, stdout, stderr, ended = await asyncio.gather(
            write_all(child.stdin, stdin), read_all(child.stdout), read_all(child.stderr), cell.wait(child)
        )
    return Result(ended, stdout, stderr)


async def sh(cell: Cell, script: str, *, step: int = 0, user: str | None = None, timeout_s: float = 30.0) -> Result:
    """Run a script of /bin/sh to its end."""
    return await run(cell, ["/bin/sh", "-c", script], step=step, user=user, timeout_s=timeout_s)


async def python(cell: Cell, code: str, *, step: int = 0, user: str | None = None, timeout_s: float = 30.0) -> Result:
    """Run Python code in the cell."""
    return await run(cell, ["python3", "-c", code], step=step, user=user, timeout_s=timeout_s)


async def start(cell: Cell, script: str, *, step: int = 0, command: Command | None = None) -> Child:
    """Start a shell script and leave it running."""
    await cell.open_step(step)
    return await cell.spawn(command or Command(argv=[b"/bin/sh", b"-c", os.fsencode(script)]), step=step)


def close_pipes(child: Child) -> None:
    """Close our ends of a command's pipes."""
    for fd in {child.stdin, child.stdout, child.stderr, *child.extra}:
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


async def become(check: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Wait until ``check()`` is true; False when it never was."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if check():
            return True
        await asyncio.sleep(0.01)
    return check()


def lives(cell: Cell, pid: int) -> bool:
    """Whether a process of ``cell`` runs; its numbers are the host's, or the cell's own where its kernel is another."""
    return pid in cell.pids() if isinstance(cell, TracedCell) else is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a host process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - bytes of one line
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    (loop.add_writer if write else loop.add_reader)(fd, _resolve, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
