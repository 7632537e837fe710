"""A command that runs in a cell, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from vallum.client import wire
from vallum.client.connection import Connection
from vallum.core.errors import VallumError

OnOutput = Callable[[str, bytes], None]


@dataclass(frozen=True)
class ExecResult:
    """How a command ended."""

    exit_code: int
    """Shell convention: 128 + signal when it was killed; 127 and 126 when it could not be started."""
    stdout: bytes
    """The first and the last part when it wrote more than ``Limits.output_bytes``, with a line between that says so."""
    stderr: bytes
    step: int
    """The step that everything it did is charged to."""
    duration_s: float
    truncated: bool = False
    """Whether output was left out."""


async def run_command(connection: Connection, request: wire.Exec, on_output: OnOutput | None) -> ExecResult:
    """Run a command to its end. Cancelling that ends the command and everything it started.

    Raises:
        VallumError: what the node said.
    """
    try:
        ran = await connection.call(request, wire.Ran, on_output)
    except VallumError:
        raise
    except (asyncio.CancelledError, Exception):
        # The caller's own on_output may have raised: nobody takes what the command writes, so it is ended.
        connection.post(wire.Cancel(seq=connection.next_seq(), to=request.seq))
        raise
    return read_result(ran)


class Process:
    """A running command of :meth:`Sandbox.start`."""

    def __init__(self, connection: Connection, request: wire.Exec, on_output: OnOutput | None) -> None:
        self._connection = connection
        self._seq = request.seq
        self._answer = asyncio.ensure_future(connection.call(request, wire.Ran, on_output))

    async def feed(self, data: bytes, *, eof: bool = False) -> None:
        """Write to its stdin (``interactive`` or ``pty``). Returns when there is room for more."""
        request = wire.Input(seq=self._connection.next_seq(), to=self._seq, data=data, eof=eof)
        await self._connection.call(request, type(None))

    async def enter_step(self, step: int) -> None:
        """Charge the command to an open step from now on: for a server that works for one tool call after another.

        With it go the processes that it had started by the first time. What it starts later stays charged to the step in
        which it was started, as everything does; connections that are open already stay where they were opened. From the
        first time on, ending the command ends what is left in the steps that it entered, too.

        Raises:
            InvalidInput: the step is not open, or the command has not a step of its own (it was started inside
                ``sb.step()``, so others are charged to its step).
            CellGone: the command or the cell has ended.
        """
        await asyncio.sleep(0)  # the request that starts it leaves first
        request = wire.EnterStep(seq=self._connection.next_seq(), to=self._seq, step=step)
        await self._connection.call(request, type(None))

    def signal(self, signum: int) -> None:
        """Send a signal to its process group."""
        self._connection.post(wire.Signal(seq=self._connection.next_seq(), to=self._seq, signum=signum))

    def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal the new size."""
        self._connection.post(wire.Resize(seq=self._connection.next_seq(), to=self._seq, rows=rows, columns=columns))

    async def wait(self) -> ExecResult:
        """Wait for its end. Cancelling the wait ends the command and everything it started."""
        try:
            ran = await asyncio.shield(self._answer)
        except asyncio.CancelledError:
            self._connection.post(wire.Cancel(seq=self._connection.next_seq(), to=self._seq))
            self._answer.cancel()
            raise
        except VallumError:
            raise
        except Exception:
            # Raised by the caller's own on_output: nobody takes what the command writes, so it is ended.
            self._connection.post(wire.Cancel(seq=self._connection.next_seq(), to=self._seq))
            raise
        return read_result(ran)


def read_result(ran: wire.Ran) -> ExecResult:
    """From the wire."""
    return ExecResult(
        exit_code=ran.exit_code,
        stdout=ran.stdout,
        stderr=ran.stderr,
        step=ran.step,
        duration_s=ran.duration_ns / 1e9,
        truncated=len(ran.stdout) < ran.stdout_bytes or len(ran.stderr) < ran.stderr_bytes,
    )
