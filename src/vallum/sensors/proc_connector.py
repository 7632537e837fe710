"""Which processes start and end in a cell, from the kernel's proc connector.

Fork events carry membership from a cell's PID 1 to everything that descends from it, so that events of the
rest of the machine cost one dictionary lookup. The step comes from the process's cgroup (the node's hook);
who its parent is serves only when the process was gone before its cgroup could be read.

Covered: double forks and ``setsid``; CLONE_PARENT (reported under PID 1); an exec from a thread that is not the
leader; a leader that ends before its threads; numbers that are used again; bursts that overflow the socket (counted,
said in a SensorStatus, and members found again through the cell's pid namespace).
Not covered: a process that starts and ends within some tens of microseconds leaves ``exe`` empty; a fork without an exec
is followed but is no event of its own.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import TypeGuard

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import ControlMissing, RecordError
from vallum.core.events import AnyEvent, Process, ProcessExited, ProcessStarted
from vallum.core.scope import BY_NODE, Attribution, Scope
from vallum.sensors import netlink, procfs
from vallum.sensors.base import Hooks, State, make_status
from vallum.sensors.proc_connector_priv import close_connector, open_connector
from vallum.sensors.proc_events import Exec, Exit, Fork, ProcEvent, parse

SENSOR = "proc_connector"
_BATCH = 256
"""Events taken per turn of the loop, so that a cell that forks in a loop does not starve the gateway."""
_AHEAD = 64
"""Batches that are looked through for a further exec of one process."""
_LINGER_S = 0.05
_PUT_OFF_S = 0.002
"""How long an end, or the fork of a child that waits for its command, may wait to be looked into: whoever waits for the result
of a command is answered first. Nothing perishes meanwhile: the end is in the event, and such a child does not end by itself."""
_RECOVER_EVERY_S = 1.0
_LINEAGE = 0.8
"""Confidence of a step that is a live parent's: the parent may have been moved between fork and reading."""


@dataclass(slots=True)
class _Member:
    """What is remembered of a living process of a cell."""

    cell: str
    scope: Scope
    attribution: Attribution
    announced: bool = False
    """Whether a ProcessStarted was given, so that only those end with a ProcessExited."""
    execs: int = 0
    """Programs that it has executed since its fork."""
    ended: Exit | None = None
    """The leader's end while its threads live on."""


@dataclass(slots=True)
class _Watched:
    root: int
    scope: Scope
    uid_map: list[tuple[int, int, int]]
    pids: set[int] = field(default_factory=set)


