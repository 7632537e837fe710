"""Running commands in a cell: each written to the record before it starts, and how it ended after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from vallum.client import wire
from vallum.core import clock
from vallum.core.errors import (
    CellGone,
    CommandNotExecutable,
    CommandNotFound,
    Contained,
    InvalidInput,
    SandboxError,
    StepTimeout,
    VallumError,
)
from vallum.core.events import AnyEvent, ToolCall, ToolResult
from vallum.core.scope import BY_NODE
from vallum.core.text import keep
from vallum.node.arguments import shorten
from vallum.node.live import CLOSE_AFTER_S, LiveCell, Shell, Step
from vallum.node.output import Capture
from vallum.node.shell import SHELLS, make_argv, make_nonce, make_script, parse_status
from vallum.node.streams import Feed, Pump
from vallum.sandbox.base import Child, Command, Exit

KILL_WAIT_S = 5.0
"""How long a killed command may take to be gone before the cell is given up."""

WATCH_AFTER_S = 0.002
"""When the pipes of a command begin to be read. Most commands have ended by then, and are read once; one that fills its pipes
sooner waits that long."""

MAX_ROUNDS = 8
"""How often what a command has started is looked for when it changes its step."""

Relay = Callable[[str, bytes], Awaitable[None] | None]


@dataclass
class Running:
    """A command that has been started and can be fed, signalled and cancelled."""

    live: LiveCell
    step: Step
    child: Child
    feed: Feed | None
    is_cancelled: bool = False
    limit: asyncio.Timeout | None = None
    """Around the wait for its end."""
    residents: set[int] = field(default_factory=set)
    """Its processes that go with it from step to step."""
    entered: set[int] = field(default_factory=set)
    """Steps that it went to."""

    at: int | None = None
    """The step that it is in, once it has left its own."""
    is_over: bool = False

    def take_along(self, index: int) -> None:
        """Move what it has started so far. What a process forks just before it is moved is found the next time round."""
        own = self.step.index
        for _ in range(MAX_ROUNDS):
            found = set(self.live.cell.pids(own)) - self.residents - {self.child.pid}
            if not found:
                break
            for pid in found:
                self.residents.add(pid)
                with contextlib.suppress(SandboxError):
                    self.live.cell.charge(pid, step=index)  # gone meanwhile is no error
        self.residents.add(self.child.pid)
        self.live.residents |= self.residents

    def cancel(self) -> None:
        """End it and what its step started; whoever waits for it is told."""
        self.is_cancelled = True
        if self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time())


def sentence(error: VallumError) -> bytes:
    """What a command that could not be started leaves on stderr."""
    return f"vallum: {error}\n".encode()


async def first_of(one: asyncio.Future[Any], other: asyncio.Future[Any], timeout_s: float | None) -> None:
    """Return when either is done, or the time is up."""
    await asyncio.wait([one, other], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


class CommandRunner:
    """Runs one ``exec`` request."""

    def __init__(self, live: LiveCell, request: wire.Exec, relay: Relay | None) -> None:
        self._live = live
        self._request = request
        self._relay = relay
        self.running: Running | None = None
        self._started = asyncio.Event()
        self._early: list[tuple[bytes, bool]] = []
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the command and everything it started; also one that is still being started."""
        self._is_cancelled = True
        if self.running is not None:
            self.running.cancel()

    def push(self, data: bytes, *, eof: bool) -> Feed | None:
        """Input of the client; kept until the command has started."""
        if self.running is None:
            self._early.append((data, eof))
            return None
        feed = self.running.feed
        if feed is not None:
            feed.write(data)
            if eof and not self._request.pty:
                feed.end()
        return feed

    async def enter_step(self, index: int) -> None:
        """Charge the command, and what it had started by the first time, to the open step ``index`` from now on.

        Raises:
            InvalidInput: the step is not open, or others are charged to the command's own.
            CellGone: it has ended.
        """
        await self._started.wait()
        running, live = self.running, self._live
        if running is None or running.is_over:
            raise CellGone("the command has ended: start it again")
        if running.step.is_block:
            raise InvalidInput("the command was started in a step of several commands: start it outside of sb.step()")
        await live.enter_step(index, "exec", None)  # raises when it is not open
        await live.cell.move(running.child, step=index)
        if not running.entered:
            running.take_along(index)
        elif running.at is not None:
            for pid in running.residents & set(live.cell.pids(running.at)):
                with contextlib.suppress(SandboxError):
                    live.cell.charge(pid, step=index)  # gone meanwhile is no error
        running.entered.add(index)
        running.at = index

    async def run(self) -> wire.Ran:
        """Run to the end.

        Raises:
            StepTimeout, Contained, CellGone, InvalidInput
        """
        try:
            return await self._run()
        finally:
            self._started.set()
            if self.running is not None:
                self.running.is_over = True
                self._live.residents -= self.running.residents

    async def _run(self) -> wire.Ran:
        request, live = self._request, self._live
        step, opening = await live.enter_step(request.step, "exec", request.tool_call)
        arguments: dict[str, object] = {
            "argv": [keep(word) for word in request.argv],
            "cwd": request.cwd,
            "user": request.user,
        }
        call = Call(live, step, "exec", arguments, opening)
        command = Command(
            argv=request.argv,
            environ={**live.environ, **request.environ} or None,
            cwd=request.cwd,
            user=request.user,
            pty=request.pty,
            rows=request.rows,
            columns=request.columns,
        )
        try:
            child = await live.cell.spawn(command, step=step.index)
        except (CommandNotFound, CommandNotExecutable) as error:
            ran = call.finish(error.exit_code, error=error, stderr=sentence(error))
            call.close_own_step()
            return ran
        except VallumError as error:
            call.finish(None, error=error)
            call.close_own_step()
            raise
        return await self._follow(call, step, child)

    async def _follow(self, call: Call, step: Step, child: Child) -> wire.Ran:
        request, live = self._request, self._live
        outputs = {"stdout": Capture(live.limits.output_bytes), "stderr": Capture(live.limits.output_bytes)}
        pumps = [
            Pump(fd, outputs[name], self._relay_of(name))
            for name, fd in (("stdout", child.stdout), ("stderr", child.stderr))
            if fd is not None
        ]
        feed = Feed(child.stdin, closes=not request.pty) if child.stdin is not None else None
        self.running = Running(live=live, step=step, child=child, feed=feed, is_cancelled=self._is_cancelled)
        self._started.set()
        if feed is not None:
            if request.stdin is not None:
                feed.write(request.stdin)
            for data, eof in self._early:
                self.push(data, eof=eof)
            if not request.interactive and not request.pty:
                feed.end()
        loop = asyncio.get_running_loop()
        is_at_once = request.pty or self._relay is not None
        watching = loop.call_later(0 if is_at_once else WATCH_AFTER_S, watch_all, pumps)
        try:
            exit_, stopped = await wait_or_stop(self.running, request.timeout_s)
            if request.pty and not stopped:
                # What the program wrote last is still on its way through the line discipline.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(pumps[0].at_end.wait(), 0.05)
            for pump in pumps:
                pump.drain()
        finally:
            watching.cancel()
            if feed is not None:
                feed.close()  # before the pump: with a terminal both are one descriptor, and the pump closes it
            for pump in pumps:
                pump.close()
        return call.conclude(exit_, stopped, request.timeout_s, outputs["stdout"], outputs["stderr"])

    def _relay_of(self, name: str) -> Callable[[bytes], Awaitable[None] | None] | None:
        relay = self._relay
        if relay is None:
            return None
        return lambda data: relay(name, data)


