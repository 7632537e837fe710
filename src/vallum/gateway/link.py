"""The node's end of the gateway: starts the process, hands it doors, answers its questions.

Covered: the gateway's frames are checked (unknown frames, descriptors, events of cells it does not serve end it).
Not covered: a gateway that was taken over can forward what it should not for the cells it serves; it has no
privilege and no file of the node.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.decoding import MALFORMED
from vallum.core.errors import GatewayError, VallumError
from vallum.core.events import (
    AnyEvent,
    DnsQuery,
    Flow,
    HttpRequest,
    McpCall,
    ModelCall,
    PackageFetched,
    Process,
    SshSession,
)
from vallum.core.scope import Attribution, Scope
from vallum.core.verdict import Decision
from vallum.gateway.kit import Kit
from vallum.gateway.wire import (
    AddCell,
    Append,
    Attribute,
    Attributed,
    CallTool,
    Channel,
    CloseSteps,
    Decided,
    Done,
    Failed,
    Frame,
    FromGateway,
    GiveUp,
    Hold,
    OpenSteps,
    Ping,
    RemoveCell,
    Request,
    Requests,
    Served,
    ServeRequest,
    StepsOpened,
    StopAgent,
    ToolAnswered,
    UpdateRules,
)
from vallum.rules.grants import Ruleset

Answer = tuple[Scope, Attribution, Process | None, int | None]
START_TIMEOUT_S = 15.0
ENVIRON = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # Its user is in no list of users, and the SSH library wants to know where it would look for settings: nowhere.
    "HOME": "/nonexistent",
    "USER": "vallum-gateway",
}
REQUEST_TIMEOUT_S = 10.0
SERVE_TIMEOUT_S = 900.0
"""A model's answer may take its time."""
_OWN_FACTS = Flow | DnsQuery | HttpRequest | SshSession | PackageFetched | ModelCall | McpCall
"""What a gateway may state, of the cells that it serves only."""
_Answer = TypeVar("_Answer", bound=Frame)
_Slow = OpenSteps | CloseSteps | StopAgent | Hold | CallTool
MAX_CHARGES = 8192
"""Answers that are kept until an event is charged by them."""
_EXPECTED = (VallumError, OSError, LookupError, ValueError, RuntimeError)
"""What may go wrong in the node: the gateway denies on it; whoever raised has told the log."""


def _fail(frame: Frame, error: BaseException) -> Failed:
    return Failed(seq=frame.seq, error=f"{type(error).__name__}: {error}")


def _finish(closing: ModelCall, steps: Sequence[int]) -> ModelCall:
    """The record of a reply whose steps are open now."""
    now = mono_ns()
    late_ns = max(0, now - closing.mono_ns)
    return msgspec.structs.replace(
        closing,
        t_ns=wall_ns(),
        mono_ns=now,
        steps=list(steps),
        duration_ns=closing.duration_ns + late_ns,
        overhead_ns=closing.overhead_ns + late_ns,
    )


