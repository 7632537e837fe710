"""What node and gateway say to each other, and the channel that carries it (with descriptors) over a Unix socket.

Each side numbers its own requests; an answer carries the number of its request. Both sides bound and check what
they read: the gateway reads hostile bytes for a living, so the node does not trust its frames either.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from vallum.core.events import AnyEvent, ModelCall, Process
from vallum.core.scope import Attribution, Scope
from vallum.core.verdict import Decision
from vallum.gateway.kit import Kit
from vallum.rules.grants import Ruleset

MAX_FRAME = 16 * 1024 * 1024
MAX_DESCRIPTORS = 64
_HEADER = struct.Struct("!IB")
_RECEIVE_BYTES = 256 * 1024
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
_RIGHTS_BYTES = socket.CMSG_LEN(MAX_DESCRIPTORS * 4)
# Plain numbers: arithmetic with members of an enum costs as much as the system call.
_CLOEXEC, _CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame"):
    """Fields of every frame."""

    seq: int
    """Number of the request, given by whoever asks."""


class AddCell(Frame, frozen=True, tag="add_cell"):
    """Node: serve these doors. Its descriptors are ``tcp`` listeners, then ``dns`` sockets."""

    cell: str
    run: str
    episode: str | None
    rules: Ruleset
    tcp: int
    dns: int
    kit: Kit = Kit()


class RemoveCell(Frame, frozen=True, tag="remove_cell"):
    """Node: close the doors of a cell and cut its flows. Answered when their last events are recorded."""

    cell: str


class UpdateRules(Frame, frozen=True, tag="update_rules"):
    """Node: judge by these from now on; flows that they deny are cut. Answered with how many were."""

    cell: str
    rules: Ruleset
    kit: Kit | None = None
    """None keeps the kit as it is."""


class ProposedCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call in a model's reply."""

    id: str
    name: str
    arguments: str
    """JSON."""


class OpenSteps(Frame, frozen=True, tag="open_steps"):
    """Gateway: a reply with these calls is about to reach the agent of the cell; open a step for each (write-ahead).

    Answered with :class:`StepsOpened` once their records are written and the agent's runtime has been put where its
    children will be charged to them. The steps of an earlier reply of the same ``branch`` are closed first.
    """

    cell: str
    branch: str
    model_call: str
    calls: tuple[ProposedCall, ...]
    agent: str = ""
    pid: int | None = None
    """Host pid of the process that holds the model connection, as the node said when it attributed it."""
    step: int | None = None
    """Step that the model connection is charged to; says more than nothing where no process was seen holding it."""
    on_host: bool = False
    """A client on the host asked (:class:`ServeRequest`), not the guest."""
    closing: ModelCall | None = None
    """The reply's own record: written once the steps are open, with their numbers, before the answer. What this takes is added
    to its durations. So opening and recording cost one wait."""


class StepsOpened(Frame, frozen=True, tag="steps_opened"):
    """Node: the answer to :class:`OpenSteps`, in the order of its calls."""

    steps: tuple[int, ...]


class CloseSteps(Frame, frozen=True, tag="close_steps"):
    """Gateway: the branch has gone on (its next request has come, or it ended): its steps are over. Answered ``Done``."""

    cell: str
    branch: str


class StopAgent(Frame, frozen=True, tag="stop_agent"):
    """Gateway: freeze the cell; a 404 is sent only after ``Done``."""

    cell: str
    reason: str


class Hold(Frame, frozen=True, tag="hold"):
    """Gateway: this waits for a person. Answered with :class:`Decided`, at the latest when its time is over.

    The node records the request and the decision.
    """

    cell: str
    subject: str
    rule: str
    flow: str
    timeout_s: float
    src: tuple[str, int] | None = None
    dst: tuple[str, int] | None = None


class Decided(Frame, frozen=True, tag="decided"):
    """Node: what became of a :class:`Hold`. A timeout denies."""

    decision: Decision


class GiveUp(Frame, frozen=True, tag="give_up"):
    """Gateway: whoever waits for the answer to request ``seq`` has gone; what is done for it may end. Not answered itself."""


class CallTool(Frame, frozen=True, tag="call_tool"):
    """Gateway: the guest calls a tool of the host. Answered with :class:`ToolAnswered`."""

    cell: str
    name: str
    arguments: str
    flow: str


class ToolAnswered(Frame, frozen=True, tag="tool_answered"):
    """Node: what the tool said; JSON of an MCP ``CallToolResult``."""

    result: str


class ServeRequest(Frame, frozen=True, tag="serve_request"):
    """Node: answer this HTTP request of a client on the host as if it had come through the cell's model door.

    How an agent that runs outside of the cell has its model calls judged, budgeted and recorded like any other's.
    """

    cell: str
    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Served(Frame, frozen=True, tag="served"):
    """Gateway: the answer to :class:`ServeRequest`."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Ping(Frame, frozen=True, tag="ping"):
    """Node: are you there?"""


class Attribute(Frame, frozen=True, tag="attribute"):
    """Gateway: who opened this socket of the cell?"""

    cell: str
    protocol: str
    src: tuple[str, int]
    dst: tuple[str, int]


class Append(Frame, frozen=True, tag="append"):
    """Gateway: record this event of the cell. Answered ``Done``, after the answer to ``charge``."""

    cell: str
    event: AnyEvent
    charge: int | None = None
    """Number of an :class:`Attribute` of this cell, used once: its answer says whose the event is, in place of what stands there.
    So a fact is attributed and written at the price of one wait."""


class Done(Frame, frozen=True, tag="done"):
    """Either: it is done. ``id`` is an appended event's number."""

    id: int = 0


class Attributed(Frame, frozen=True, tag="attributed"):
    """Node: the answer to :class:`Attribute`."""

    scope: Scope
    attribution: Attribution
    process: Process | None
    socket_step: int | None