def watch_all(pumps: list[Pump]) -> None:
    """Take from all of them from now on."""
    for pump in pumps:
        pump.watch()


async def wait_or_stop(running: Running, timeout_s: float | None) -> tuple[Exit, str]:
    """Wait for the command; at its time-out or cancellation end everything its step started.

    Returns how it ended and why it was stopped (empty, ``timeout`` or ``cancelled``).
    """
    live, child = running.live, running.child
    try:
        async with asyncio.timeout(0 if running.is_cancelled else timeout_s) as running.limit:
            return await live.cell.wait(child), ""
    except TimeoutError:
        stopped = "cancelled" if running.is_cancelled else "timeout"
    finally:
        running.limit = None
    for index in (running.step.index, *running.entered):
        await live.kill_step(index)
    try:
        return await asyncio.wait_for(live.cell.wait(child), KILL_WAIT_S), stopped
    except TimeoutError:
        raise SandboxError(
            f"a command of cell {live.id} could not be killed within {KILL_WAIT_S:.0f} s: the cell is given up"
        ) from None


class Call:
    """A tool call in the record: written when made, closed once."""

    def __init__(
        self, live: LiveCell, step: Step, name: str, arguments: dict[str, object], opening: list[AnyEvent]
    ) -> None:
        """``opening`` is recorded before it, in the same write."""
        self._live = live
        self._step = step
        self._name = name
        self._started_ns = clock.mono_ns()
        made = ToolCall(
            t_ns=clock.wall_ns(),
            mono_ns=self._started_ns,
            scope=live.scope(step.index),
            attribution=BY_NODE,
            name=name,
            arguments=json.dumps({name: shorten(value) for name, value in arguments.items()}, ensure_ascii=True),
        )
        self._id = live.book.emit_all([*opening, made])[-1]

    def finish(
        self,
        exit_code: int | None,
        *,
        error: VallumError | None = None,
        stdout: Capture | None = None,
        captured: Capture | None = None,
        stderr: bytes = b"",
        timed_out: bool = False,
    ) -> wire.Ran:
        """Write the result and give the answer."""
        now = clock.mono_ns()
        total = (stdout.total if stdout else 0) + (captured.total if captured else 0)
        self._step.exit_code = exit_code
        self._live.emit(
            ToolResult(
                t_ns=clock.wall_ns(),
                mono_ns=now,
                scope=self._live.scope(self._step.index),
                attribution=BY_NODE,
                call=self._id,
                exit_code=exit_code,
                duration_ns=now - self._started_ns,
                output_bytes=total,
                output_sha256=stdout.sha256 if stdout else "",
                timed_out=timed_out,
                error=f"{type(error).__name__}: {error}" if error else "",
            )
        )
        return wire.Ran(
            exit_code=exit_code if exit_code is not None else 125,
            stdout=stdout.kept() if stdout else b"",
            stderr=captured.kept() if captured else stderr,
            stdout_bytes=stdout.total if stdout else 0,
            stderr_bytes=captured.total if captured else len(stderr),
            step=self._step.index,
            duration_ns=now - self._started_ns,
            timed_out=timed_out,
        )

    def conclude(
        self, exit_: Exit, stopped: str, timeout_s: float | None, stdout: Capture, stderr: Capture
    ) -> wire.Ran:
        """Write the result of a command that ran, close its own step, and answer or raise what stopped it."""
        ran = self.finish(
            None if stopped else exit_.status, stdout=stdout, captured=stderr, timed_out=stopped == "timeout"
        )
        self.close_own_step()
        if self._live.contained:
            raise Contained(self._live.contained)
        if stopped == "timeout":
            error = StepTimeout(
                f"the command did not end within {timeout_s:g} s; it and everything its step started were killed"
            )
            error.partial = ran
            raise error
        if stopped:
            raise SandboxError("the command was cancelled; it and everything its step started were killed")
        return ran

    def close_own_step(self) -> None:
        """Close the step unless it was opened for several commands."""
        if not self._step.is_block:
            # A shell answers so soon that there is no time for it while the next command line runs.
            self._live.close_step_soon(self._step, CLOSE_AFTER_S if self._name == "exec" else 0)


