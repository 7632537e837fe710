"""A live cell as its client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from vallum.client import transfer, wire
from vallum.client.approvals import OnApproval, answer_all
from vallum.client.command import ExecResult, OnOutput, Process, run_command
from vallum.client.connection import Connection
from vallum.client.control import update_rules
from vallum.client.session import SessionOpener
from vallum.client.snapshots import FilesChanged, Snapshot, name_of, read_diff, read_snapshot
from vallum.client.tools import HostTool, answer_calls
from vallum.core.errors import InvalidInput, VallumError


class Sandbox:
    """A live cell."""

    def __init__(self, connection: Connection, made: wire.SandboxMade, on_approval: OnApproval | None = None) -> None:
        self._connection = connection
        self.id = made.sandbox
        self.run = made.run
        self.episode = made.episode
        self.pid = made.pid
        """Host pid of the cell's PID 1."""
        self.rootless = made.rootless
        self._step: int | None = None
        self._tools: dict[str, HostTool] = {}
        self._calls: asyncio.Task[None] | None = None
        self.used: wire.Used | None = None
        """What it used, once closed."""
        self._answering = (
            asyncio.create_task(answer_all(connection, self.id, on_approval)) if on_approval is not None else None
        )

    async def exec(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout_s: float | None = None,
        stdin: bytes | str | None = None,
        environ: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tool_call: str | None = None,
        step: int | None = None,
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """Run a command; one step of its own unless inside :meth:`step` or ``step=`` is given.

        Returns when the command itself ends; what it left running goes on, charged to the step.

        Raises:
            StepTimeout: its time was up; everything it started is gone. ``error.partial`` has what it wrote.
            InvalidInput: unknown user, no such directory, a NUL byte in an argument.
            CellGone: the cell has ended.
        """
        request = self._make_request(
            argv,
            timeout_s=timeout_s,
            stdin=stdin,
            environ=environ,
            cwd=cwd,
            user=user,
            tool_call=tool_call,
            step=step,
            stream=on_output is not None,
        )
        return await run_command(self._connection, request, on_output)

    def start(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout_s: float | None = None,
        stdin: bytes | str | None = None,
        interactive: bool = False,
        pty: bool = False,
        rows: int = 24,
        columns: int = 80,
        environ: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tool_call: str | None = None,
        step: int | None = None,
        on_output: OnOutput | None = None,
    ) -> Process:
        """Like :meth:`exec`, but gives the running command: feed it, signal it, wait for it."""
        request = self._make_request(
            argv,
            timeout_s=timeout_s,
            stdin=stdin,
            interactive=interactive,
            pty=pty,
            rows=rows,
            columns=columns,
            environ=environ,
            cwd=cwd,
            user=user,
            tool_call=tool_call,
            step=step,
            stream=on_output is not None,
        )
        return Process(self._connection, request, on_output)

    def _make_request(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout_s: float | None,
        stdin: bytes | str | None,
        environ: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
        tool_call: str | None,
        step: int | None,
        stream: bool,
        interactive: bool = False,
        pty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> wire.Exec:
        if not argv:
            raise InvalidInput("the command is empty: give at least the program's name")
        return wire.Exec(
            seq=self._connection.next_seq(),
            sandbox=self.id,
            argv=[os.fsencode(a) for a in argv],
            step=self._step if step is None else step,
            tool_call=tool_call,
            environ=dict(environ or {}),
            cwd=cwd,
            user=user,
            stdin=stdin.encode() if isinstance(stdin, str) else stdin,
            interactive=interactive,
            timeout_s=timeout_s,
            stream=stream,
            pty=pty,
            rows=rows,
            columns=columns,
        )

    def session(
        self, *, environ: Mapping[str, str] | None = None, cwd: str | None = None, user: str | None = None
    ) -> SessionOpener:
        """A persistent shell: ``async with sb.session() as sh: await sh.run("cd /tmp && ls")``."""
        request = wire.OpenSession(
            seq=self._connection.next_seq(), sandbox=self.id, environ=dict(environ or {}), cwd=cwd, user=user
        )
        return SessionOpener(self, self._connection, request)

    @asynccontextmanager
    async def step(self, *, tool_call: str | None = None, is_current: bool = True) -> AsyncIterator[int]:
        """Charge every command in the block to one step. Yields its index.

        Args:
            tool_call: how the harness names what the step does.
            is_current: whether commands that name no ``step=`` of their own are charged to it. Where several tasks use
                one sandbox object side by side, give False and pass the index to each command.
        """
        if is_current and self._step is not None:
            raise InvalidInput(f"step {self._step} is still open: steps of a sandbox object do not nest")
        index = await self._connection.call(
            wire.OpenStep(seq=self._connection.next_seq(), sandbox=self.id, tool_call=tool_call), int
        )
        if is_current:
            self._step = index
        try:
            yield index
        finally:
            if is_current:
                self._step = None
            await self._connection.call(
                wire.CloseStep(seq=self._connection.next_seq(), sandbox=self.id, step=index), type(None)
            )

    @property
    def current_step(self) -> int | None:
        """The step that an open :meth:`step` block charges to."""
        return self._step

    async def model_request(
        self, target: str, body: bytes, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> wire.ModelAnswer:
        """Ask the cell's model door, as a program in the cell would at ``http://model.vallum.internal``: for an agent that
        runs on the host and works through this object.

        The call is judged, counted and recorded like a guest's, and each tool call of the reply opens a step: run it with
        ``exec(..., tool_call=ID)`` or inside ``step(tool_call=ID)``, and what it does is charged to that step. The steps of a
        reply are closed by the next request of the same conversation.

        Args:
            target: says the dialect: ``/v1/chat/completions``, ``/v1/responses``, ``/v1/messages``,
                ``/v1beta/models/NAME:generateContent``.
            body: JSON.

        Raises:
            GatewayError: the gateway failed. What the door says, a refusal too, is an answer: ``status`` 404 and the header
                ``x-vallum-rule: no-model-door`` where the cell has no model.
        """
        sent = {"content-type": "application/json", **{name.lower(): value for name, value in (headers or {}).items()}}
        request = wire.ModelRequest(
            seq=self._connection.next_seq(),
            sandbox=self.id,
            method=method,
            target=target,
            headers=[(name.encode(), value.encode()) for name, value in sent.items()],
            body=body,
        )
        return await self._connection.call(request, wire.ModelAnswer)

    async def add_tool(self, tool: HostTool) -> None:
        """Offer a function of this process to the cell, over MCP at ``http://tools.vallum.internal/mcp``.

        It is granted unless a rule denies or holds it (``host = "tools.vallum.internal"``, ``tools = [...]``). Every call
        is recorded as ``mcp.call`` and charged to the step that made it. One of the same name is replaced.

        Raises:
            InvalidInput: the name or the schema cannot be used.
            CellGone: the cell has ended.
        """
        request = wire.AddTool(seq=self._connection.next_seq(), sandbox=self.id, tool=tool.on_wire())
        await self._connection.call(request, type(None))
        self._tools[tool.name] = tool
        if self._calls is None:
            self._calls = asyncio.create_task(answer_calls(self._connection, self.id, self._tools))

    async def read_file(self, path: str, *, user: str | None = None, limit_bytes: int = 100 * 1024 * 1024) -> bytes:
        """Content of a regular file, resolved inside the cell.

        Raises:
            GuestFileError: ``errno_name`` says why (ENOENT, EACCES, EISDIR, EFBIG...).
        """
        request = wire.ReadFile(
            seq=self._connection.next_seq(), sandbox=self.id, path=path, user=user, limit_bytes=limit_bytes
        )
        return await self._connection.call(request, bytes)

    async def write_file(self, path: str, data: bytes | str, *, user: str | None = None, mode: int = 0o644) -> None:
        """Write a file inside the cell, with missing parent directories.

        Raises:
            GuestFileError: ``errno_name`` says why.
        """
        raw = data.encode() if isinstance(data, str) else bytes(data)
        request = wire.WriteFile(
            seq=self._connection.next_seq(), sandbox=self.id, path=path, data=raw, user=user, mode=mode
        )
        await self._connection.call(request, type(None))

    async def copy_out(
        self,
        guest: str,
        host: str | os.PathLike[str],
        *,
        user: str | None = None,
        limit_bytes: int = transfer.MAX_BYTES,
        limit_entries: int = transfer.MAX_ENTRIES,
        timeout_s: float = 600.0,
    ) -> transfer.Copied:
        """Copy a file or directory of the cell to a new path on the host. A step: the cell's ``tar`` reads it as ``user``.

        Nothing is overwritten; links are neither followed nor kept, devices, set-id bits and owners not kept
        (see :mod:`vallum.client.transfer`). Where it fails nothing is left.

        Args:
            guest: absolute, or relative to the cell's workdir.
            host: must not be there; its parent must.

        Raises:
            GuestFileError: ``errno_name`` ENOENT, EFBIG (beyond a limit), or EIO: it changed or could not be read.
            InvalidInput: ``host`` is there or cannot be written; ``guest`` names nothing.
            CommandNotFound: the cell has no ``tar``.
            StepTimeout, CellGone.
        """
        return await transfer.copy_out(
            self,
            guest,
            Path(host),
            user=user,
            limit_bytes=limit_bytes,
            limit_entries=limit_entries,
            timeout_s=timeout_s,
        )

    async def copy_in(
        self,
        host: str | os.PathLike[str],
        guest: str,
        *,
        user: str | None = None,
        limit_bytes: int = transfer.MAX_BYTES,
        timeout_s: float = 600.0,
    ) -> None:
        """Copy a file or directory of the host into the cell, as ``user``'s; links are kept as links. A step, as above.

        Args:
            host: a file or directory.
            guest: what it is called there; the directory that holds it must be there. Files of the same name are replaced.

        Raises:
            InvalidInput: ``host`` cannot be read or is larger than ``limit_bytes``.
            GuestFileError: ``tar`` in the cell could not write it.
            CommandNotFound, StepTimeout, CellGone.
        """
        await transfer.copy_in(self, Path(host), guest, user=user, limit_bytes=limit_bytes, timeout_s=timeout_s)

    async def snapshot(self, *, processes: Literal["freeze", "end"] = "freeze") -> Snapshot:
        """Seal the cell's files as they are now; :meth:`Node.fork` makes new cells of them. The cell goes on.

        Files only. Processes and their memory are not kept: with ``freeze`` they stand still for the moment of
        copying and go on, with ``end`` they (and open sessions) are killed first, so that no file is caught halfway.
        Takes time and disk in proportion to what the cell has written so far. Recorded, with a digest over every
        path, owner, mode and content, and with what changed since the snapshot before.

        Raises:
            CellGone: the cell has ended.
            SandboxError: it could not be copied (disk full, say); nothing half-made is left, and the cell goes on.
        """
        request = wire.Snapshot(seq=self._connection.next_seq(), sandbox=self.id, processes=processes)
        return read_snapshot(await self._connection.call(request, wire.SnapshotInfo))

    async def diff(self, since: int | Snapshot | str | None = None) -> FilesChanged:
        """Files that were added, changed or removed since a moment; recorded as events, too.

        Args:
            since: None: since the cell began (a fork: since it was forked). A snapshot of this cell. Or the number of
                a step after which a snapshot or diff of this cell was made: the latest such moment.

        Raises:
            InvalidInput: the files were not kept at that moment.
            CellGone: the cell has ended.
        """
        moment = since if since is None or isinstance(since, int) else name_of(since)
        request = wire.Diff(seq=self._connection.next_seq(), sandbox=self.id, since=moment)
        return read_diff(await self._connection.call(request, wire.FilesChanged))

    async def set_phase(self, phase: wire.Phase) -> int:
        """End the set-up: ``set_phase("run")``. Grants of the set-up alone hold no more. How many open flows were cut.

        Raises:
            InvalidInput: back to ``setup``; there is no way back.
            CellGone: the cell has ended.
        """
        request = wire.SetPhase(seq=self._connection.next_seq(), sandbox=self.id, phase=phase)
        return await self._connection.call(request, int)

    async def update_rules(
        self,
        *,
        containment: Literal["locked", "standard", "research"] | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
    ) -> wire.RulesUpdated:
        """Other rules from now on, instead of those that it has: open flows that they deny are cut.

        What runs in the cell goes on. Recorded as ``rules.changed``. What cannot be used changes nothing.

        Raises:
            RuleError, InvalidInput: an unusable file or grant; or rules that need to see inside TLS in a cell that
                was started without any.
            CellGone: the cell has ended.
        """
        return await update_rules(
            self._connection, sandbox=self.id, run=None, containment=containment, allow=allow, rules=rules, by="sdk"
        )

    async def close(self, *, exit_code: int | None = None) -> None:
        """End the cell. Everything in it is killed and its layer deleted."""
        if self._calls is not None:
            self._calls.cancel()
            await asyncio.gather(self._calls, return_exceptions=True)
            self._calls = None
        if self._answering is not None:
            self._answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, VallumError):
                await self._answering
            self._answering = None
        if self.used is None:
            request = wire.CloseSandbox(seq=self._connection.next_seq(), sandbox=self.id, exit_code=exit_code)
            closed = await self._connection.call(request, wire.SandboxClosed)
            self.used = closed.used
