"""The node's end of the gateway: starts the process, hands it doors, answers its questions.

Covered: the gateway's frames are checked (unknown frames, descriptors, events of cells it does not serve end it).
Not covered: a gateway that was taken over can forward what it should not for the cells it serves; it has no
privilege and no file of the node.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from vallum.core.errors import GatewayError, VallumError
from vallum.core.events import AnyEvent, DnsQuery, Flow, Process
from vallum.core.scope import Attribution, Scope
from vallum.gateway.wire import (
    AddCell,
    Append,
    Attribute,
    Attributed,
    Channel,
    Done,
    Failed,
    Frame,
    FromGateway,
    Ping,
    RemoveCell,
    Requests,
    UpdateRules,
)
from vallum.rules.grants import Ruleset

Answer = tuple[Scope, Attribution, Process | None, int | None]
START_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 10.0


class AttributeCall(Protocol):
    """:meth:`vallum.core.ports.Attributor.attribute`, or a coroutine function like it."""

    def __call__(
        self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]
    ) -> Answer | Awaitable[Answer]:
        """Who opened the socket ``src`` -> ``dst`` of ``cell``; ``protocol`` is ``tcp`` or ``udp``."""
        ...


EmitCall = Callable[[AnyEvent], int | Awaitable[int]]


class GatewayLink:
    """A running gateway process. Make it with :meth:`start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sock: socket.socket,
        attribute: AttributeCall,
        emit: EmitCall,
        on_death: Callable[[str], None] | None,
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._attribute = attribute
        self._emit = emit
        self._on_death = on_death
        self._requests = Requests()
        self._cells: dict[str, tuple[str, str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
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
        attribute: AttributeCall,
        emit: EmitCall,
        on_death: Callable[[str], None] | None = None,
    ) -> GatewayLink:
        """Start the gateway as ``uid``:``gid`` (as root: any; otherwise the caller's own) and wait until it answers.

        ``attribute`` and ``emit`` may be plain or coroutine functions; ``emit`` returns once the event is written, and
        raises when it was not (then the flow is denied). ``on_death`` is called once with a reason when the gateway ends
        without :meth:`stop`: its doors are closed by then, so cells have no way out.

        Raises:
            GatewayError: it did not start; says why.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-m", "vallum.gateway"),
                *("--control-fd", str(theirs.fileno()), "--uid", str(uid), "--gid", str(gid)),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            )
        link = cls(process, ours, attribute, emit, on_death)
        link._stopping = True  # until it has answered, its end is start's to report
        try:
            await link._ask(Ping, timeout_s=START_TIMEOUT_S)
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
    ) -> None:
        """Hand over the doors of a cell. The given sockets are closed here whatever happens: were the gateway to die
        while a copy is held, guests would hang instead of being refused.

        Raises:
            GatewayError: it does not serve them (it has ended, or the cell is there already).
        """
        doors = [*tcp, *dns]
        try:
            await self._ask(
                AddCell,
                [door.fileno() for door in doors],
                before=lambda: self._cells.__setitem__(cell, (run, episode)),
                cell=cell,
                run=run,
                episode=episode,
                rules=rules,
                tcp=len(tcp),
                dns=len(dns),
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
            await self._ask(RemoveCell, cell=cell)
        finally:
            self._cells.pop(cell, None)

    async def update_rules(self, cell: str, rules: Ruleset) -> None:
        """Judge by ``rules`` from now on; open flows that they deny are cut.

        Raises:
            GatewayError: no such cell, or the gateway has ended.
        """
        await self._ask(UpdateRules, cell=cell, rules=rules)

    async def ping(self) -> None:
        """Return when it answers.

        Raises:
            GatewayError: it does not.
        """
        await self._ask(Ping)

    async def stop(self) -> None:
        """End it: doors close, flows are cut. Waits until the process has gone."""
        self._stopping = True
        self._channel.close("stopped")
        try:
            await asyncio.wait_for(asyncio.shield(self._watch), 5)
        except TimeoutError:
            self._process.kill()
            await self._watch
        for task in list(self._tasks):
            task.cancel()

    async def _wait(self) -> None:
        code = await self._process.wait()
        self._channel.close(f"the gateway ended with exit code {code}")

    async def _ask(
        self,
        kind: type[Frame],
        fds: Sequence[int] = (),
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        before: Callable[[], None] | None = None,
        **fields: Any,
    ) -> None:
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

    def _on_frame(self, body: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        try:
            frame = self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            self._kill(f"the gateway sent what is no frame ({error})")
            return
        if isinstance(frame, Done | Failed):
            self._requests.settle(frame)
            return
        if fds or not self._may_ask(frame):
            self._kill("the gateway spoke for a cell that it does not serve")
            return
        task = asyncio.create_task(self._answer(frame))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _may_ask(self, frame: Attribute | Append) -> bool:
        owner = self._cells.get(frame.cell)
        if owner is None or isinstance(frame, Attribute):
            return True  # a cell that was just removed may have asked before; it is answered that it is unknown
        scope = frame.event.scope
        return isinstance(frame.event, Flow | DnsQuery) and (scope.run, scope.episode) == owner

    def _kill(self, reason: str) -> None:
        if self._process.returncode is None:
            self._process.kill()
        self._channel.close(reason)

    async def _answer(self, frame: Attribute | Append) -> None:
        reply: Frame
        try:
            if frame.cell not in self._cells:
                raise LookupError(f"no cell {frame.cell} is served")
            if isinstance(frame, Attribute):
                found = self._attribute(frame.cell, protocol=frame.protocol, src=frame.src, dst=frame.dst)
                scope, attribution, process, step = await found if inspect.isawaitable(found) else found
                reply = Attributed(
                    seq=frame.seq, scope=scope, attribution=attribution, process=process, socket_step=step
                )
            else:
                number = self._emit(frame.event)
                reply = Done(seq=frame.seq, id=await number if inspect.isawaitable(number) else number)
        except (VallumError, OSError, LookupError, ValueError, RuntimeError) as error:
            # The gateway denies on this; whoever raised has told the log.
            reply = Failed(seq=frame.seq, error=f"{type(error).__name__}: {error}")
        self._channel.send(reply)

    def _on_end(self, reason: str) -> None:
        self._requests.end(reason)
        if not self._stopping and self._on_death is not None:
            self._on_death(reason)