async def open_shell(live: LiveCell, request: wire.OpenSession, session: str) -> Shell:
    """Start a persistent shell, in a step of its own (what it does before its first command is charged there).

    Raises:
        SandboxError: the cell has no shell.
    """
    step = await live.open_step("session", None)
    try:
        for path in SHELLS:
            command = Command(
                argv=make_argv(path),
                environ={**live.environ, **request.environ} or None,
                cwd=request.cwd,
                user=request.user,
                extra_pipes=2,
            )
            with contextlib.suppress(CommandNotFound):
                child = await live.cell.spawn(command, step=step.index)
                shell = live.shells[session] = Shell(id=session, child=child)
                return shell
        raise SandboxError(
            f"the image of cell {live.id} has neither {' nor '.join(SHELLS)}: use exec instead of a session"
        )
    finally:
        live.close_step(step)


async def run_in_shell(live: LiveCell, shell: Shell, request: wire.SessionRun) -> wire.Ran:
    """Run one command line in the shell; the shell itself is moved into the step before it hears of it.

    Raises:
        StepTimeout: what it started is gone, the shell lives.
        CellGone: the shell has ended, or is another program now.
    """
    async with shell.lock:
        if live.was_replaced(shell):
            # It would be moved into each step that begins, and take what an earlier one put into it along.
            live.shells.pop(shell.id, None)
            shell.let_go()
            await live.cell.signal(shell.child, signal.SIGKILL)
            raise CellGone(
                "another program has taken the place of the session's shell (exec), so it was ended: open a new session"
            )
        step, opening = await live.enter_step(request.step, "session", request.tool_call)
        call = Call(live, step, "session.run", {"command": request.command, "session": shell.id}, opening)
        await live.cell.move(shell.child, step=step.index)
        return await _converse(live, shell, step, call, request)


