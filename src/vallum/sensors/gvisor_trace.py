"""What the processes of a gVisor cell do, from the reports of that cell's own kernel.

The host sees one process, the guest's kernel, whoever in it acts; so processes and the owners of connections come from
what it reports. It is a kernel that the guest would have to break first, not the host's: facts carry ``lineage`` and a
confidence below 1.

The rule of charging a connection: every TCP connect is reported before it is made, with its target but without its local
port, so a flow belongs to a reported connect to that target which no flow has claimed yet.

1. All of them by processes of one step: that step.
2. Of several steps: the earliest report, confidence 0.3.
3. None: not known here; the node may still know that only one step can have done it.

Covered: forks, execs and exits of every process; TCP and connected UDP, such as the C library's resolver.
Not covered: a connect that a guest lets fail on purpose leaves a report that a later flow to the same target may claim
(rule 2 says 0.3 then); the target of an unconnected datagram; an exec with more arguments than a datagram holds (some 200 KB), which
is counted as lost in a SensorStatus.
"""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError
from vallum.core.events import AnyEvent, Process, ProcessExited, ProcessStarted
from vallum.core.scope import Attribution, Scope
from vallum.sensors import procfs
from vallum.sensors.base import Hooks, State, make_status

SENSOR = "gvisor_trace"
_SEVERAL = 0.3
_REMEMBER_NS = 30_000_000_000
_MOST_CONNECTS = 4096


@dataclass(slots=True)
class _Connect:
    mono_ns: int
    target: tuple[str, int]
    scope: Scope
    attribution: Attribution
    process: Process | None
    is_claimed: bool = False


@dataclass(slots=True)
class _Watched:
    scope: Scope
    dropped: Callable[[], int]
    told_dropped: int = 0
    running: dict[int, Process] = field(default_factory=dict)
    connects: deque[_Connect] = field(default_factory=lambda: deque(maxlen=_MOST_CONNECTS))


