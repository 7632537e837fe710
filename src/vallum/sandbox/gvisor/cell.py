"""A live cell of the ``gvisor`` level: the same conversation with PID 1 as at the ``ns`` level, through runsc's kernel.

What differs: that kernel can be given descriptors of the host but cannot hand any out, so pipes are made here; its
processes are none of the host's, so ids are the cell's own and come from its reports (:mod:`.trace`).

Covered: reports are taken before an answer is given that depends on them. Not covered: see :mod:`.lineage`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable

from vallum.core.errors import CellGone, InvalidInput, SandboxError
from vallum.core.text import keep, show
from vallum.sandbox.base import CellSpec, Child, Command, Doors
from vallum.sandbox.cgroup.base import CellGroup
from vallum.sandbox.gvisor.lineage import INIT
from vallum.sandbox.gvisor.points import MAX_PID, Clone, Connect, Exec, Exited, Point
from vallum.sandbox.gvisor.steps import TraceSteps
from vallum.sandbox.gvisor.trace import TraceReader
from vallum.sandbox.ns import wire
from vallum.sandbox.ns.cell import NsCell, NsChild, drain_pipe
from vallum.sandbox.ns.channel import close_all, make_payload
from vallum.sandbox.ns.explain import explain_spawn
from vallum.sandbox.traced import TraceListener

I_KILL = 30
_SIZE = struct.Struct("=HH")
_LOG_TAIL_BYTES = 600


class GvisorChild(NsChild):
    """A command; ``sizes`` tells its terminal's relay a new size."""

    sizes: socket.socket | None = None