class Failed(Frame, frozen=True, tag="failed"):
    """Either: it was not done, and why in one sentence."""

    error: str


FromNode = (
    AddCell
    | RemoveCell
    | UpdateRules
    | Ping
    | ServeRequest
    | Attributed
    | StepsOpened
    | Decided
    | ToolAnswered
    | Done
    | Failed
)
Request = Attribute | Append | OpenSteps | CloseSteps | StopAgent | Hold | CallTool
"""What the gateway asks the node."""
FromGateway = Request | GiveUp | Served | Done | Failed


class Channel:
    """Frames over a connected Unix stream socket, non-blocking, with descriptors beside them."""

    def __init__(
        self, sock: socket.socket, on_frame: Callable[[bytes, list[int]], None], on_end: Callable[[str], None]
    ) -> None:
        """``on_frame`` owns the descriptors that it is given. ``on_end`` is called once, with the reason."""
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._on_end = on_end
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._in = bytearray()
        self._in_fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._soon = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._is_waiting = False
        self.is_open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, frame: Frame, fds: Sequence[int] = (), *, soon: bool = False, within_s: float = 0.0) -> None:
        """Queue a frame. The descriptors are duplicated by the kernel when it leaves; the copies kept are closed then.

        ``soon``: it may wait for others of this turn of the loop, and leave with them in one piece; with ``within_s`` it may wait
        so long for others.
        """
        if not self.is_open:
            return
        body = self._encoder.encode(frame)
        data = _HEADER.pack(len(body), len(fds)) + body
        if fds:
            self.flush()
            self._queue(data, [os.dup(fd) for fd in fds])
            return
        if soon and within_s:
            if self._timer is None:
                self._timer = self._loop.call_later(within_s, self.flush)
        elif soon and (not self._soon or self._timer is not None):
            self._loop.call_soon(self.flush)
        self._soon += data
        if not soon:
            self.flush()

    def flush(self) -> None:
        """Send now what was to be sent soon."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._soon and self.is_open:
            data, self._soon = self._soon, bytearray()
            self._queue(data, [])

    def _queue(self, data: bytes | bytearray, fds: list[int]) -> None:
        self._out.append((memoryview(data), fds))
        if len(self._out) == 1:
            self._writable()

    def close(self, reason: str = "closed") -> None:
        """Close the socket and everything waiting."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for fd in [*self._in_fds, *(fd for _, fds in self._out for fd in fds)]:
            os.close(fd)
        self._out.clear()
        self._in_fds.clear()
        self._on_end(reason)

    def _writable(self) -> None:
        while self._out:
            data, fds = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([data], rights)
            except BlockingIOError:
                if not self._is_waiting:
                    self._is_waiting = True
                    self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError as error:
                self.close(f"cannot be written to ({error.strerror})")
                return
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._out[0] = (data[sent:], [])
            else:
                self._out.popleft()
        if self._is_waiting:
            self._is_waiting = False
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], _RIGHTS_BYTES, _CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"cannot be read from ({error.strerror})")
            return
        for level, kind, value in ancillary:
            if (level, kind) == _RIGHTS:
                self._in_fds.extend(array.array("i", value[: len(value) - len(value) % 4]))
        if flags & _CTRUNC:
            self.close("more descriptors came than are allowed")
            return
        if not size:
            self.close("the other side ended")
            return
        self._in += self._buffer[:size]
        self._split()

    def _split(self) -> None:
        at = 0
        try:
            while self.is_open and len(self._in) - at >= _HEADER.size:
                length, count = _HEADER.unpack_from(self._in, at)
                if length > MAX_FRAME or count > MAX_DESCRIPTORS:
                    self.close("a frame is larger than allowed")
                    return
                end = at + _HEADER.size + length
                if end > len(self._in):
                    break
                if count > len(self._in_fds):
                    self.close("a frame came without its descriptors")
                    return
                body = bytes(self._in[at + _HEADER.size : end])
                at = end
                self._on_frame(body, [self._in_fds.popleft() for _ in range(count)])
        finally:
            del self._in[:at]  # whatever became of a frame, none is given out twice


class Requests:
    """Numbers requests and waits for their answers."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._next = 0
        self._ended: str | None = None
        self._loop = asyncio.get_running_loop()

    def open(self, within_s: float | None = None) -> tuple[int, asyncio.Future[Frame]]:
        """A number for a new request, and the future of its answer.

        ``within_s``: how long the answer may take, the same for all requests that give it; see :meth:`expire`. One clock for
        many requests costs less than a timer each.

        Raises:
            ConnectionError: the other side has gone.
        """
        if self._ended is not None:
            raise ConnectionResetError(self._ended)
        self._next += 1
        future: asyncio.Future[Frame] = self._loop.create_future()
        self._waiting[self._next] = future
        if within_s is not None:
            self._due.append((self._loop.time() + within_s, self._next))
        return self._next, future

    def expire(self) -> None:
        """Give TimeoutError to who has waited for too long. To be called every second or so."""
        now = self._loop.time()
        while self._due and self._due[0][0] <= now:
            future = self._waiting.pop(self._due.popleft()[1], None)
            if future is not None and not future.done():
                future.set_exception(TimeoutError("no answer came in time"))

    def settle(self, frame: Frame) -> None:
        """Give an answer to whoever waits for it. An answer that nobody waits for is ignored."""
        future = self._waiting.pop(frame.seq, None)
        if future is not None and not future.done():
            future.set_result(frame)

    def forget(self, seq: int) -> None:
        """Wait no longer."""
        self._waiting.pop(seq, None)

    def end(self, reason: str) -> None:
        """The other side has gone: everyone who waits gets ConnectionResetError."""
        self._ended = reason
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError(reason))
