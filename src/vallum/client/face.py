"""The Python face: a node, its sandboxes, their steps, sessions and files.

Example::

    async with vallum.Node() as node:
        async with node.sandbox() as sb:
            result = await sb.exec(["python3", "-c", "print(1)"], timeout_s=10)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

from vallum.client import wire
from vallum.client.connection import Connection, view
from vallum.client.places import Places
from vallum.client.snapshots import FilesChanged, Snapshot, make_fork, name_of, read_diff, read_snapshot
from vallum.core.errors import InvalidInput, NodeError, VallumError
from vallum.core.limits import Limits
from vallum.version import __version__

Containment = Literal["locked", "standard", "research"]
GuestRoot = Literal["plain", "owner"]
OnOutput = Callable[[str, bytes], None]
_HELLOS = 5
"""How many nodes may end just as we come before that is an error."""


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


class EventView(dict[str, Any]):
    """One event, exactly what ``vallum events --json`` prints; fields may also be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return EventView(value) if isinstance(value, dict) else value


class Node:
    """The trusted process of this machine, as an async context manager.

    Starts the process when the owner has none running, and leaves it running when other clients
    still use it; it ends with its last client. Leaving the block ends this client's cells.

    Args:
        home: directory of its state instead of the default (or ``VALLUM_HOME``).
        places: the same, directory by directory.
    """

    def __init__(self, *, home: str | os.PathLike[str] | None = None, places: Places | None = None) -> None:
        environ = dict(os.environ)
        if home is not None:
            environ["VALLUM_HOME"] = os.path.abspath(home)  # noqa: PTH100 - no symlink is resolved
        self.places = places or Places.from_environ(environ, os.geteuid())
        self._connection: Connection | None = None
        self.tiers: dict[str, str] = {}
        """Control -> ``enforced``, ``degraded: why`` or ``missing: why``."""
        self.pid = 0

    async def __aenter__(self) -> Node:
        for left in reversed(range(_HELLOS)):
            self._connection = connection = await Connection.open(self.places)
            hello = wire.Hello(seq=connection.next_seq(), protocol=wire.PROTOCOL, version=__version__)
            try:
                welcome = await connection.call(hello, wire.Welcome)
            except NodeError:
                # A node that was just ending took the connection and dropped it; who comes next meets its successor.
                if connection.is_open or not left:
                    raise
            else:
                self.tiers, self.pid = welcome.tiers, welcome.pid
                break
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End this client's cells and leave."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    @property
    def connection(self) -> Connection:
        """The wire, for code that speaks it directly.

        Raises:
            NodeError: used outside the ``async with`` block.
        """
        if self._connection is None:
            raise NodeError("this Node is not open: use `async with vallum.Node() as node:`")
        return self._connection

    def sandbox(
        self,
        image: str = "host",
        *,
        containment: Containment | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
        mounts: Sequence[str] = (),
        limits: Limits | None = None,
        run: str | None = None,
        episode: str | None = None,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        level: str = "ns",
        root: GuestRoot = "plain",
        command: Sequence[str] = (),
    ) -> SandboxOpener:
        """A cell: ``async with node.sandbox(...) as sb`` or ``sb = await node.sandbox(...)``.

        Args:
            image: ``host`` (curated tree of this machine), ``dir:/path``, ``oci:/layout[:tag]``, ``oci-archive:/file``,
                ``docker-archive:/file`` or ``docker://name`` (see ``docs/images.md``).
            containment: ``locked`` (no network at all), ``standard`` (only what is granted; the default), ``research``
                (any public host over HTTP and TLS).
            allow: grants ``HOST[:PORT]``, ``*.HOST[:PORT]``, ``ADDRESS[:PORT]`` or ``CIDR[:PORT]``.
            rules: rule file (TOML).
            mounts: ``/host/path:/guest/path``, copy-on-write (the host is never written), or with ``:ro`` read-only.
            run, episode: ids; made up when not given. A run may have many episodes.
            environ: added to the image's environment; nothing of the caller's own is passed.
            level: isolation level.
            root: ``plain`` (user 0 of the cell has no more rights than any other user of it; the default) or ``owner``
                (it also owns every file of the cell and may become its other users, as ``adduser``, ``apt-get`` and ``tar``
                need; recorded; not rootless). What that opens: SECURITY.md, "Guest root".

        Raises (when entered or awaited):
            InvalidInput, RuleError: an argument cannot be used.
            SandboxError, ControlMissing: the cell cannot be built here.
        """
        if root not in ("plain", "owner"):
            raise InvalidInput(f"root={root!r} is not usable: give 'plain' or 'owner'")
        text, rules_name = _read_rules(rules)
        request = wire.CreateSandbox(
            seq=self.connection.next_seq(),
            image=image,
            containment=containment,
            allow=list(allow),
            rules=text,
            rules_name=rules_name,
            mounts=list(mounts),
            limits=(limits or Limits()).check(),
            run=run,
            episode=episode,
            environ=dict(environ or {}),
            user=user,
            workdir=workdir,
            level=level,
            root=root,
            command=list(command),
        )
        return SandboxOpener(self, request)

    def fork(
        self,
        snapshot: Snapshot | str,
        *,
        run: str | None = None,
        episode: str | None = None,
        containment: Containment | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
    ) -> SandboxOpener:
        """A new cell with the files of a snapshot: ``async with node.fork(snap) as sb`` or ``sb = await node.fork(snap)``.

        Files only: no process, memory or connection of the parent is in it. Many forks of one snapshot may live at
        once, and none can see or change what another has, nor the parent. Image, level, environment and limits are
        the parent's unless given.

        Args:
            snapshot: what :meth:`Sandbox.snapshot` gave, or its id.
            run: default: the parent's run when this client is still in it, else this client's own.
            containment: None: the parent's containment, grants and rules (``allow`` adds to them). Given: only what
                is given here counts.

        Raises (when entered or awaited):
            InvalidInput: there is no such snapshot, or an argument cannot be used.
            SandboxError: its image is gone, or the cell cannot be built here.
        """
        text, name = _read_rules(rules)
        request = make_fork(
            self.connection.next_seq(), snapshot, run=run, episode=episode, containment=containment, allow=allow,
            rules=text, rules_name=name, limits=limits, environ=environ, user=user, workdir=workdir,
        )  # fmt: skip
        return SandboxOpener(self, request)

    async def snapshots(self) -> list[Snapshot]:
        """The snapshots of this home, of every run, the newest first. They stay until they are deleted."""
        request = wire.Snapshots(seq=self.connection.next_seq())
        return [read_snapshot(one) for one in await self.connection.call(request, list[wire.SnapshotInfo])]

    async def delete(self, snapshot: Snapshot | str) -> None:
        """Delete a snapshot.

        Raises:
            InvalidInput: there is none of that id; a live cell or another snapshot needs it.
        """
        request = wire.DeleteSnapshot(seq=self.connection.next_seq(), snapshot=name_of(snapshot))
        await self.connection.call(request, type(None))

    async def events(self, *, run: str, episode: str | None = None) -> list[EventView]:
        """Every recorded event of a run (or of one episode of it), oldest first."""
        found: list[EventView] = []
        start: wire.Cursor | None = None
        while True:
            request = wire.Events(seq=self.connection.next_seq(), run=run, episode=episode, start=start, limit=10_000)
            page = await self.connection.call(request, wire.EventPage)
            found += [EventView(view(line)) for line in page.lines]
            start = page.next
            if start is None:
                return found

    async def status(self) -> wire.NodeStatus:
        """What the node is doing."""
        return await self.connection.call(wire.Status(seq=self.connection.next_seq()), wire.NodeStatus)


