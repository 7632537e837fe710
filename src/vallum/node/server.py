"""The node's socket: clients in, requests to the house, answers out. A client's end ends its cells."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from vallum.client import wire
from vallum.client.frames import FrameStream
from vallum.core.errors import CellGone, GuestFileError, InvalidInput, NodeError, StepTimeout, VallumError
from vallum.node.commands import CommandRunner
from vallum.node.house import House
from vallum.version import __version__

log = logging.getLogger(__name__)

STREAM_HIGH_WATER_BYTES = 1024 * 1024


class Client:
    """One connection."""

    def __init__(
        self,
        number: int,
        house: House,
        stream: FrameStream,
        stop: Callable[[], None],
    ) -> None:
        self.number = number
        self._house = house
        self._stream = stream
        self._stop = stop
        self._tasks: set[asyncio.Task[None]] = set()
        self._execs: dict[int, CommandRunner] = {}

    async def serve(self) -> None:
        """Answer requests until the connection ends, then end what the client had."""
        self._stream.on_frame = self._receive
        try:
            wrong = await self._stream.ended
            if wrong:
                log.warning("client %d sent something unreadable: %s", self.number, wrong)
        finally:
            self._stream.on_frame = None
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._house.forget_client(self.number)
            self._stream.close()

    def _receive(self, body: bytes) -> None:
        self._take(wire.decode_request(body))

    def _take(self, request: wire.AnyRequest) -> None:
        # These act on what runs already, in the order in which they came.
        if isinstance(request, wire.Signal | wire.Cancel | wire.Resize):
            self._control(request)
            return
        if isinstance(request, wire.Input):
            runner = self._execs.get(request.to)
            feed = runner.push(request.data, eof=request.eof) if runner is not None else None
            self._spawn(self._answer_input(request.seq, feed.wait_for_room() if feed is not None else None))
            return
        if isinstance(request, wire.Exec):
            live = self._house.find(request.sandbox, self.number)
            if live is not None:
                self._execs[request.seq] = CommandRunner(
                    live, request, self._relay(request.seq) if request.stream else None
                )
        self._spawn(self._answer(request))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_input(self, seq: int, room: Awaitable[None] | None) -> None:
        if room is not None:
            await room
        self._send(wire.Reply(seq=seq, result=wire.pack(None)))

    def _control(self, request: wire.Signal | wire.Cancel | wire.Resize) -> None:
        runner = self._execs.get(request.to)
        if runner is None:
            return
        if isinstance(request, wire.Cancel):
            runner.cancel()
            return
        running = runner.running
        if running is None:
            return
        if isinstance(request, wire.Resize):
            self._spawn(running.live.cell.resize(running.child, request.rows, request.columns))
        elif 1 <= request.signum < signal.NSIG:
            self._spawn(running.live.cell.signal(running.child, request.signum))

    def _relay(self, seq: int) -> Callable[[str, bytes], Awaitable[None] | None]:
        def relay(stream: str, data: bytes) -> Awaitable[None] | None:
            self._send(wire.Output(seq=seq, stream="stdout" if stream == "stdout" else "stderr", data=data))
            if self._stream.unsent_bytes > STREAM_HIGH_WATER_BYTES:
                return self._stream.drain()
            return None

        return relay

    def _send(self, message: object) -> None:
        self._stream.write(wire.frame(message))

    async def _answer(self, request: wire.AnyRequest) -> None:
        seq = request.seq
        try:
            result = await self._do(request)
            self._send(wire.Reply(seq=seq, result=wire.pack(result)))
        except VallumError as error:
            partial = wire.pack(error.partial) if isinstance(error, StepTimeout) and error.partial else b""
            errno_name = error.errno_name if isinstance(error, GuestFileError) else ""
            self._send(
                wire.Failure(
                    seq=seq, error=type(error).__name__, message=str(error), errno_name=errno_name, partial=partial
                )
            )
        except Exception as error:
            # The boundary of a request: the client is told, the log has the trace, nothing was permitted by it.
            log.exception("request %s of client %d failed", type(request).__name__, self.number)
            self._send(
                wire.Failure(
                    seq=seq,
                    error="NodeError",
                    message=f"the node failed in {type(request).__name__}: {type(error).__name__}: {error}; see its log",
                )
            )
        finally:
            self._execs.pop(seq, None)

    async def _do(self, request: wire.AnyRequest) -> object:
        house, me = self._house, self.number
        if not isinstance(request, wire.Exec | wire.SessionRun):
            house.settle()
        match request:
            case wire.Hello():
                return self._welcome(request)
            case wire.Exec():
                return await house.run_command(self._execs.get(request.seq), request, me)
            case wire.EnterStep():
                if (runner := self._execs.get(request.to)) is None:
                    raise CellGone("the command has ended: start it again")
                await runner.enter_step(request.step)
                return None
            case wire.OpenStep():
                return (await house.get(request.sandbox, me).open_step("block", request.tool_call, is_block=True)).index
            case wire.Status():
                return house.status()
            case wire.Decide():
                return await house.approvals.decide(request, self._stream.peer_name())
            case wire.Stop():
                asyncio.get_running_loop().call_later(0.01, self._stop)
                return None
        answers: dict[type, Callable[[Any, int], Awaitable[object]]] = {
            wire.CreateSandbox: house.create,
            wire.ForkSandbox: house.fork,
            wire.Snapshot: house.take_snapshot,
            wire.Snapshots: house.list_snapshots,
            wire.DeleteSnapshot: house.delete_snapshot,
            wire.Diff: house.diff_files,
            wire.CloseSandbox: house.close,
            wire.CloseStep: house.close_step,
            wire.ModelRequest: house.ask_model,
            wire.AddTool: house.add_tool,
            wire.TakeToolCall: house.take_tool_call,
            wire.AnswerToolCall: house.answer_tool_call,
            wire.OpenSession: house.open_session,
            wire.SessionRun: house.run_session,
            wire.CloseSession: house.close_session,
            wire.ReadFile: house.read_file,
            wire.WriteFile: house.write_file,
            wire.Events: house.events,
            wire.SetPhase: house.set_phase,
            wire.UpdateRules: house.update_rules,
            wire.ListApprovals: house.list_approvals,
        }
        answer = answers.get(type(request))
        if answer is None:
            raise InvalidInput(f"{type(request).__name__} is not a request that has an answer")
        return await answer(request, me)

    def _welcome(self, request: wire.Hello) -> wire.Welcome:
        if request.protocol != wire.PROTOCOL:
            raise NodeError(
                f"the running node speaks protocol {wire.PROTOCOL}, this client {request.protocol}: "
                "end the other clients so that it stops"
            )
        return wire.Welcome(version=__version__, pid=os.getpid(), tiers=self._house.tiers)


class Server:
    """Accepts clients of this owner until the last one has gone."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._numbers = itertools.count(1)
        self._clients: set[asyncio.Task[None]] = set()
        self.is_over = asyncio.Event()
        """Set when the last client has gone, or somebody asked the node to stop."""

    async def listen(self, path: str) -> asyncio.Server:
        """Serve on ``path``, made 0600 inside a 0700 directory."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        previous = os.umask(0o177)
        try:
            return await asyncio.get_running_loop().create_unix_server(
                lambda: FrameStream(self._accept), path, backlog=256
            )
        finally:
            os.umask(previous)

    def _accept(self, stream: FrameStream) -> None:
        uid = stream.peer_uid()
        if uid != os.geteuid():
            log.warning("refused a client of uid %d", uid)
            stream.close()
            return
        if self.is_over.is_set():  # too late: it sees its hello unanswered and meets our successor
            stream.close()
            return
        client = Client(next(self._numbers), self._house, stream, self.is_over.set)
        task = asyncio.get_running_loop().create_task(client.serve())
        self._clients.add(task)
        self._house.clients += 1
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._clients.discard(task)
        self._house.clients -= 1
        if not self._clients:
            self.is_over.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a client could not be served to its end", exc_info=error)

    async def drop_all(self) -> None:
        """Disconnect every client and wait until its cells are gone."""
        tasks = list(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
