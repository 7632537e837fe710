"""The gateway process: serves the doors of many cells and asks the node over one socket. Without the node it ends.

Covered: when the control socket ends, the process ends, and with it every door and flow (fail closed).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import msgspec

from vallum.core.events import AnyEvent
from vallum.gateway.cell import GatewayCell, NodeGoneError, Owner
from vallum.gateway.door import Endpoint
from vallum.gateway.flow import serve_connection
from vallum.gateway.names import HostResolver
from vallum.gateway.wire import (
    AddCell,
    Append,
    Attribute,
    Attributed,
    Channel,
    Done,
    Failed,
    Frame,
    FromNode,
    Ping,
    RemoveCell,
    Requests,
    UpdateRules,
)

NODE_TIMEOUT_S = 5.0
"""How long an answer of the node may take before what waits for it is denied."""

log = logging.getLogger(__name__)


class GatewayServer:
    """All cells of one gateway process."""

    def __init__(self, control: socket.socket) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._cells: dict[str, GatewayCell] = {}
        self._requests = Requests()
        self._resolver = HostResolver()
        self._decoder = msgspec.msgpack.Decoder(FromNode)
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel = Channel(control, self._on_frame, self._on_end)

    async def attribute(self, cell: str, protocol: str, src: Endpoint, dst: Endpoint) -> Owner:
        """Ask the node who opened a socket.

        Raises:
            NodeGoneError: no answer, or it cannot say.
        """
        answer = await self._ask(Attribute, cell=cell, protocol=protocol, src=src, dst=dst)
        if not isinstance(answer, Attributed):
            raise NodeGoneError("the node answered something else")
        return Owner(answer.scope, answer.attribution, answer.process, answer.socket_step)

    async def append(self, cell: str, event: AnyEvent) -> int:
        """Have the node record an event; its id once it is written.

        Raises:
            NodeGoneError: it was not.
        """
        answer = await self._ask(Append, cell=cell, event=event)
        if not isinstance(answer, Done):
            raise NodeGoneError("the node answered something else")
        return answer.id

    async def _ask(self, kind: type[Frame], **fields: object) -> Frame:
        try:
            seq, future = self._requests.open()
        except ConnectionError as error:
            raise NodeGoneError(str(error)) from error
        self._channel.send(kind(seq=seq, **fields))
        try:
            answer = await asyncio.wait_for(future, NODE_TIMEOUT_S)
        except TimeoutError:
            raise NodeGoneError(f"the node did not answer in {NODE_TIMEOUT_S:g} s") from None
        except ConnectionError as error:
            raise NodeGoneError(str(error)) from error
        finally:
            self._requests.forget(seq)
        if isinstance(answer, Failed):
            raise NodeGoneError(answer.error)
        return answer

    def _on_frame(self, body: bytes, fds: list[int]) -> None:
        doors = [socket.socket(fileno=fd) for fd in fds]
        try:
            frame = self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            self._on_end(f"the node sent what is no frame ({error})")
            return
        if isinstance(frame, Attributed | Done | Failed):
            self._requests.settle(frame)
            return
        task = asyncio.create_task(self._obey(frame, doors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, frame: AddCell | RemoveCell | UpdateRules | Ping, doors: list[socket.socket]) -> None:
        reply: Frame = Done(seq=frame.seq)
        if isinstance(frame, AddCell):
            if frame.cell in self._cells or frame.tcp + frame.dns != len(doors):
                for door in doors:
                    door.close()
                reply = Failed(
                    seq=frame.seq, error=f"the gateway cannot add cell {frame.cell}: it is there, or a door is missing"
                )
            else:
                self._add(frame, doors)
        elif isinstance(frame, RemoveCell):
            if (cell := self._cells.pop(frame.cell, None)) is not None:
                await cell.close()
        elif isinstance(frame, UpdateRules):
            if frame.cell in self._cells:
                self._cells[frame.cell].update_rules(frame.rules)
            else:
                reply = Failed(seq=frame.seq, error=f"the gateway serves no cell {frame.cell}")
        self._channel.send(reply)

    def _add(self, frame: AddCell, doors: list[socket.socket]) -> None:
        self._cells[frame.cell] = GatewayCell(
            frame.cell,
            run=frame.run,
            episode=frame.episode,
            rules=frame.rules,
            tcp=doors[: frame.tcp],
            dns=doors[frame.tcp :],
            node=self,
            resolver=self._resolver,
            serve=serve_connection,
        )

    def _on_end(self, reason: str) -> None:
        # At once, not by winding down: whatever is in flight must not be forwarded without a node.
        log.info("ending: %s", reason)
        os._exit(0)


async def serve(control: socket.socket) -> None:
    """Serve until the process is ended."""
    server = GatewayServer(control)
    await server.ended
