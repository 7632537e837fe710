"""Which processes start and end in a cell, by looking at /proc: what remains where the kernel does not tell.

Covered: processes that live at a look. A number that is used again, and an exec, are told apart by start time,
executable and the stack's place.
Not covered: processes that start and end between two looks (100 ms while a step is open); their exit codes.
Every SensorStatus of this sensor says ``degraded``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError
from vallum.core.events import AnyEvent, ProcessExited, ProcessStarted
from vallum.core.scope import Attribution, Scope
from vallum.sensors import procfs
from vallum.sensors.base import Hooks, make_status

SENSOR = "proc_poll"
INTERVAL_S = 0.1

Identity = tuple[int, int, str]
"""(start time, place of the stack, exe): another one under the same number is another program."""


@dataclass(slots=True)
class _Known:
    identity: Identity
    scope: Scope
    attribution: Attribution


@dataclass(slots=True)
class _Watched:
    pids: Callable[[], list[int]]
    scope: Scope
    uid_map: list[tuple[int, int, int]]
    known: dict[int, _Known] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class ProcPoll:
    """The sensor. One a node; on the event loop."""

    def __init__(self, hooks: Hooks, why: str) -> None:
        """``why`` is the reason that the proc connector is not used; it is said in every SensorStatus."""
        self._hooks = hooks
        self._why = why
        self._cells: dict[str, _Watched] = {}

    def watch(self, root_pid: int, cell: str, scope: Scope, pids: Callable[[], list[int]]) -> None:
        """Look at the processes that ``pids()`` lists (host pids of the cell without PID 1)."""
        self._cells[cell] = _Watched(pids, scope, procfs.read_uid_map(root_pid))
        self._emit(
            cell,
            make_status(
                SENSOR,
                scope,
                "degraded",
                f"processes are looked for every {INTERVAL_S:g} s while a step is open: {self._why}",
            ),
        )

    def unwatch(self, cell: str) -> None:
        """Forget the cell."""
        watched = self._cells.pop(cell, None)
        if watched is not None and watched.timer is not None:
            watched.timer.cancel()

    def stop(self) -> None:
        """Forget every cell."""
        for cell in list(self._cells):
            self.unwatch(cell)

    def start_polling(self, cell: str) -> None:
        """Sweep now and every ``INTERVAL_S`` until :meth:`stop_polling`: a step has opened."""
        watched = self._cells.get(cell)
        if watched is None or watched.timer is not None:
            return
        self.sweep(cell)
        if cell in self._cells:
            watched.timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._tick, cell)

    def stop_polling(self, cell: str) -> None:
        """No step is open: sweep once more."""
        watched = self._cells.get(cell)
        if watched is not None and watched.timer is not None:
            watched.timer.cancel()
            watched.timer = None
            self.sweep(cell)

    def _tick(self, cell: str) -> None:
        watched = self._cells.get(cell)
        if watched is not None:
            watched.timer = None
            self.start_polling(cell)

    def sweep(self, cell: str) -> int:
        """Look now: emit what started and ended since the last look; how many events that was."""
        watched = self._cells.get(cell)
        if watched is None:
            return 0
        given = 0
        alive = set()
        try:
            for pid in watched.pids():
                seen = procfs.read_process(pid, watched.uid_map)
                if seen is None:
                    continue
                alive.add(pid)
                given += self._look(cell, watched, pid, seen)
            for pid in [p for p in watched.known if p not in alive]:
                given += self._end(cell, watched, pid)
        except RecordError as error:
            self.unwatch(cell)
            self._hooks.record_failed(cell, error)
        return given

    def _look(self, cell: str, watched: _Watched, pid: int, seen: procfs.Seen) -> int:
        identity = (seen.stat.start_ticks, seen.stat.start_stack, seen.process.exe)
        known = watched.known.get(pid)
        if known is not None and known.identity == identity:
            return 0
        given = 0
        if known is not None and known.identity[0] != identity[0]:
            given += self._end(cell, watched, pid)
        scope, attribution = self._hooks.scope_of_pid(cell, pid)
        watched.known[pid] = _Known(identity, scope, attribution)
        self._hooks.emit(
            ProcessStarted(
                t_ns=wall_ns(),
                mono_ns=mono_ns(),
                scope=scope,
                attribution=attribution,
                process=seen.process,
                ppid=seen.ppid,
                sensor=SENSOR,
            ),
        )
        return given + 1

    def _end(self, cell: str, watched: _Watched, pid: int) -> int:
        known = watched.known.pop(pid, None)
        if known is None:
            return 0
        self._hooks.emit(
            ProcessExited(
                t_ns=wall_ns(),
                mono_ns=mono_ns(),
                scope=known.scope,
                attribution=known.attribution,
                pid=pid,
                exit_code=None,
                signal=None,
                sensor=SENSOR,
            ),
        )
        return 1

    def _emit(self, cell: str, event: AnyEvent) -> None:
        try:
            self._hooks.emit(event)
        except RecordError as error:
            self.unwatch(cell)
            self._hooks.record_failed(cell, error)
