"""A persistent shell of a cell."""

from __future__ import annotations

from typing import Protocol

from vallum.client import wire
from vallum.client.command import ExecResult, read_result
from vallum.client.connection import Connection
from vallum.client.opening import Opener


class StepHolder(Protocol):
    """The sandbox, which knows the step that an open ``sb.step()`` block charges to."""

    @property
    def current_step(self) -> int | None:
        """None outside of such a block."""
        ...


class SessionOpener(Opener["Session"]):
    """What ``sb.session()`` gives: enter it, or await it."""

    def __init__(self, sandbox: StepHolder, connection: Connection, request: wire.OpenSession) -> None:
        self._sandbox = sandbox
        self._connection = connection
        self._request = request

    async def _open(self) -> Session:
        return Session(self._sandbox, self._connection, await self._connection.call(self._request, str))


class Session:
    """A persistent shell: directory, variables and background jobs stay between commands."""

    def __init__(self, sandbox: StepHolder, connection: Connection, session: str) -> None:
        self._sandbox = sandbox
        self._connection = connection
        self.id = session

    async def run(
        self, command: str, *, timeout_s: float | None = None, tool_call: str | None = None, step: int | None = None
    ) -> ExecResult:
        """Run a command line; one step of its own unless inside ``sb.step()`` or ``step=`` is given.

        Raises:
            StepTimeout: its time was up; what it started is gone, the shell lives on.
            CellGone: the shell or the cell has ended.
        """
        index = self._sandbox.current_step if step is None else step
        request = wire.SessionRun(
            seq=self._connection.next_seq(),
            session=self.id,
            command=command,
            step=index,
            tool_call=tool_call,
            timeout_s=timeout_s,
        )
        return read_result(await self._connection.call(request, wire.Ran))

    async def close(self) -> None:
        """End the shell; what it left in the background stays until the cell ends."""
        await self._connection.call(wire.CloseSession(seq=self._connection.next_seq(), session=self.id), type(None))