class Closable(Protocol):
    """What can be opened and has to be closed."""

    async def close(self) -> None:
        """End it."""
        ...


C = TypeVar("C", bound=Closable)


class Opener(Generic[C]):
    """Something that is about to be opened: await it and close it yourself, or enter it."""

    _opened: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._open().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        await self._opened.close()

    async def _open(self) -> C:
        raise NotImplementedError


class SandboxOpener(Opener["Sandbox"]):
    """What ``node.sandbox(...)`` and ``node.fork(...)`` give: await it, or enter it."""

    def __init__(self, node: Node, request: wire.CreateSandbox | wire.ForkSandbox) -> None:
        self._node = node
        self._request = request

    async def _open(self) -> Sandbox:
        made = await self._node.connection.call(self._request, wire.SandboxMade)
        return Sandbox(self._node.connection, made)


class Sandbox:
    """A live cell."""

    def __init__(self, connection: Connection, made: wire.SandboxMade) -> None:
        self._connection = connection
        self.id = made.sandbox
        self.run = made.run
        self.episode = made.episode
        self.pid = made.pid
        """Host pid of the cell's PID 1."""
        self.rootless = made.rootless
        self._step: int | None = None
        self.used: wire.Used | None = None
        """What it used, once closed."""

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
        process = self.start(
            argv,
            timeout_s=timeout_s,
            stdin=stdin,
            environ=environ,
            cwd=cwd,
            user=user,
            tool_call=tool_call,
            step=step,
            on_output=on_output,
        )
        return await process.wait()

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
        if not argv:
            raise InvalidInput("the command is empty: give at least the program's name")
        request = wire.Exec(
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
            stream=on_output is not None,
            pty=pty,
            rows=rows,
            columns=columns,
        )
        return Process(self._connection, request, on_output)

    def session(
        self, *, environ: Mapping[str, str] | None = None, cwd: str | None = None, user: str | None = None
    ) -> SessionOpener:
        """A persistent shell: ``async with sb.session() as sh: await sh.run("cd /tmp && ls")``."""
        request = wire.OpenSession(
            seq=self._connection.next_seq(), sandbox=self.id, environ=dict(environ or {}), cwd=cwd, user=user
        )
        return SessionOpener(self, self._connection, request)

    @asynccontextmanager
    async def step(self, *, tool_call: str | None = None) -> AsyncIterator[int]:
        """Charge every command in the block to one step. Yields its index."""
        if self._step is not None:
            raise InvalidInput(f"step {self._step} is still open: steps of a sandbox object do not nest")
        index = await self._connection.call(
            wire.OpenStep(seq=self._connection.next_seq(), sandbox=self.id, tool_call=tool_call), int
        )
        self._step = index
        try:
            yield index
        finally:
            self._step = None
            await self._connection.call(
                wire.CloseStep(seq=self._connection.next_seq(), sandbox=self.id, step=index), type(None)
            )

    @property
    def current_step(self) -> int | None:
        """The step that an open :meth:`step` block charges to."""
        return self._step

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

    async def close(self, *, exit_code: int | None = None) -> None:
        """End the cell. Everything in it is killed and its layer deleted."""
        if self.used is None:
            request = wire.CloseSandbox(seq=self._connection.next_seq(), sandbox=self.id, exit_code=exit_code)
            closed = await self._connection.call(request, wire.SandboxClosed)
            self.used = closed.used


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
        return _result(ran)


