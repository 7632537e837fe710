"""The gateway process: serves the doors of many cells and asks the node over one socket. Without the node it ends.

Covered: when the control socket ends, the process ends, and with it every door and flow (fail closed).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.events import AnyEvent, ModelCall
from vallum.core.verdict import Decision
from vallum.gateway.cell import Charge, GatewayCell, NodeGoneError
from vallum.gateway.door import Endpoint
from vallum.gateway.flow import serve_connection
from vallum.gateway.names import HostResolver
from vallum.gateway.services.model import serve_host_request
from vallum.gateway.tls.upstream import Vetting
from vallum.gateway.wire import (
    AddCell,
    Append,
    Attribute,
    CallTool,
    Channel,
    CloseSteps,
    Decided,
    Done,
    Failed,
    Frame,
    FromNode,
    GiveUp,
    Hold,
    OpenSteps,
    Ping,
    ProposedCall,
    RemoveCell,
    Requests,
    ServeRequest,
    StepsOpened,
    StopAgent,
    ToolAnswered,
    UpdateRules,
)

NODE_TIMEOUT_S = 5.0
"""How long an answer of the node may take before what waits for it is denied."""
STEPS_TIMEOUT_S = 30.0
TOOL_TIMEOUT_S = 600.0
_HOLD_GRACE_S = 5.0
_EXPIRE_S = 0.5
_SOON_S = 0.001
"""How long what nothing waits for may wait for others."""

_Answer = TypeVar("_Answer", bound=Frame)
_Order = AddCell | RemoveCell | UpdateRules | Ping | ServeRequest

log = logging.getLogger(__name__)


class GatewayServer:
    """All cells of one gateway process."""

    def __init__(self, control: socket.socket) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._cells: dict[str, GatewayCell] = {}
        self._requests = Requests()
        self._resolver = HostResolver()
        self._vetting = Vetting()
        self._decoder = msgspec.msgpack.Decoder(FromNode)
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel = Channel(control, self._on_frame, self._on_end)
        self._expire()

    def attribute(self, cell: str, protocol: str, src: Endpoint, dst: Endpoint) -> Charge:
        """See :meth:`vallum.gateway.cell.Node.attribute`."""
        seq, future = self._open()
        # What can be judged at once is recorded in the same turn: then both leave together, and come back together.
        self._channel.send(Attribute(seq=seq, cell=cell, protocol=protocol, src=src, dst=dst), soon=True)
        return Charge(seq, future)

    async def append(self, cell: str, event: AnyEvent, charge: Charge | None = None, *, soon: bool = False) -> int:
        """See :meth:`vallum.gateway.cell.Node.append`."""
        seq, future = self._open()
        number = None if charge is None else charge.number
        self._channel.send(Append(seq=seq, cell=cell, event=event, charge=number), soon=soon, within_s=_SOON_S)
        try:
            answer = await future
        except OSError as error:  # TimeoutError and ConnectionError are
            raise NodeGoneError(str(error)) from error
        finally:
            self._requests.forget(seq)
        if isinstance(answer, Done):
            return answer.id
        raise NodeGoneError(answer.error if isinstance(answer, Failed) else "the node answered something else")

    def hurry(self) -> None:
        """See :meth:`vallum.gateway.cell.Node.hurry`."""
        self._channel.flush()

    def _open(self) -> tuple[int, asyncio.Future[Frame]]:
        try:
            return self._requests.open(NODE_TIMEOUT_S)
        except ConnectionError as error:
            raise NodeGoneError(str(error)) from error

    def _expire(self) -> None:
        self._requests.expire()
        asyncio.get_running_loop().call_later(_EXPIRE_S, self._expire)

    async def open_steps(
        self,
        cell: str,
        *,
        branch: str,
        model_call: str,
        calls: Sequence[ProposedCall],
        agent: str = "",
        pid: int | None = None,
        step: int | None = None,
        on_host: bool = False,
        closing: ModelCall | None = None,
    ) -> tuple[int, ...]:
        """See :meth:`vallum.gateway.cell.Node.open_steps`."""
        fields: dict[str, Any] = {
            "branch": branch,
            "model_call": model_call,
            "calls": tuple(calls),
            "agent": agent,
            "pid": pid,
            "step": step,
            "on_host": on_host,
            "closing": closing,
        }
        answer = await self._ask(StepsOpened, OpenSteps, within_s=STEPS_TIMEOUT_S, cell=cell, **fields)
        if len(answer.steps) != len(calls):
            raise NodeGoneError(f"the node opened {len(answer.steps)} steps for {len(calls)} calls")
        return answer.steps

    async def close_steps(self, cell: str, branch: str) -> None:
        """See :meth:`vallum.gateway.cell.Node.close_steps`."""
        await self._ask(Done, CloseSteps, within_s=STEPS_TIMEOUT_S, soon=True, cell=cell, branch=branch)

    async def stop_agent(self, cell: str, reason: str) -> None:
        """See :meth:`vallum.gateway.cell.Node.stop_agent`."""
        await self._ask(Done, StopAgent, within_s=STEPS_TIMEOUT_S, cell=cell, reason=reason)

    async def hold(
        self,
        cell: str,
        *,
        subject: str,
        rule: str,
        flow: str,
        timeout_s: float,
        src: Endpoint | None = None,
        dst: Endpoint | None = None,
    ) -> Decision:
        """See :meth:`vallum.gateway.cell.Node.hold`."""
        wait_s = timeout_s + _HOLD_GRACE_S
        fields: dict[str, Any] = {
            "subject": subject,
            "rule": rule,
            "flow": flow,
            "timeout_s": timeout_s,
            "src": src,
            "dst": dst,
        }
        return (await self._ask(Decided, Hold, within_s=wait_s, may_give_up=True, cell=cell, **fields)).decision

    async def call_tool(self, cell: str, *, name: str, arguments: str, flow: str) -> str:
        """See :meth:`vallum.gateway.cell.Node.call_tool`."""
        fields: dict[str, Any] = {"name": name, "arguments": arguments, "flow": flow}
        return (
            await self._ask(ToolAnswered, CallTool, within_s=TOOL_TIMEOUT_S, may_give_up=True, cell=cell, **fields)
        ).result

    async def _ask(
        self,
        wanted: type[_Answer],
        kind: type[Frame],
        *,
        within_s: float = NODE_TIMEOUT_S,
        may_give_up: bool = False,
        soon: bool = False,
        **fields: object,
    ) -> _Answer:
        """``may_give_up``: tell the node when nobody waits for the answer any more. ``soon``: as :meth:`Channel.send`."""
        try:
            seq, future = self._requests.open()
        except ConnectionError as error:
            raise NodeGoneError(str(error)) from error
        self._channel.send(kind(seq=seq, **fields), soon=soon)
        try:
            async with asyncio.timeout(within_s):
                answer = await future
        except TimeoutError:
            raise NodeGoneError(f"the node did not answer in {within_s:g} s") from None
        except ConnectionError as error:
            raise NodeGoneError(str(error)) from error
        finally:
            self._requests.forget(seq)
            if may_give_up and (not future.done() or future.cancelled()):
                self._channel.send(GiveUp(seq=seq))
        if isinstance(answer, Failed):
            raise NodeGoneError(answer.error)
        if not isinstance(answer, wanted):
            raise NodeGoneError("the node answered something else")
        return answer

    def _on_frame(self, body: bytes, fds: list[int]) -> None:
        doors = [socket.socket(fileno=fd) for fd in fds]
        try:
            frame = self._decoder.decode(body)
        except MALFORMED as error:
            self._on_end(f"the node sent what is no frame ({error})")
            return
        if not isinstance(frame, _Order):
            self._requests.settle(frame)
            return
        task = asyncio.create_task(self._obey(frame, doors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, frame: _Order, doors: list[socket.socket]) -> None:
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
                reply = Done(seq=frame.seq, id=self._cells[frame.cell].update_rules(frame.rules, frame.kit))
            else:
                reply = Failed(seq=frame.seq, error=f"the gateway serves no cell {frame.cell}")
        elif isinstance(frame, ServeRequest):
            reply = await self._serve(frame)
        self._channel.send(reply)

    async def _serve(self, frame: ServeRequest) -> Frame:
        if frame.cell not in self._cells:
            return Failed(seq=frame.seq, error=f"the gateway serves no cell {frame.cell}")
        try:
            return await serve_host_request(self._cells[frame.cell], frame)
        except Exception:  # whatever it failed of, the node is answered
            log.exception("cell %s: a request of the host failed", frame.cell)
            return Failed(seq=frame.seq, error="the model door failed; nothing more was sent: see the gateway's log")

    def _add(self, frame: AddCell, doors: list[socket.socket]) -> None:
        self._cells[frame.cell] = GatewayCell(
            frame.cell,
            run=frame.run,
            episode=frame.episode,
            rules=frame.rules,
            kit=frame.kit,
            tcp=doors[: frame.tcp],
            dns=doors[frame.tcp :],
            node=self,
            resolver=self._resolver,
            vetting=self._vetting,
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