class ProcConnector:
    """The sensor. One a node; on the event loop; its methods return at once.

    ``dropped`` counts the times the kernel said that events were lost, ``malformed`` datagrams that were not understood.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._members: dict[int, _Member] = {}
        self._cells: dict[str, _Watched] = {}
        self._roots: set[int] = set()
        self._linger: asyncio.TimerHandle | None = None
        self._recovery: asyncio.TimerHandle | None = None
        self._recovered_at = float("-inf")
        self._ahead: deque[ProcEvent] = deque()
        """Told by the kernel, not looked at yet."""
        self._put_off: list[Fork | Exit] = []
        """In the order in which they happened."""
        self._put_off_pids: set[int] = set()
        self._put_off_due: asyncio.TimerHandle | None = None
        self.dropped = 0
        self.malformed = 0

    def start(self) -> None:
        """Begin to listen on the running loop.

        Raises:
            ControlMissing: the kernel does not tell; use ``ProcPoll``.
        """
        self._socket = open_connector()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def stop(self) -> None:
        """Stop listening and forget every cell."""
        for cell in list(self._cells):
            self.unwatch(cell)
        for timer in filter(None, (self._linger, self._recovery, self._put_off_due)):
            timer.cancel()
        self._linger = self._recovery = self._put_off_due = None
        self._put_off.clear()
        self._put_off_pids.clear()
        if self._socket is not None and self._loop is not None:
            self._loop.remove_reader(self._socket)
            close_connector(self._socket)
            self._socket = None

    def watch(self, root_pid: int, cell: str, scope: Scope, *, is_new: bool = False) -> None:
        """Follow what descends from ``root_pid``, the host pid of the cell's PID 1, and say so in a SensorStatus.

        ``scope`` is the cell's (run and episode). PID 1 itself is ours and gives no events. Call it before the
        first command; what runs already is found through the pid namespace, which costs a look at every process of
        the machine and is left out when the caller knows that nothing can (``is_new``).
        """
        watched = _Watched(root_pid, scope, procfs.read_uid_map(root_pid))
        self._cells[cell] = watched
        self._roots.add(root_pid)
        self._adopt(root_pid, cell, scope, BY_NODE)
        if not is_new:
            try:
                self._find_members(cell, watched)
            except RecordError as error:
                self._let_go(cell, error)
        self._status(cell, "watching", "fork, exec and exit of every process")

    def unwatch(self, cell: str) -> None:
        """Forget the cell. Events of its processes that come later are nobody's."""
        watched = self._cells.pop(cell, None)
        if watched is None:
            return
        self._roots.discard(watched.root)
        for pid in watched.pids:
            self._members.pop(pid, None)

    def execs_of(self, pid: int) -> int:
        """How many programs a process of a watched cell has executed since its fork, as far as it was told (0: none)."""
        self.drain()
        member = self._members.get(pid)
        return 0 if member is None else member.execs

    def drain(self) -> None:
        """Take what the kernel has told so far: called when a step closes, so that its processes are counted."""
        for _ in range(64):
            if self._socket is None or not self._read():
                break
        self._take_put_off()

    # -- reading ---------------------------------------------------------------------------------

    def settled_execs_of(self, pid: int) -> int:
        """How many programs ``pid`` has executed since its fork, when that is all that the kernel has told by now: what was
        read of its arguments before is then of the last one. 0 when more are waiting, or nobody knows."""
        member = self._members.get(pid)
        if member is None or not member.execs:
            return 0
        is_more = True
        for _ in range(_AHEAD):
            if not (is_more := self._fill()):
                break
        if self._ahead and self._loop is not None:
            self._loop.call_soon(self._read)  # when nothing comes after them, nobody else looks at them
        is_settled = not is_more and not any(isinstance(event, Exec) and event.pid == pid for event in self._ahead)
        return member.execs if is_settled else 0

    def _read(self) -> bool:
        """Take at most a batch; whether there may be more."""
        is_more = self._fill()
        while self._ahead:
            event = self._ahead.popleft()
            pids = _pids_of(event)
            if self._members.keys().isdisjoint(pids) and self._put_off_pids.isdisjoint(pids):
                continue  # of the rest of the machine, nearly always
            if self._may_wait(event):
                self._defer(event)
                continue
            if not self._put_off_pids.isdisjoint(pids):
                self._take_put_off()  # in the order in which they happened: a number may be used again
            self._take_safely(event)
        return is_more

    def _may_wait(self, event: ProcEvent) -> TypeGuard[Fork | Exit]:
        if isinstance(event, Exit):
            return event.pid in self._members or event.pid in self._put_off_pids
        return isinstance(event, Fork) and event.parent in self._roots

    def _fill(self) -> bool:
        """Put at most a batch of what the kernel has told into the queue; whether there may be more."""
        sock = self._socket
        if sock is None:
            return False
        for _ in range(_BATCH):
            try:
                data, (port, _) = sock.recvfrom(65536)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    self._go_blind(error)
                    return False
                self.dropped += 1
                self._recover_soon()
                continue
            if port != 0:
                continue  # not the kernel
            try:
                self._ahead += parse(data)
            except netlink.MalformedNetlinkError:
                self.malformed += 1
        return True

    def _defer(self, event: Fork | Exit) -> None:
        self._put_off.append(event)
        self._put_off_pids.update(_pids_of(event))
        if self._put_off_due is None and self._loop is not None:
            self._put_off_due = self._loop.call_later(_PUT_OFF_S, self._take_put_off)

    def _take_put_off(self) -> None:
        if self._put_off_due is not None:
            self._put_off_due.cancel()
            self._put_off_due = None
        events, self._put_off = self._put_off, []
        self._put_off_pids.clear()
        for event in events:
            self._take_safely(event)

    def _take_safely(self, event: ProcEvent) -> None:
        member = self._members.get(event.parent if isinstance(event, Fork) else event.pid)
        try:
            self._take(event)
        except RecordError as error:
            if member is not None:
                self._let_go(member.cell, error)

    def _take(self, event: ProcEvent) -> None:
        if isinstance(event, Fork):
            parent = self._members.get(event.parent)
            if (stale := self._members.get(event.child)) is not None:
                # The number was free when the process was made: whatever it stood for has ended unseen.
                self._end(Exit(event.child, None, None), stale)
            if parent is not None:
                self._fork(event, parent)
        elif isinstance(event, Exec):
            member = self._members.get(event.pid)
            if member is not None:
                self._exec(event.pid, member)
        else:
            member = self._members.get(event.pid)
            if member is not None:
                self._exit(event, member)

    def _fork(self, event: Fork, parent: _Member) -> None:
        cell = parent.cell
        scope, attribution = self._hooks.scope_of_pid(cell, event.child)
        if scope.step is None:
            scope, attribution = self._hooks.scope_of_pid(cell, event.parent)
            if scope.step is None:
                scope = parent.scope
            attribution = Attribution(method="lineage", confidence=_LINEAGE)
        self._adopt(event.child, cell, scope, attribution)

    def _exec(self, pid: int, member: _Member) -> None:
        watched = self._cells[member.cell]
        if pid == watched.root:
            return
        member.execs += 1
        member.ended = None  # a thread that execs takes the place of a leader that has ended
        seen = procfs.read_process(pid, watched.uid_map)  # first: argv is what perishes soonest
        scope, attribution = self._hooks.scope_of_pid(member.cell, pid)
        if scope.step is not None:
            member.scope, member.attribution = scope, attribution
        self._announce(pid, member, seen)

    def _announce(self, pid: int, member: _Member, seen: procfs.Seen | None) -> None:
        member.announced = True
        self._emit(
            member.cell,
            ProcessStarted(
                t_ns=wall_ns(),
                mono_ns=mono_ns(),
                scope=member.scope,
                attribution=member.attribution,
                process=seen.process if seen else Process(pid=pid, exe="", argv=[]),
                ppid=seen.ppid if seen else 0,
                sensor=SENSOR,
            ),
        )

    def _exit(self, event: Exit, member: _Member) -> None:
        if procfs.is_alive(event.pid):
            member.ended = event
            self._linger_soon()
            return
        self._end(event, member)

    def _end(self, event: Exit, member: _Member) -> None:
        self._forget(event.pid)
        if member.announced:
            self._emit(
                member.cell,
                ProcessExited(
                    t_ns=wall_ns(),
                    mono_ns=mono_ns(),
                    scope=member.scope,
                    attribution=member.attribution,
                    pid=event.pid,
                    exit_code=event.code,
                    signal=event.signal,
                    sensor=SENSOR,
                ),
            )

    def _linger_soon(self) -> None:
        if self._linger is None and self._loop is not None:
            self._linger = self._loop.call_later(_LINGER_S, self._look_at_lingering)

    def _look_at_lingering(self) -> None:
        self._linger = None
        waiting = [(member.ended, member) for member in self._members.values() if member.ended is not None]
        for ended, member in waiting:
            if not procfs.is_alive(ended.pid):
                self._end(ended, member)
            elif (stat := procfs.read_stat(ended.pid)) is not None and not stat.is_dead:
                member.ended = None  # an exec gave the process a new leader
            else:
                self._linger_soon()

    # -- membership ------------------------------------------------------------------------------

    def _adopt(self, pid: int, cell: str, scope: Scope, attribution: Attribution) -> _Member:
        member = self._members[pid] = _Member(cell, scope, attribution)
        self._cells[cell].pids.add(pid)
        return member

    def _forget(self, pid: int) -> None:
        member = self._members.pop(pid, None)
        if member is not None and (watched := self._cells.get(member.cell)) is not None:
            watched.pids.discard(pid)

    def _find_members(self, cell: str, watched: _Watched) -> None:
        """Adopt and announce what is in the cell's pid namespace and was not known."""
        for pid in procfs.pids_of_namespace(watched.root) or ():
            if pid in self._members or self._cells.get(cell) is not watched:
                continue
            scope, attribution = self._hooks.scope_of_pid(cell, pid)
            member = self._adopt(pid, cell, scope, attribution)
            if (seen := procfs.read_process(pid, watched.uid_map)) is not None:
                self._announce(pid, member, seen)

    def _recover_soon(self) -> None:
        """Look again now, or, within a second of the last time, later: looking costs every process of the machine."""
        if self._recovery is None and self._loop is not None:
            wait_s = max(0.0, self._recovered_at + _RECOVER_EVERY_S - self._loop.time())
            self._recovery = self._loop.call_later(wait_s, self._recover)

    def _recover(self) -> None:
        """Events were lost: end what is gone, find what is new, and say that something may have been missed."""
        self._recovery = None
        if self._loop is not None:
            self._recovered_at = self._loop.time()
        for cell, watched in list(self._cells.items()):
            for pid in [p for p in watched.pids if p != watched.root and not procfs.is_alive(p)]:
                if (member := self._members.get(pid)) is not None:
                    self._end(Exit(pid, None, None), member)
            try:
                self._find_members(cell, watched)
            except RecordError as error:
                self._let_go(cell, error)
            self._status(cell, "degraded", "the kernel dropped process events; living processes were found again")

    def _go_blind(self, error: OSError) -> None:
        if self._socket is not None and self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for cell in list(self._cells):
            self._status(cell, "blind", f"the kernel's process events ended: {error.strerror}")

    # -- telling ---------------------------------------------------------------------------------

    def _status(self, cell: str, state: State, detail: str) -> None:
        watched = self._cells.get(cell)
        if watched is None:
            return
        self._emit(
            cell,
            make_status(SENSOR, watched.scope, state, detail, self.dropped),
        )

    def _emit(self, cell: str, event: AnyEvent) -> None:
        try:
            self._hooks.emit(event)
        except RecordError as error:
            self._let_go(cell, error)

    def _let_go(self, cell: str, error: RecordError) -> None:
        """The cell cannot be recorded any more: stop before saying so, as the node may come back to us at once."""
        self.unwatch(cell)
        self._hooks.record_failed(cell, error)


def _pids_of(event: ProcEvent) -> tuple[int, ...]:
    """The processes that it speaks of."""
    return (event.child, event.parent) if isinstance(event, Fork) else (event.pid,)


def probe() -> str:
    """``enforced``, or ``degraded: why; remedy`` by having asked the kernel to tell."""
    try:
        close_connector(open_connector())
    except ControlMissing as error:
        return f"degraded: {error}; /proc is polled instead, and processes shorter than 100 ms are missed"
    return "enforced"