class SessionOpener(Opener["Session"]):
    """What ``sb.session()`` gives: enter it, or await it."""

    def __init__(self, sandbox: Sandbox, connection: Connection, request: wire.OpenSession) -> None:
        self._sandbox = sandbox
        self._connection = connection
        self._request = request

    async def _open(self) -> Session:
        return Session(self._sandbox, self._connection, await self._connection.call(self._request, str))


class Session:
    """A persistent shell: directory, variables and background jobs stay between commands."""

    def __init__(self, sandbox: Sandbox, connection: Connection, session: str) -> None:
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
        return _result(await self._connection.call(request, wire.Ran))

    async def close(self) -> None:
        """End the shell; what it left in the background stays until the cell ends."""
        await self._connection.call(wire.CloseSession(seq=self._connection.next_seq(), session=self.id), type(None))


def _read_rules(rules: str | os.PathLike[str] | None) -> tuple[str | None, str]:
    """(text, name) of a rule file."""
    if rules is None:
        return None, ""
    path = Path(rules)
    try:
        return path.read_text("utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read rule file {path}: {error}") from error


def _result(ran: wire.Ran) -> ExecResult:
    return ExecResult(
        exit_code=ran.exit_code,
        stdout=ran.stdout,
        stderr=ran.stderr,
        step=ran.step,
        duration_s=ran.duration_ns / 1e9,
        truncated=len(ran.stdout) < ran.stdout_bytes or len(ran.stderr) < ran.stderr_bytes,
    )
