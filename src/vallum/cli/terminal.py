"""Our terminal, pipes and signals, put behind a command that runs in a cell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator

from vallum.cli.prompt import Prompt
from vallum.client.face import Process
from vallum.core.errors import VallumError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.asynccontextmanager
async def interruptible(process: Process, *, pty: bool = False) -> AsyncIterator[None]:
    """Pass our signals on to the command."""
    loop = asyncio.get_running_loop()
    for signum in FORWARDED:
        loop.add_signal_handler(signum, process.signal, signum)
    if pty:
        loop.add_signal_handler(signal.SIGWINCH, lambda: process.resize(*terminal_size()))
    try:
        yield
    finally:
        for signum in FORWARDED:
            loop.remove_signal_handler(signum)


@contextlib.asynccontextmanager
async def feeding(process: Process | None, prompt: Prompt) -> AsyncIterator[None]:
    """Pass our stdin on to the command. Without one, only answers are read, and only on a terminal."""
    feeding = asyncio.ensure_future(_feed(process, prompt)) if process is not None or sys.stdin.isatty() else None
    try:
        yield
    finally:
        if feeding is not None:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, VallumError):
                await feeding


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal itself, whatever LINES and COLUMNS say."""
    size = os.get_terminal_size(1)
    return size.lines, size.columns


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _feed(process: Process | None, prompt: Prompt) -> None:
    """Pass our stdin on until it ends, but for what is an answer. Never blocks the loop: reads only what is known to be there."""
    can_poll = True
    while True:
        if can_poll:
            can_poll = await _wait_readable(0)
        try:
            data = os.read(0, 65536)
        except OSError:
            data = b""
        if data and prompt.is_asking:
            prompt.take(data)
            continue
        if process is not None:
            await process.feed(data, eof=not data)
        if not data:
            return


async def _wait_readable(fd: int) -> bool:
    """Return when a read will not block; False for what cannot be waited for and never blocks (a file, /dev/null)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()

    def announce() -> None:
        loop.remove_reader(fd)
        ready.set()

    try:
        # Once only: a second announcement, made before the first was served, would be of data that is gone by then.
        loop.add_reader(fd, announce)
    except OSError:
        return False
    try:
        await ready.wait()
        return True
    finally:
        loop.remove_reader(fd)


@contextlib.contextmanager
def raw_terminal(fd: int, prompt: Prompt) -> Iterator[None]:
    """Pass every key on as it is pressed; as before at the end."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    prompt.is_raw = True
    try:
        yield
    finally:
        prompt.is_raw = False
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