class GvisorTrace:
    """The sensor. One a node; on the event loop."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._cells: dict[str, _Watched] = {}

    def watch(self, cell: str, scope: Scope, dropped: Callable[[], int]) -> CellListener:
        """Begin; the result is what the cell tells (``vallum.sandbox.traced.TraceListener``)."""
        self._cells[cell] = _Watched(scope, dropped)
        self._status(
            cell, "watching", "exec and exit of every process, and every connect, told by the cell's own kernel"
        )
        return CellListener(self, cell)

    def unwatch(self, cell: str) -> None:
        """Forget the cell."""
        self._cells.pop(cell, None)

    def has(self, cell: str) -> bool:
        """Whether ``cell`` is one of these."""
        return cell in self._cells

    def attribute(
        self, cell: str, *, protocol: str, dst: tuple[str, int]
    ) -> tuple[Scope, Attribution, Process | None, int | None]:
        """Who connects to ``dst``; see this module's rule. Preconditions: the cell's reports have been taken.

        Raises:
            KeyError: the cell is not watched.
        """
        watched = self._cells[cell]
        since = mono_ns() - _REMEMBER_NS
        target = (_plain(dst[0]), dst[1])
        found = [c for c in watched.connects if c.target == target and c.mono_ns >= since]
        waiting = [c for c in found if not c.is_claimed] or ([] if protocol == "tcp" else found)
        if not waiting:
            return watched.scope, Attribution(method="netns", confidence=0.5), None, None
        first = waiting[0]
        first.is_claimed = True
        is_sure = len({c.scope.step for c in waiting}) == 1 and watched.dropped() == 0
        confidence = first.attribution.confidence if is_sure else min(first.attribution.confidence, _SEVERAL)
        return first.scope, Attribution(method=first.attribution.method, confidence=confidence), first.process, None

    # ------------------------------------------------------------------ told by the cell

    def note_start(self, cell: str, pid: int, ppid: int, exe: str, argv: list[str], uid: int | None) -> None:
        """A process runs a program."""
        watched = self._cells.get(cell)
        if watched is None:
            return
        raw = "\0".join(argv).encode("utf-8", "surrogateescape")
        kept = procfs.parse_argv(raw[: procfs.ARGV_BYTES], complete=len(raw) <= procfs.ARGV_BYTES)
        process = watched.running[pid] = Process(pid=pid, exe=exe, argv=kept, uid=uid)
        scope, attribution = self._whose(cell, watched, pid)
        self._emit(
            cell,
            ProcessStarted(
                t_ns=wall_ns(),
                mono_ns=mono_ns(),
                scope=scope,
                attribution=attribution,
                process=process,
                ppid=ppid,
                sensor=SENSOR,
            ),
        )
        self._note_dropped(cell, watched)

    def note_exit(self, cell: str, pid: int, status: int) -> None:
        """A process has ended. One that never ran a program of its own gives no event, as everywhere."""
        watched = self._cells.get(cell)
        if watched is None or watched.running.pop(pid, None) is None:
            return
        scope, attribution = self._whose(cell, watched, pid)
        signalled = os.WIFSIGNALED(status)
        self._emit(
            cell,
            ProcessExited(
                t_ns=wall_ns(),
                mono_ns=mono_ns(),
                scope=scope,
                attribution=attribution,
                pid=pid,
                exit_code=None if signalled else os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status) if signalled else None,
                sensor=SENSOR,
            ),
        )

    def note_connect(self, cell: str, pid: int, address: str, port: int) -> None:
        """A process is about to connect."""
        watched = self._cells.get(cell)
        if watched is None:
            return
        scope, attribution = self._whose(cell, watched, pid)
        process = watched.running.get(pid)
        watched.connects.append(_Connect(mono_ns(), (_plain(address), port), scope, attribution, process))

    def note_blind(self, cell: str, why: str) -> None:
        """The cell's kernel does not report any more."""
        self._status(cell, "blind", why)

    # ------------------------------------------------------------------ telling

    def _whose(self, cell: str, watched: _Watched, pid: int) -> tuple[Scope, Attribution]:
        try:
            return self._hooks.scope_of_pid(cell, pid)
        except RecordError:  # it is ending
            return watched.scope, Attribution(method="netns", confidence=0.5)

    def _note_dropped(self, cell: str, watched: _Watched) -> None:
        lost = watched.dropped()
        if lost > watched.told_dropped:
            watched.told_dropped = lost
            self._status(cell, "degraded", "reports of the cell's kernel were lost; steps cannot be told for sure")

    def _status(self, cell: str, state: State, detail: str) -> None:
        watched = self._cells.get(cell)
        if watched is None:
            return
        self._emit(
            cell,
            make_status(SENSOR, watched.scope, state, detail, watched.dropped()),
        )

    def _emit(self, cell: str, event: AnyEvent) -> None:
        try:
            self._hooks.emit(event)
        except RecordError as error:
            self.unwatch(cell)
            self._hooks.record_failed(cell, error)


class CellListener:
    """What one cell tells the sensor."""

    def __init__(self, sensor: GvisorTrace, cell: str) -> None:
        self._sensor = sensor
        self._cell = cell

    def started(self, pid: int, ppid: int, exe: str, argv: list[str], uid: int | None) -> None:
        """A process runs a program."""
        self._sensor.note_start(self._cell, pid, ppid, exe, argv, uid)

    def exited(self, pid: int, status: int) -> None:
        """A process has ended."""
        self._sensor.note_exit(self._cell, pid, status)

    def connected(self, pid: int, address: str, port: int) -> None:
        """A process is about to connect a socket."""
        self._sensor.note_connect(self._cell, pid, address, port)

    def blind(self, why: str) -> None:
        """Nothing more will be told."""
        self._sensor.note_blind(self._cell, why)


def _plain(address: str) -> str:
    """One spelling for each address; IPv4 in IPv6 is IPv4."""
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