class NodeSide(Protocol):
    """Who answers the gateway. Every method may raise VallumError, OSError, LookupError, ValueError or RuntimeError: the
    gateway then denies what it asked for."""

    def attribute(self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> Awaitable[Answer]:
        """Who opened the socket ``src`` -> ``dst`` of ``cell``; ``protocol`` is ``tcp`` or ``udp``."""
        ...

    def emit(self, event: AnyEvent) -> int:
        """Record it; its number once it is written."""
        ...

    async def open_steps(self, frame: OpenSteps) -> Sequence[int]:
        """A step for each of the frame's calls, in their order."""
        ...

    async def close_steps(self, frame: CloseSteps) -> None:
        """The steps of the frame's branch are over."""
        ...

    async def stop_agent(self, frame: StopAgent) -> None:
        """Return when the cell stands still."""
        ...

    async def hold(self, frame: Hold) -> Decision:
        """Ask a person; a timeout denies. Cancelled when the guest has gone or the cell ends."""
        ...

    async def call_tool(self, frame: CallTool) -> str:
        """JSON of an MCP ``CallToolResult``. Cancelled when the guest has gone or the cell ends."""
        ...


class _Charge:
    """Whose a socket is, asked by the gateway; an event may be charged by it."""

    __slots__ = ("answer", "cell", "is_told")

    def __init__(self, cell: str, answer: asyncio.Future[Answer]) -> None:
        self.cell = cell
        self.answer = answer
        self.is_told = False
        """The answer has been sent, and an event that is charged by it may follow."""


class GatewayLink:
    """A running gateway process. Make it with :meth:`start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sock: socket.socket,
        node: NodeSide,
        on_death: Callable[[str], None] | None,
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._node = node
        self._on_death = on_death
        self._requests = Requests()
        self._cells: dict[str, tuple[str, str | None]] = {}
        self._answering: dict[int, tuple[str, asyncio.Task[None]]] = {}
        self._charges: dict[int, _Charge] = {}
        self._decoder = msgspec.msgpack.Decoder(FromGateway)
        self._stopping = False
        self._channel = Channel(sock, self._on_frame, self._on_end)
        self._watch = asyncio.create_task(self._wait())

    @classmethod
    async def start(
        cls,
        *,
        uid: int,
        gid: int,
        node: NodeSide,
        on_death: Callable[[str], None] | None = None,
        cache_fd: int | None = None,
    ) -> GatewayLink:
        """Start the gateway as ``uid``:``gid`` (as root: any; otherwise the caller's own) and wait until it answers.

        ``on_death`` is called once with a reason when the gateway ends without :meth:`stop`: its doors are closed by then, so
        cells have no way out. ``cache_fd``: a directory of that user where package files are kept; the caller's to close.

        Raises:
            GatewayError: it did not start; says why.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-m", "vallum.gateway"),
                *("--control-fd", str(theirs.fileno()), "--uid", str(uid), "--gid", str(gid)),
                *(() if cache_fd is None else ("--cache-fd", str(cache_fd))),
                pass_fds=[theirs.fileno(), *(() if cache_fd is None else (cache_fd,))],
                stdin=asyncio.subprocess.DEVNULL,
                cwd="/",
                env=ENVIRON,
            )
        link = cls(process, ours, node, on_death)
        link._stopping = True  # until it has answered, its end is start's to report
        try:
            await link._ask(Done, Ping, timeout_s=START_TIMEOUT_S)
        except GatewayError as error:
            await link.stop()
            raise GatewayError(f"the gateway did not start (exit code {process.returncode}): {error}") from error
        link._stopping = False
        return link

    @property
    def is_alive(self) -> bool:
        """Whether it still serves."""
        return self._channel.is_open

    async def add_cell(
        self,
        cell: str,
        *,
        run: str,
        episode: str | None,
        rules: Ruleset,
        tcp: Sequence[socket.socket],
        dns: Sequence[socket.socket],
        kit: Kit | None = None,
    ) -> None:
        """Hand over the doors of a cell. The given sockets are closed here whatever happens: were the gateway to die
        while a copy is held, guests would hang instead of being refused.

        Raises:
            GatewayError: it does not serve them (it has ended, or the cell is there already).
        """
        doors = [*tcp, *dns]
        try:
            await self._ask(
                Done,
                AddCell,
                [door.fileno() for door in doors],
                before=lambda: self._cells.__setitem__(cell, (run, episode)),
                cell=cell,
                run=run,
                episode=episode,
                rules=rules,
                tcp=len(tcp),
                dns=len(dns),
                kit=kit or Kit(),
            )
        except GatewayError:
            self._cells.pop(cell, None)
            raise
        finally:
            for door in doors:
                door.close()

    async def remove_cell(self, cell: str) -> None:
        """Close its doors, cut its flows, and return when their ``closed`` events have been emitted. Unknown: nothing.

        Raises:
            GatewayError: the gateway has ended or does not answer.
        """
        try:
            await self._ask(Done, RemoveCell, cell=cell)
        finally:
            self._cells.pop(cell, None)
            for owner, task in list(self._answering.values()):
                if owner == cell:
                    task.cancel()

    async def update_rules(self, cell: str, rules: Ruleset, kit: Kit | None = None) -> int:
        """Judge by ``rules`` (and ``kit``; None: as before) from now on; open flows that they deny are cut. How many were.

        Raises:
            GatewayError: no such cell, or the gateway has ended.
        """
        return (await self._ask(Done, UpdateRules, cell=cell, rules=rules, kit=kit)).id

    async def serve_request(
        self, cell: str, *, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> Served:
        """Have the cell's model door answer a request of the host (:class:`vallum.gateway.wire.ServeRequest`).

        Raises:
            GatewayError: no such cell, the gateway has ended, or the door failed.
        """
        fields: dict[str, Any] = {"method": method, "target": target, "headers": tuple(headers), "body": body}
        return await self._ask(Served, ServeRequest, timeout_s=SERVE_TIMEOUT_S, cell=cell, **fields)

    async def ping(self) -> None:
        """Return when it answers.

        Raises:
            GatewayError: it does not.
        """
        await self._ask(Done, Ping)

    async def stop(self) -> None:
        """End it: doors close, flows are cut. Waits until the process has gone."""
        self._stopping = True
        self._channel.close("stopped")
        try:
            await asyncio.wait_for(asyncio.shield(self._watch), 5)
        except TimeoutError:
            self._process.kill()
            await self._watch
        for _, task in list(self._answering.values()):
            task.cancel()

    async def _wait(self) -> None:
        code = await self._process.wait()
        self._channel.close(f"the gateway ended with exit code {code}")

    async def _ask(
        self,
        wanted: type[_Answer],
        kind: type[Frame],
        fds: Sequence[int] = (),
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        before: Callable[[], None] | None = None,
        **fields: Any,
    ) -> _Answer:
        try:
            seq, future = self._requests.open()
            if before is not None:
                before()
            self._channel.send(kind(seq=seq, **fields), fds)
            answer = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise GatewayError(f"the gateway did not answer in {timeout_s:g} s: stop it and start anew") from None
        except ConnectionError as error:
            raise GatewayError(
                f"the gateway has gone ({error}): cells have no way out until a new one serves them"
            ) from error
        if isinstance(answer, Failed):
            raise GatewayError(answer.error)
        if not isinstance(answer, wanted):
            raise GatewayError("the gateway answered something else than it was asked: stop it and start anew")
        return answer

    def _on_frame(self, body: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        try:
            frame = self._decoder.decode(body)
        except MALFORMED as error:
            self._kill(f"the gateway sent what is no frame ({error})")
            return
        if isinstance(frame, Done | Failed | Served):
            self._requests.settle(frame)
            return
        if isinstance(frame, GiveUp):
            if frame.seq in self._answering:
                self._answering[frame.seq][1].cancel()
            return
        if fds or not self._may_ask(frame):
            self._kill("the gateway spoke for a cell that it does not serve")
            return
        if isinstance(frame, Attribute):
            self._attribute(frame)
        elif isinstance(frame, Append):
            self._append(frame)
        else:
            task = asyncio.create_task(self._answer(frame))
            self._answering[frame.seq] = frame.cell, task
            task.add_done_callback(lambda _, seq=frame.seq: self._answering.pop(seq, None))  # type: ignore[misc]

    def _may_ask(self, frame: Request) -> bool:
        if frame.seq in self._answering:
            return False
        owner = self._cells.get(frame.cell)
        event = frame.event if isinstance(frame, Append) else frame.closing if isinstance(frame, OpenSteps) else None
        if owner is None or event is None:
            return True  # a cell that was just removed may have asked before; it is answered that it is unknown
        return isinstance(event, _OWN_FACTS) and (event.scope.run, event.scope.episode) == owner

    def _kill(self, reason: str) -> None:
        if self._process.returncode is None:
            self._process.kill()
        self._channel.close(reason)

    # Attributing and recording come with every connection: no tasks, and as few sends as can be.

    def _attribute(self, frame: Attribute) -> None:
        future: asyncio.Future[Answer]
        if frame.cell in self._cells:
            found = self._node.attribute(frame.cell, protocol=frame.protocol, src=frame.src, dst=frame.dst)
            future = asyncio.ensure_future(found)
        else:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(LookupError(f"no cell {frame.cell} is served"))
        charge = self._charges[frame.seq] = _Charge(frame.cell, future)
        if len(self._charges) > MAX_CHARGES:
            del self._charges[next(iter(self._charges))]
        future.add_done_callback(partial(self._attributed, frame, charge))

    def _attributed(self, frame: Attribute, charge: _Charge, future: asyncio.Future[Answer]) -> None:
        charge.is_told = True
        try:
            scope, attribution, process, step = future.result()
        except asyncio.CancelledError:
            reply: Frame = Failed(seq=frame.seq, error="given up")
        except _EXPECTED as error:
            reply = _fail(frame, error)
        else:
            reply = Attributed(seq=frame.seq, scope=scope, attribution=attribution, process=process, socket_step=step)
        self._channel.send(reply, soon=True)

    def _append(self, frame: Append) -> None:
        if frame.charge is None:
            self._emit(frame, None)
            return
        charge = self._charges.pop(frame.charge, None)
        if charge is None:
            self._channel.send(Failed(seq=frame.seq, error=f"no question {frame.charge} was asked"))
        elif charge.cell != frame.cell:
            self._kill("the gateway charged an event to a socket of another cell")
        elif charge.is_told:
            self._emit(frame, charge.answer)
        else:
            charge.answer.add_done_callback(partial(self._emit, frame))  # after the one that tells the answer

    def _emit(self, frame: Append, charged: asyncio.Future[Answer] | None) -> None:
        try:
            if frame.cell not in self._cells:
                raise LookupError(f"no cell {frame.cell} is served")
            event = frame.event if charged is None else self._charge(frame, charged.result())
            reply: Frame = Done(seq=frame.seq, id=self._node.emit(event))
        except asyncio.CancelledError:
            reply = Failed(seq=frame.seq, error="given up")
        except _EXPECTED as error:
            reply = _fail(frame, error)
        self._channel.send(reply, soon=True)

    def _charge(self, frame: Append, answer: Answer) -> AnyEvent:
        scope, attribution, process, step = answer
        if (scope.run, scope.episode) != self._cells[frame.cell]:
            raise LookupError("the socket belongs to another episode")
        event = frame.event
        if isinstance(event, Flow):
            return msgspec.structs.replace(
                event, scope=scope, attribution=attribution, process=process, socket_step=step
            )
        if isinstance(event, DnsQuery):
            return msgspec.structs.replace(event, scope=scope, attribution=attribution, process=process)
        return msgspec.structs.replace(event, scope=scope, attribution=attribution)

    async def _answer(self, frame: _Slow) -> None:
        reply: Frame
        try:
            if frame.cell not in self._cells:
                raise LookupError(f"no cell {frame.cell} is served")
            reply = await self._reply(frame)
        except _EXPECTED as error:
            reply = _fail(frame, error)
        except asyncio.CancelledError:
            self._channel.send(Failed(seq=frame.seq, error="given up"))
            raise
        self._channel.send(reply)

    async def _reply(self, frame: _Slow) -> Frame:
        node = self._node
        if isinstance(frame, OpenSteps):
            steps = tuple(await node.open_steps(frame))
            if frame.closing is not None:
                node.emit(_finish(frame.closing, steps))
            return StepsOpened(seq=frame.seq, steps=steps)
        if isinstance(frame, Hold):
            return Decided(seq=frame.seq, decision=await node.hold(frame))
        if isinstance(frame, CallTool):
            return ToolAnswered(seq=frame.seq, result=await node.call_tool(frame))
        if isinstance(frame, CloseSteps):
            await node.close_steps(frame)
        else:
            await node.stop_agent(frame)
        return Done(seq=frame.seq)

    def _on_end(self, reason: str) -> None:
        self._requests.end(reason)
        if not self._stopping and self._on_death is not None:
            self._on_death(reason)
