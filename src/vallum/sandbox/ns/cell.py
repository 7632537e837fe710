"""A live cell of the ``ns`` level: the conversation with its PID 1.

Everything asked of the guest goes through PID 1, which forks a child that becomes the guest user first; nothing here
opens a path of the guest. What PID 1 answers are facts of the kernel (exit status, errno); host pids are taken from
the credentials that the kernel attaches to messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import posixpath
import signal
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from vallum.core.errors import CellGone, GuestFileError, InvalidInput, SandboxError
from vallum.core.text import keep
from vallum.sandbox.base import CellSpec, Child, Command, Doors, Exit, Processes, SealedLayer, Sealing, Usage
from vallum.sandbox.cgroup.base import Leaf
from vallum.sandbox.ns import wire
from vallum.sandbox.ns.channel import Channel, close_all, make_payload
from vallum.sandbox.ns.explain import explain_file, explain_spawn
from vallum.sandbox.ns.jobs import Failure, Job, Outcome, Waiting
from vallum.sandbox.ns.lineage import Keeper
from vallum.sandbox.ns.steps import GroupSteps, LineageSteps, Steps

_T = TypeVar("_T")

_USER_VARIABLES = ("HOME", "USER", "LOGNAME")
_CHUNK = 1 << 20
_END_WITHIN_S = 10.0


@dataclass(eq=False)
class NsChild(Child):
    """A running command of this level."""

    job: Job | None = None


class NsCell:
    """See :class:`vallum.sandbox.base.Cell`."""

    def __init__(
        self,
        spec: CellSpec,
        *,
        pid: int,
        pidfd: int,
        control: socket.socket,
        doors: Doors,
        steps: GroupSteps | None,
        rootless: bool,
        clean_up: Callable[[NsCell], Awaitable[None]],
        seal: Callable[[str, Path, bool, bool], Awaitable[list[SealedLayer]]] | None = None,
    ) -> None:
        """Made by :class:`vallum.sandbox.ns.backend.NsBackend` only. ``steps`` None: by lineage."""
        self.id = spec.id
        self.pid = pid
        self.doors = doors
        self.rootless = rootless
        self.gone = asyncio.Event()
        """Set once PID 1 has ended, and with it every process of the cell."""
        self._spec = spec
        self._pidfd = pidfd
        self._clean_up = clean_up
        self._seal = seal
        self._sealing = asyncio.Lock()
        self._jobs: dict[int, Job] = {}
        self._serial = 0
        self._waiting: Waiting | None = None
        self._killing: asyncio.Task[int] | None = None
        self._closing: asyncio.Task[int] | None = None
        self._by_group = steps
        self._by_lineage = LineageSteps(pid, self._kill_init) if steps is None else None
        self._steps: Steps = steps or self._by_lineage or LineageSteps(pid, self._kill_init)
        self._keepers: dict[int, asyncio.Future[Channel]] = {}
        self._keepers_due: dict[int, int] = {}
        self._channels: list[Channel] = []
        self._control = Channel(control, self._receive, self._lose)
        asyncio.get_running_loop().add_reader(pidfd, self._see_end)

    # ------------------------------------------------------------------ steps

    async def open_step(self, step: int) -> int | None:
        """See the contract."""
        self._check_alive()
        if self._by_group is not None:
            leaf = self._by_group.leaf(step)
            # Steps are numbered one after the other: the next one's leaf is made while this one's command starts.
            asyncio.get_running_loop().call_soon(self._prepare_step, step + 1)
            return leaf.cgroup_id
        await self._keeper(step)
        return None

    def prepare(self) -> None:
        """Make ready what the first step will need."""
        self._prepare_step(0)

    def expect_command(self, step: int) -> None:
        """See the contract."""
        self._prepare_child(step, self._spec.image.user, later=False)

    def _prepare_step(self, step: int) -> Leaf | None:
        if self._by_group is None or not self._control.is_open:
            return None
        try:
            return self._by_group.prepare(step)
        except SandboxError:
            return None  # whoever needs it will be told

    def _prepare_child(self, step: int, user: str, *, later: bool) -> None:
        """Have PID 1 keep a child waiting in the leaf of ``step``; ``later``: from the next end of a child on."""
        if self._waiting is not None and self._waiting.step == step and not self._waiting.job.ended.done():
            return
        leaf = self._prepare_step(step)
        # In a rootless cell guests are of PID 1's user, and could stop or end it.
        if leaf is None or leaf.fd is None or self.rootless or len(user) > wire.MAX_USER:
            return
        self._dismiss_waiting()
        job = self._new_job(self._control)
        with contextlib.suppress(CellGone):
            self._send(self._control, wire.Message(wire.I_PREPARE, job.id, int(later), text=user), [leaf.fd])
            self._waiting = Waiting(job, step, user)

    def _dismiss_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._jobs.pop(waiting.job.id, None)
            waiting.dismiss()
            # A command of its step may be waiting for it: nobody else would tell that one, and it goes the usual way.
            waiting.job.told.settle(None)

    async def _take_waiting(self, step: int, user: str, payload: bytes) -> Job | None:
        """The waiting child, which is the command now."""
        waiting = self._waiting
        if waiting is not None and waiting.step == step and not waiting.job.told.done():
            self._control.read_now()
            if not waiting.job.told.done():
                self._send(self._control, wire.Message(wire.I_PREPARE, waiting.job.id))
                await self._own(waiting.job, waiting.job.told)
            waiting = self._waiting
        if waiting is None or not waiting.is_for(step, user) or len(payload) > wire.MAX_WORD:
            return None
        if self._by_group is not None:
            self._by_group.leaf(step)  # open from now on: it was only prepared
        self._waiting = None
        if waiting.give(payload):
            return waiting.job
        self._jobs.pop(waiting.job.id, None)
        return None

    async def move(self, child: Child, *, step: int) -> None:
        """See the contract."""
        self._check_alive()
        self._steps.move(child.pid, step)

    def charge(self, pid: int, *, step: int) -> None:
        """See the contract."""
        self._check_alive()
        self._steps.move(pid, step)

    async def kill_step(self, step: int, *, spare: Child | None = None) -> int:
        """See the contract."""
        self._check_alive()
        if self._waiting is not None and not self._waiting.job.told.done():
            self._control.read_now()  # it may be there, and not be known to be ours
        ours = self._count_waiting(step)
        return max(0, await self._steps.kill(step, spare.pid if spare is not None else None) - ours)

    async def freeze(self, *, step: int | None = None) -> None:
        """See the contract."""
        self._check_alive()
        await self._steps.freeze(step)

    async def thaw(self, *, step: int | None = None) -> None:
        """See the contract."""
        self._check_alive()
        await self._steps.thaw(step)

    def pids(self, step: int | None = None) -> list[int]:
        """See the contract."""
        pids = self._steps.pids(step)
        if self._waiting is not None and self._waiting.job.pid in pids:
            pids.remove(self._waiting.job.pid)
        return pids

    def _count_waiting(self, step: int | None) -> int:
        waiting = self._waiting
        return int(waiting is not None and waiting.job.pid > 0 and step in (None, waiting.step))

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """See the contract."""
        return self._steps.step_of_pid(pid)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """See the contract."""
        return self._steps.step_of_cgroup(cgroup_id)

    def usage(self, step: int | None = None) -> Usage:
        """See the contract."""
        usage = self._steps.usage(step)
        if usage.pids and (ours := self._count_waiting(step)):
            return msgspec.structs.replace(usage, pids=usage.pids - ours)
        return usage

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
        is_plain = not command.pty and not command.extra_pipes
        job = await self._take_waiting(step, user, payload) if is_plain else None
        asyncio.get_running_loop().call_soon(partial(self._prepare_child, step + 1, user, later=True))
        if job is None:
            job = await self._ask_for_command(payload, step, command)
        failure = await self._own(job, job.begun)
        if failure is not None and failure.stage == wire.STAGE_STALE:
            close_all(job.take_fds())
            job = await self._ask_for_command(payload, step, command)
            failure = await self._own(job, job.begun)
        fds = job.take_fds()
        if failure is not None:
            close_all(fds)
            raise explain_spawn(failure.stage, failure.number, argv0=keep(command.argv[0]), user=user, cwd=cwd)
        if len(fds) != (1 if command.pty else 3) + command.extra_pipes:
            close_all(fds)
            raise SandboxError(f"{keep(command.argv[0])!r} was killed by another process of its cell before it started")
        if command.pty:
            return NsChild(job.pid, fds[0], fds[0], None, fds[1:], job=job)
        return NsChild(job.pid, fds[0], fds[1], fds[2], fds[3:], job=job)

    async def _ask_for_command(self, payload: bytes, step: int, command: Command) -> Job:
        flags = wire.SPAWN_PTY if command.pty else 0
        if self._by_lineage is None:
            return await self._request_in_leaf(payload, step, flags, command.extra_pipes)
        return self._request(wire.I_SPAWN, payload, channel=await self._keeper(step), a=flags, b=command.extra_pipes)

    async def _request_in_leaf(self, payload: bytes, step: int, flags: int, extra: int) -> Job:
        group = self._by_group
        assert group is not None
        leaf: Leaf = group.leaf(step)
        if leaf.fd is not None:
            return self._request(wire.I_SPAWN, payload, a=flags | wire.SPAWN_LEAF, b=extra, leaf=leaf.fd)
        async with group.turn:
            group.visit(step)
            try:
                job = self._request(wire.I_SPAWN, payload, a=flags, b=extra)
                await self._own(job, job.told)
            finally:
                group.leave()
        return job

    async def wait(self, child: Child) -> Exit:
        """See the contract."""
        job = child.job if isinstance(child, NsChild) else None
        if job is None:
            raise InvalidInput("this child is not one of this cell")
        status = await job.ended.wait()
        if isinstance(status, Failure):
            raise SandboxError("the command did not start")
        if os.WIFSIGNALED(status):
            return Exit(signal=os.WTERMSIG(status))
        return Exit(code=os.WEXITSTATUS(status))

    async def signal(self, child: Child, signum: int) -> None:
        """See the contract. A command that has ended is not signalled, and that is no error."""
        self._check_alive()
        if isinstance(child, NsChild) and child.job is not None and not child.job.ended.done():
            self._send(child.job.channel, wire.Message(wire.I_SIGNAL, child.job.id, signum))

    async def resize(self, child: Child, rows: int, columns: int) -> None:
        """See the contract. Preconditions: the terminal's descriptor has not been closed.

        Raises:
            InvalidInput: the command has no terminal, or a size that is none.
        """
        if child.stdin is None or not (0 < rows < 65536 and 0 < columns < 65536):
            raise InvalidInput(f"a terminal cannot be given the size {rows}x{columns}")
        try:
            fcntl.ioctl(child.stdin, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))
        except OSError as error:
            raise InvalidInput("the command has no terminal that is still open") from error

    # ------------------------------------------------------------------ files

    async def read_file(self, path: str, *, user: str | None = None, limit_bytes: int) -> bytes:
        """See the contract."""
        self._check_alive()
        who, full = user or self._spec.image.user, self._resolve(path)
        job = self._request(wire.I_READ, wire.encode_read(user=who, path=full, limit_bytes=limit_bytes))
        await self._own(job, job.told)
        fds = job.take_fds()
        try:
            data = await drain_pipe(fds[0]) if fds else b""
        finally:
            close_all(fds)
        await self._until_done(job, verb="read", path=full, user=who)
        return data

    async def write_file(self, path: str, data: bytes, *, user: str | None = None, mode: int = 0o644) -> None:
        """See the contract."""
        self._check_alive()
        who, full = user or self._spec.image.user, self._resolve(path)
        job = self._request(wire.I_WRITE, wire.encode_write(user=who, path=full, mode=mode, data=data))
        await self._until_done(job, verb="written", path=full, user=who)

    async def _until_done(self, job: Job, *, verb: str, path: str, user: str) -> None:
        status = await self._own(job, job.ended)
        if isinstance(status, Failure):
            raise explain_file(status.stage, status.number, verb=verb, path=path, user=user)
        if status != 0:
            raise GuestFileError(
                f"{path!r} could not be {verb}: the helper in the cell was killed (by the guest, or out of memory)",
                "EIO",
            )

    async def try_walls(self) -> int:
        """Try from inside what no guest may do; 0 when all of it was refused, else bits of native/check.c.

        Preconditions: no command has run in this cell.

        Raises:
            SandboxError: it could not be tried.
        """
        job = self._request(wire.I_CHECK, wire.encode_check(user=self._spec.image.user))
        status = await self._own(job, job.ended)
        if isinstance(status, Failure) or not os.WIFEXITED(status):
            raise SandboxError(
                "the walls of a cell could not be tried: the child that tries them did not come to its end"
            )
        return os.WEXITSTATUS(status)

    # ------------------------------------------------------------------ sealing

    async def seal(
        self, directory: Path, *, processes: Processes = "freeze", merge: bool = False, copy: bool = True
    ) -> Sealing:
        """See the contract."""
        async with self._sealing:
            self._check_alive()
            if self._seal is None:
                raise SandboxError("cells of this isolation level cannot be sealed; use level 'ns' for snapshots")
            alive = len(self.pids())
            if processes == "end":
                await self._end_all()
            since = time.monotonic_ns()
            try:
                await self._steps.freeze(None)
                layers = await self._seal(self.id, directory, merge, copy)
            except (OSError, SandboxError):
                if self._closing is not None or self.gone.is_set():
                    raise self._why_gone() from None
                raise
            finally:
                if self._closing is None and not self.gone.is_set():
                    await self._steps.thaw(None)
            if self.gone.is_set():
                raise self._why_gone()
            return Sealing(layers=layers, alive=alive, stopped_ns=time.monotonic_ns() - since)

    async def _end_all(self) -> None:
        for _ in range(5):
            steps = {self.step_of_pid(pid)[0] for pid in self.pids()} - {None}
            if not steps:
                return
            for step in steps:
                await self._steps.kill(step or 0, None)

    # ------------------------------------------------------------------ the end

    async def kill(self) -> int:
        """See the contract."""
        if self._killing is None:
            self._killing = asyncio.get_running_loop().create_task(self._kill(), name=f"kill-{self.id}")
        return await asyncio.shield(self._killing)

    async def close(self) -> int:
        """See the contract."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(), name=f"close-{self.id}")
        return await asyncio.shield(self._closing)

    async def _close(self) -> int:
        alive = await self.kill()
        # In a thread: removing a cgroup waits for the kernel, a millisecond or more each.
        await asyncio.to_thread(self._steps.remove)
        await self._clean_up(self)
        return alive

    async def _kill(self) -> int:
        alive = 0 if self.gone.is_set() else len(self.pids())
        self._kill_init()
        if self._sealing.locked() and not self.gone.is_set():
            await self._steps.thaw(None)  # on cgroup v1 what is frozen does not die
        try:
            async with asyncio.timeout(_END_WITHIN_S):
                await self.gone.wait()
        except TimeoutError:
            raise SandboxError(
                f"cell {self.id} does not end: a process waits in the kernel; its directory is kept"
            ) from None
        finally:
            self.doors.close()
        return alive

    def _kill_init(self) -> None:
        self._control.close()
        for channel in self._channels:
            channel.close()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _see_end(self) -> None:
        """PID 1 is dead, and by then every other process of its pid namespace."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._lose()
        self.gone.set()

    def _lose(self) -> None:
        """The conversation is over: nobody waits any longer."""
        self._control.close()
        for channel in self._channels:
            channel.close()
        for job in list(self._jobs.values()):
            close_all(job.take_fds())
            job.told.refuse(self._why_gone())
            job.begun.refuse(self._why_gone())
            job.ended.refuse(self._why_gone())
        self._jobs.clear()
        for due in self._keepers.values():
            _refuse(due, self._why_gone())
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _why_gone(self) -> CellGone:
        return CellGone(f"cell {self.id} has ended, so nothing more can be done in it; make another")

    def _check_alive(self) -> None:
        if not self._control.is_open:
            raise self._why_gone()

    # ------------------------------------------------------------------ the conversation

    def _resolve(self, path: str) -> str:
        return posixpath.join(self._spec.image.workdir or "/", path)

    def _environ(self, command: Command) -> list[bytes]:
        own = dict(self._spec.image.environ)
        if command.user is not None and command.user != self._spec.image.user:
            for name in _USER_VARIABLES:  # those of another user; PID 1 fills in the right ones
                own.pop(name, None)
        merged = {**own, **(command.environ or {})}
        for name in merged:
            if not name or "=" in name:
                raise InvalidInput(f"the variable name {name!r} is not usable: it is empty or contains '='")
        return [f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in merged.items()]

    def _request(
        self,
        op: int,
        payload: bytes,
        *,
        channel: Channel | None = None,
        a: int = 0,
        b: int = 0,
        leaf: int | None = None,
        more: Sequence[int] = (),
    ) -> Job:
        fd = make_payload(payload)
        job = self._new_job(channel or self._control)
        try:
            self._send(job.channel, wire.Message(op, job.id, a, b), [fd, *([] if leaf is None else [leaf]), *more])
        except BaseException:
            self._jobs.pop(job.id, None)
            raise
        finally:
            os.close(fd)
        return job

    def _new_job(self, channel: Channel) -> Job:
        self._serial = self._serial % 0xFFFFFFF0 + 1
        job = self._jobs[self._serial] = Job(self._serial, channel)
        return job

    def _send(self, channel: Channel, message: wire.Message, fds: list[int] | None = None) -> None:
        try:
            channel.send(message, fds or ())
        except BrokenPipeError:
            raise self._why_gone() from None

    async def _own(self, job: Job, outcome: Outcome[_T]) -> _T:
        """Wait for a stage of a job; when the waiter is cancelled nobody owns it, so it must not run on."""
        try:
            return await outcome.wait()
        except asyncio.CancelledError:
            job.begun.then(lambda: self._abandon(job))
            self._abandon(job)
            raise

    def _abandon(self, job: Job) -> None:
        close_all(job.take_fds())
        if not job.ended.done() and job.channel.is_open:
            with contextlib.suppress(BrokenPipeError):
                job.channel.send(wire.Message(wire.I_SIGNAL, job.id, int(signal.SIGKILL)))

    def _receive(self, message: wire.Message, fds: list[int], pid: int) -> None:
        job = self._jobs.get(message.id)
        if message.op == wire.E_KEEPER and len(fds) == 1:
            self._meet_keeper(message.id, fds[0])
        elif job is None:
            close_all(fds)
            if message.op == wire.E_FAILED and (step := self._keepers_due.pop(message.id, None)) is not None:
                _refuse(
                    self._keepers.pop(step),
                    explain_spawn(message.a, message.b, argv0="a step's keeper", user="", cwd=""),
                )
        elif message.op == wire.E_HELLO:
            job.pid, job.fds = pid, fds
            job.told.settle(None)
        elif message.op == wire.E_STARTED:
            job.told.settle(None)
            job.begun.settle(None)
        elif message.op == wire.E_FAILED:
            failure = Failure(message.a, message.b)
            job.told.settle(None)
            job.begun.settle(failure)
            self._end_job(job, failure)
        elif message.op == wire.E_EXITED:
            self._end_job(job, message.a)

    def _end_job(self, job: Job, how: Failure | int) -> None:
        job.ended.settle(how)
        del self._jobs[job.id]
        if self._waiting is not None and self._waiting.job is job:
            self._dismiss_waiting()

    async def _keeper(self, step: int) -> Channel:
        due = self._keepers.get(step)
        if due is None:
            self._serial += 1
            due = self._keepers[step] = asyncio.get_running_loop().create_future()
            self._keepers_due[self._serial] = step
            self._send(self._control, wire.Message(wire.I_KEEPER, self._serial))
        return await asyncio.shield(due)

    def _meet_keeper(self, ident: int, fd: int) -> None:
        step = self._keepers_due.pop(ident)
        sock = socket.socket(fileno=fd)

        def receive(message: wire.Message, fds: list[int], pid: int) -> None:
            # Its first message says, by the kernel's word, which host pid it has.
            if message.op == wire.E_HELLO and message.id == ident:
                if self._by_lineage is not None:
                    self._by_lineage.keepers[pid] = Keeper(step, pid)
                _settle(self._keepers[step], channel)
            else:
                self._receive(message, fds, pid)

        channel = Channel(sock, receive, self._lose)
        self._channels.append(channel)


def _settle(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[_T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # told to whoever asks; nobody need ask


async def drain_pipe(fd: int) -> bytes:
    """Everything until the end of a non-blocking pipe."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    parts: list[bytes] = []

    def read() -> None:
        try:
            while True:
                part = os.read(fd, _CHUNK)
                if not part:
                    _settle(done, None)
                    return
                parts.append(part)
        except BlockingIOError:
            return

    loop.add_reader(fd, read)
    try:
        await done
    finally:
        loop.remove_reader(fd)
    return b"".join(parts)
