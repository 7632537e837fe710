"""The model gateway of one cell behind a plain socket: for tests and benches of what it says, without a cell's walls.

The service, its HTTP server and everything behind them are the real ones; the node is :class:`RecordingNode`, which
keeps what it is told and answers at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from vallum.core.events import AnyEvent, ModelCall, Process
from vallum.core.scope import Attribution, Scope
from vallum.core.verdict import Decision
from vallum.gateway.cell import Charge, GatewayCell, NodeGoneError, Owner
from vallum.gateway.door import Endpoint
from vallum.gateway.http.exchange import Carrier, DeniedError, Exchange, GuestGoneError
from vallum.gateway.http.head import Place
from vallum.gateway.http.server1 import Server1
from vallum.gateway.kit import SERVICE_PORT, Kit, ModelDoor
from vallum.gateway.names import HostResolver
from vallum.gateway.relay import Counters
from vallum.gateway.services.model import ModelService
from vallum.gateway.stream import SocketStream
from vallum.gateway.tls.upstream import Vetting
from vallum.gateway.wire import Attributed, Frame, ProposedCall
from vallum.rules.grants import Ruleset
from vallum.rules.verdicts import FlowFacts

CAPABILITY = "test-capability-0123456789abcdef"


class RecordingNode:
    """What a cell needs of the node, kept in memory. See :class:`vallum.gateway.cell.Node`."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.log: list[str] = []
        """What was asked of it, in order: ``append opened``, ``open_steps b1 a,b``, ``close_steps b1``..."""
        self.steps = 0
        self.decisions: list[Decision] = []
        """Answers to holds, in order; none left denies."""
        self.hold_s = 0.0
        """How long a hold takes."""
        self.step_s = 0.0
        self.is_gone = False
        """Every request fails."""

    def attribute(self, cell: str, protocol: str, src: Endpoint, dst: Endpoint) -> Charge:
        """As the protocol says."""
        del cell, protocol, src, dst
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        answer.set_result(
            Attributed(
                seq=0,
                scope=Scope(run="r-test", episode="e-test", step=0),
                attribution=Attribution(method="cgroup"),
                process=Process(pid=4242, exe="/agent", argv=["agent"]),
                socket_step=None,
            )
        )
        return Charge(0, answer)

    def hurry(self) -> None:
        """As the protocol says."""

    async def append(self, cell: str, event: AnyEvent, charge: Charge | None = None, *, soon: bool = False) -> int:
        """As the protocol says."""
        del cell, charge, soon
        self._check()
        self.events.append(event)
        self.log.append(f"append {event.state if isinstance(event, ModelCall) else type(event).__name__}")
        return len(self.events)

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
        """As the protocol says."""
        del model_call, agent, on_host, pid, step
        self._check()
        await asyncio.sleep(self.step_s)
        self.log.append(f"open_steps {branch} {','.join(call.id for call in calls)}")
        first = self.steps
        self.steps += len(calls)
        steps = tuple(range(first, self.steps))
        if closing is not None:
            await self.append(cell, msgspec.structs.replace(closing, steps=list(steps)))
        return steps

    async def close_steps(self, cell: str, branch: str) -> None:
        """As the protocol says."""
        del cell
        self._check()
        self.log.append(f"close_steps {branch}")

    async def stop_agent(self, cell: str, reason: str) -> None:
        """As the protocol says."""
        del cell, reason
        self._check()
        self.log.append("stop_agent")

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
        """As the protocol says."""
        del cell, flow, timeout_s, src, dst
        self._check()
        self.log.append(f"hold {subject}")
        await asyncio.sleep(self.hold_s)
        return (
            self.decisions.pop(0) if self.decisions else Decision(verdict="deny", rule=rule, reason="nobody answered")
        )

    async def call_tool(self, cell: str, *, name: str, arguments: str, flow: str) -> str:
        """As the protocol says."""
        del cell, name, arguments, flow
        raise NodeGoneError("there are no tools here")

    def _check(self) -> None:
        if self.is_gone:
            raise NodeGoneError("the node has gone")

    @property
    def calls(self) -> list[ModelCall]:
        """The events of model calls, in order."""
        return [event for event in self.events if isinstance(event, ModelCall)]


class _Carrier:
    def __init__(self, cell: GatewayCell, node: RecordingNode) -> None:
        self.id = "flow-test"
        self.cell = cell
        self.facts = FlowFacts(dst_ip="198.18.255.1", dst_port=SERVICE_PORT, protocol="http")
        self.counters = Counters()
        self._node = node

    async def connect(self) -> socket.socket:
        raise ConnectionRefusedError("there is no server behind a model door")

    async def owner(self) -> Owner:
        return await self._node.attribute(self.cell.id, "tcp", ("127.0.0.1", 1), ("127.0.0.1", 2)).owner()


class _Desk:
    def __init__(self, carrier: Carrier) -> None:
        self._service = ModelService(carrier)

    async def answer(self, exchange: Exchange) -> None:
        try:
            await self._service.serve(exchange)
        except DeniedError as error:
            await exchange.refuse(error.decision)
        except (GuestGoneError, NodeGoneError) as error:
            await exchange.abort(str(error))

    async def turn_away(self, decision: Decision) -> None:
        del decision


class ModelDoorServer:
    """Serves a kit's model door on the loopback. Use it as an async context manager."""

    def __init__(self, door: ModelDoor, kit: Kit | None = None) -> None:
        self.node = RecordingNode()
        self._kit = kit or Kit()
        self._door = door
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        """Base URL without a version."""

    async def __aenter__(self) -> Self:
        self.cell = GatewayCell(
            "cell-test",
            run="r-test",
            episode="e-test",
            rules=Ruleset(),
            kit=msgspec.structs.replace(self._kit, model=self._door),
            tcp=(),
            dns=(),
            node=self.node,
            resolver=HostResolver(),
            vetting=Vetting(),
            serve=_refuse,
        )
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        await self.cell.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            conn, _ = await loop.sock_accept(self._listener)
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._serve(conn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, conn: socket.socket) -> None:
        conn.setblocking(False)
        carrier = _Carrier(self.cell, self.node)
        try:
            with contextlib.suppress(OSError):
                server = Server1(
                    SocketStream(conn), carrier, Place(scheme="http", port=conn.getsockname()[1]), _Desk(carrier)
                )
                await server.serve()
        finally:
            conn.close()


async def _refuse(cell: GatewayCell, conn: socket.socket, peer: Endpoint) -> None:
    del cell, peer
    conn.close()
