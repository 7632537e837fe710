"""What a cell and its steps use, sampled: every second while something runs, less and less often while nothing does.

Numbers are the kernel's own accounting (the node's ``usage`` hook); this module only decides when to look and whether
there is anything new to say.

Covered: the whole cell while it lives; a step while it is open, and once when it closes.
Not covered: peaks between two looks, other than those that the kernel itself keeps (``memory_peak_bytes``, ``oom_kills``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError, SandboxError
from vallum.core.events import ResourceSample
from vallum.core.scope import BY_NODE, Scope
from vallum.sensors.base import Hooks

BUSY_S = 1.0
IDLE_S = 10.0
_MIB = 1024 * 1024


class UsageLike(Protocol):
    """What the kernel's accounting says (``vallum.sandbox.base.Usage``)."""

    @property
    def cpu_ns(self) -> int | None:
        """CPU time used."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """Memory charged now."""
        ...

    @property
    def memory_peak_bytes(self) -> int | None:
        """The most there was."""
        ...

    @property
    def pids(self) -> int | None:
        """Processes and threads alive."""
        ...

    @property
    def oom_kills(self) -> int | None:
        """Kills for want of memory."""
        ...


Reading = tuple[int | None, int | None, int | None, int | None, int | None]


def is_news(old: Reading | None, new: Reading) -> bool:
    """Whether a reading says something that the last one told did not.

    10 ms of CPU, 1 MiB or 1% of memory, another number of processes, an out-of-memory kill.
    """
    if old is None:
        return True
    for index, least in ((0, 10_000_000), (1, max(_MIB, (old[1] or 0) // 100)), (2, max(_MIB, (old[2] or 0) // 100))):
        before, now = old[index], new[index]
        if (before is None) != (now is None) or (before is not None and now is not None and abs(now - before) >= least):
            return True
    return old[3:] != new[3:]


def next_wait_s(wait_s: float, *, has_news: bool) -> float:
    """Seconds until the next look: 1 after news, then half as long again each time, at most 10."""
    return BUSY_S if has_news else min(IDLE_S, wait_s * 1.5)


@dataclass(slots=True)
class _Watched:
    usage: Callable[[int | None], UsageLike]
    scope_of_step: Callable[[int | None], Scope]
    last: dict[int | None, Reading] = field(default_factory=dict)
    open_steps: set[int] = field(default_factory=set)
    wait_s: float = BUSY_S
    timer: asyncio.TimerHandle | None = None


class ResourceSampler:
    """The sensor. One a node; on the event loop."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._cells: dict[str, _Watched] = {}

    def watch(
        self, cell: str, usage: Callable[[int | None], UsageLike], scope_of_step: Callable[[int | None], Scope]
    ) -> None:
        """Sample ``cell`` from now on. ``usage(None)`` is of the whole cell, ``scope_of_step(None)`` its scope."""
        self._cells[cell] = _Watched(usage, scope_of_step)
        self._tick(cell)

    def unwatch(self, cell: str) -> None:
        """Forget the cell."""
        watched = self._cells.pop(cell, None)
        if watched is not None and watched.timer is not None:
            watched.timer.cancel()

    def stop(self) -> None:
        """Forget every cell."""
        for cell in list(self._cells):
            self.unwatch(cell)

    def open_step(self, cell: str, step: int) -> None:
        """Sample the step, too, and look again within a second."""
        watched = self._cells.get(cell)
        if watched is not None:
            watched.open_steps.add(step)
            if watched.wait_s > BUSY_S or watched.timer is None:
                watched.wait_s = BUSY_S
                self._schedule(cell, watched)

    def close_step(self, cell: str, step: int, usage: UsageLike) -> ResourceSample | None:
        """The last sample of the step, whatever the one before said, for the caller to record; None for an unknown cell."""
        watched = self._cells.get(cell)
        if watched is None:
            return None
        watched.open_steps.discard(step)
        watched.last.pop(step, None)
        return _sample(watched, step, _read(usage))

    def _tick(self, cell: str) -> None:
        watched = self._cells.get(cell)
        if watched is None:
            return
        news = [self._look(cell, watched, step) for step in (None, *sorted(watched.open_steps))]
        if cell in self._cells:
            watched.wait_s = next_wait_s(watched.wait_s, has_news=any(news))
            self._schedule(cell, watched)

    def _schedule(self, cell: str, watched: _Watched) -> None:
        if watched.timer is not None:
            watched.timer.cancel()
        watched.timer = asyncio.get_running_loop().call_later(watched.wait_s, self._tick, cell)

    def _look(self, cell: str, watched: _Watched, step: int | None) -> bool:
        """Emit a sample if there is news; whether there was."""
        try:
            usage = watched.usage(step)
        except (SandboxError, OSError):
            return False  # it is ending; its last sample is the one of the step's close
        now = _read(usage)
        if not is_news(watched.last.get(step), now):
            return False
        watched.last[step] = now
        try:
            self._hooks.emit(_sample(watched, step, now))
        except RecordError as error:
            self.unwatch(cell)
            self._hooks.record_failed(cell, error)
        return True


def _read(usage: UsageLike) -> Reading:
    return (usage.cpu_ns, usage.memory_bytes, usage.memory_peak_bytes, usage.pids, usage.oom_kills)


def _sample(watched: _Watched, step: int | None, reading: Reading) -> ResourceSample:
    return ResourceSample(
        t_ns=wall_ns(),
        mono_ns=mono_ns(),
        scope=watched.scope_of_step(step),
        attribution=BY_NODE,
        cpu_ns=reading[0],
        memory_bytes=reading[1],
        memory_peak_bytes=reading[2],
        pids=reading[3],
        oom_kills=reading[4],
    )