class GvisorCell(NsCell):
    """See :class:`vallum.sandbox.base.Cell` and :class:`vallum.sandbox.base.TracedCell`."""

    def __init__(
        self,
        spec: CellSpec,
        *,
        pid: int,
        pidfd: int,
        control: socket.socket,
        doors: Doors,
        group: CellGroup | None,
        trace: socket.socket,
        log_fd: int,
        clean_up: Callable[[NsCell], Awaitable[None]],
    ) -> None:
        """Made by :class:`vallum.sandbox.gvisor.backend.GvisorBackend` only. ``log_fd``: what the runtime said."""
        self.refuses_automount = False
        """Whether programs need :data:`vallum.sandbox.gvisor.backend.PRELOAD`."""
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log_fd = log_fd
        self._listener: TraceListener | None = None
        self._spawning: dict[int, int] = {}
        super().__init__(
            spec,
            pid=pid,
            pidfd=pidfd,
            control=control,
            doors=doors,
            steps=None,
            rootless=False,
            clean_up=clean_up,
            seal=None,
        )
        self._traced = TraceSteps(
            group, drain=self.drain, is_sure=self._is_sure, send=self._signal_pids, end_cell=self._kill_init
        )
        self._steps = self._traced
        self._by_lineage = None
        self._reader = TraceReader(trace, self._take_points, self._go_blind)

    async def until_ready(self, within_s: float) -> None:
        """Wait until PID 1 has said that it is there.

        Raises:
            SandboxError: the runtime did not get that far; with its own words.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._ready
        except (TimeoutError, CellGone):
            size = os.fstat(self._log_fd).st_size
            words = os.pread(self._log_fd, _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
            said = show(words.decode("utf-8", "replace").strip()) or "it said nothing"
            raise SandboxError(f"the cell could not be built: runsc did not start it: {said}") from None
        finally:
            os.close(self._log_fd)
            self._log_fd = -1

    @property
    def dropped(self) -> int:
        """See the contract of traced cells."""
        return self._reader.dropped

    def listen(self, listener: TraceListener) -> None:
        """See the contract of traced cells."""
        self._listener = listener

    def drain(self) -> None:
        """See the contract of traced cells. A cell whose end is near has nothing more to say."""
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.drain()

    # ------------------------------------------------------------------ steps

    async def open_step(self, step: int) -> int | None:
        """See the contract: a step is no cgroup here."""
        self._check_alive()
        return None

    def _is_sure(self) -> bool:
        return self._reader.dropped == 0

    def _signal_pids(self, pids: list[int], signum: int) -> None:
        p = wire.Packer()
        p.word(len(pids))
        for pid in pids:
            p.word(pid)
        fd = make_payload(p.bytes())
        try:
            self._send(self._control, wire.Message(I_KILL, 0, signum), [fd])
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ commands

    async def spawn(self, command: Command, *, step: int) -> Child:
        """See the contract."""
        self._check_alive()
        if not 0 <= command.extra_pipes <= 32:
            raise InvalidInput(f"extra_pipes={command.extra_pipes} is not usable: at most 32")
        user, cwd = command.user or self._spec.image.user, self._resolve(command.cwd or "")
        payload = wire.encode_spawn(
            user=user,
            cwd=cwd,
            argv=command.argv,
            environ=self._environ(command),
            rows=command.rows,
            columns=command.columns,
        )
        streams = _Streams(pty=command.pty, extra=command.extra_pipes)
        try:
            try:
                job = self._request(
                    wire.I_SPAWN,
                    payload,
                    a=wire.SPAWN_PTY if command.pty else 0,
                    b=command.extra_pipes,
                    more=streams.theirs,
                )
            finally:
                close_all(streams.theirs)
            self._spawning[job.id] = step
            try:
                failure = await self._own(job, job.begun)
            finally:
                self._spawning.pop(job.id, None)
            if failure is not None:
                raise explain_spawn(failure.stage, failure.number, argv0=keep(command.argv[0]), user=user, cwd=cwd)
            if not job.pid:
                raise SandboxError(f"{keep(command.argv[0])!r} was killed before it started")
        except BaseException:
            streams.close()
            raise
        ours = streams.ours
        if command.pty:
            child = GvisorChild(job.pid, ours[0], ours[0], None, ours[1:], job=job)
            child.sizes = streams.sizes
            job.ended.then(streams.close_sizes)
            return child
        return GvisorChild(job.pid, ours[0], ours[1], ours[2], ours[3:], job=job)

    async def resize(self, child: Child, rows: int, columns: int) -> None:
        """See the contract."""
        sizes = child.sizes if isinstance(child, GvisorChild) else None
        if sizes is None or not (0 < rows < 65536 and 0 < columns < 65536):
            raise InvalidInput(f"a terminal cannot be given the size {rows}x{columns}")
        try:
            sizes.send(_SIZE.pack(rows, columns))
        except OSError as error:
            raise InvalidInput("the command has no terminal that is still open") from error

    async def read_file(self, path: str, *, user: str | None = None, limit_bytes: int) -> bytes:
        """See the contract."""
        self._check_alive()
        who, full = user or self._spec.image.user, self._resolve(path)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(ours, False)
            try:
                job = self._request(
                    wire.I_READ, wire.encode_read(user=who, path=full, limit_bytes=limit_bytes), more=[theirs]
                )
            finally:
                os.close(theirs)
            await self._own(job, job.told)
            data = await drain_pipe(ours)
        finally:
            os.close(ours)
        await self._until_done(job, verb="read", path=full, user=who)
        return data

    # ------------------------------------------------------------------ what PID 1 and its kernel say

    def _receive(self, message: wire.Message, fds: list[int], pid: int) -> None:
        """The host's word for the sender is the runtime; PID 1 says the id in the cell. No descriptor is expected, nor kept."""
        close_all(fds)
        if message.op == wire.E_HELLO and message.id == 0:
            self.refuses_automount = bool(message.b)
            if not self._ready.done():
                self._ready.set_result(None)
            return
        if message.op == wire.E_HELLO and not INIT < message.a <= MAX_PID:
            self._go_blind(f"its PID 1 named {message.a}, which is no process id")
            return
        if message.op == wire.E_HELLO and (step := self._spawning.get(message.id)) is not None:
            self._traced.lineage.begin(message.a, step)
        super()._receive(message, [], message.a if message.op == wire.E_HELLO else pid)

    def _take_points(self, points: list[Point]) -> None:
        self._control.read_now()  # PID 1 names a command's process before its first instruction is reported
        lineage, listener = self._traced.lineage, self._listener
        for point in points:
            match point:
                case Clone():
                    lineage.clone(point.pid, point.child)
                case Exec():
                    self._note_exec(point)
                case Exited():
                    if listener is not None and lineage.get(point.pid) is not None:
                        listener.exited(point.pid, point.status)
                    lineage.end(point.pid)
                case Connect():
                    if listener is not None:
                        listener.connected(point.pid, str(point.address), point.port)

    def _note_exec(self, point: Exec) -> None:
        task = self._traced.lineage.get(point.pid)
        if task is None:
            return
        task.exe, task.argv, task.uid = point.path, point.argv, point.uid
        if self._listener is not None:
            self._listener.started(point.pid, task.parent, point.path, point.argv, point.uid)

    def _go_blind(self, why: str) -> None:
        """What cannot be watched is ended. A cell that is ended anyhow has nothing more to say."""
        if not self._control.is_open:
            return
        if self._listener is not None:
            self._listener.blind(why)
        self._kill_init()

    # ------------------------------------------------------------------ the end

    def _lose(self) -> None:
        super()._lose()
        if not self._ready.done():
            self._ready.set_exception(self._why_gone())
            self._ready.exception()
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.drain()
            reader.close()
            self._bury()

    def _bury(self) -> None:
        """With the kernel every process has ended, whether it could still say so or not."""
        for pid in self._traced.lineage.pids():
            if self._listener is not None:
                self._listener.exited(pid, signal.SIGKILL)
            self._traced.lineage.end(pid)


class _Streams:
    """Both ends of a command's pipes: ``ours`` in the order of :class:`Child`, ``theirs`` as native/command.c takes them."""

    def __init__(self, *, pty: bool, extra: int) -> None:
        self.ours: list[int] = []
        self.theirs: list[int] = []
        self.sizes: socket.socket | None = None
        try:
            if pty:
                mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                self.ours.append(mine.detach())
                self.theirs.append(its.detach())
                self.sizes, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self.theirs.append(its.detach())
            else:
                for to_guest in (True, False, False):
                    self._add(to_guest=to_guest)
            for number in range(extra):
                self._add(to_guest=number % 2 == 0)
            for fd in self.ours:
                os.set_blocking(fd, False)
        except OSError as error:
            self.close()
            close_all(self.theirs)
            raise SandboxError(
                f"no pipes can be made for the command: {error.strerror}; close cells or files"
            ) from error

    def _add(self, *, to_guest: bool) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.fchmod(reading, 0o666)  # else /dev/stdin and its like cannot be opened: its owner is a user of the host
        self.ours.append(writing if to_guest else reading)
        self.theirs.append(reading if to_guest else writing)

    def close(self) -> None:
        """Close our ends."""
        close_all(self.ours)
        self.close_sizes()

    def close_sizes(self) -> None:
        """Nobody resizes the terminal any more."""
        if self.sizes is not None:
            self.sizes.close()