async def _converse(live: LiveCell, shell: Shell, step: Step, call: Call, request: wire.SessionRun) -> wire.Ran:
    child = shell.child
    assert child.stdout is not None
    assert child.stderr is not None
    nonce = make_nonce()
    outputs = [Capture(live.limits.output_bytes), Capture(live.limits.output_bytes)]
    word = Capture(65536)
    said: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def listen(data: bytes) -> None:
        status = parse_status(word.kept(), nonce)
        if status is not None and not said.done():
            said.set_result(status)

    pumps = [Pump(os.dup(child.stdout), outputs[0]), Pump(os.dup(child.stderr), outputs[1])]
    status_pump = Pump(os.dup(child.extra[1]), word, listen)
    status_pump.watch()
    watching = asyncio.get_running_loop().call_later(WATCH_AFTER_S, watch_all, pumps)
    feed = Feed(os.dup(child.extra[0]))  # a copy, as above: the session may be closed meanwhile
    feed.write(make_script(request.command, nonce))
    gone = asyncio.ensure_future(status_pump.at_end.wait())
    try:
        await first_of(said, gone, request.timeout_s)
        stopped = ""
        if not said.done() and not gone.done():
            stopped = "timeout"
            await live.cell.signal(child, signal.SIGCONT)
            await live.cell.kill_step(step.index, spare=child)
            await first_of(said, gone, KILL_WAIT_S)
        for pump in pumps:
            pump.drain()
    finally:
        watching.cancel()
        gone.cancel()
        for pump in [*pumps, status_pump]:
            pump.close()
        feed.close()
    if not said.done():
        live.shells.pop(shell.id, None)
        shell.let_go()
        exit_ = await _reap(live, child)
        if not stopped:
            return call.conclude(exit_, "", None, *outputs)
        call.finish(None, stdout=outputs[0], captured=outputs[1], timed_out=True)
        call.close_own_step()
        raise CellGone(
            f"the command did not end within {request.timeout_s:g} s and its shell had to be ended too: open a new session"
        )
    return call.conclude(Exit(code=said.result()), stopped, request.timeout_s, *outputs)


async def _reap(live: LiveCell, child: Child) -> Exit:
    """How a shell that has ended, or no longer answers, ended."""
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(live.cell.wait(child), 0.5)
    await live.cell.signal(child, signal.SIGKILL)
    return await live.cell.wait(child)
