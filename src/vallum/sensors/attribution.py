"""Which step a connection is charged to, and the process to name.

:func:`charge` is the rule, pure; :class:`SocketAttributor` asks the kernel and applies it
(``vallum.core.ports.Attributor``).

The kernel gives two facts: the cgroup stamped on the socket when it was *made*, and which processes *hold* it now, each
in the cgroup of its step. The guest can pull them apart: make a socket in one step and connect it in another, hand it to a
daemon, leave copies in processes that know nothing of it. The rule, and why no step that took no part can be charged:

1. Holders of exactly one step: that step (``cgroup``). The stamp, where it differs, is kept as ``socket_step``. A daemon
   that was handed a socket, and a shell that connects what it made long ago, are both charged for what they do now.
2. Holders of several steps: the step that *made* the socket (``socket``, confidence 0.5). Which of the holders connected
   the kernel does not say. A later step may hold a copy only because a child inherited it, and so may an earlier one;
   only the maker certainly took part.
3. Several steps and no stamp, or several sockets that fit: the earliest holder's (0.3): descriptors are handed down.
4. No holder (it closed at once, or is hidden in a queue): the maker (``socket``, 0.8).
5. Nothing: the cell, no step (``netns``, 0.5).

Covered: what is above; each has an attack test.
Not covered: processes of one user in one cell may ptrace each other: a step can make an earlier step's living process
act. A daemon that does what a later step asks of it is charged to the step that started it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import thread_time_ns
from typing import cast

from vallum.core.clock import mono_ns
from vallum.core.events import Process
from vallum.core.scope import Attribution, Method, Scope
from vallum.sensors import procfs
from vallum.sensors.base import CellView
from vallum.sensors.netlink import MalformedNetlinkError
from vallum.sensors.socket_owner import Asked, DiagError, DiagSocket, SocketOwner, describe_owners, find_sockets

_SEVERAL, _GUESS, _GONE, _CELL_ONLY = 0.5, 0.3, 0.8, 0.5
_REST = 5
"""A search costs the cell this many times its length, until the end of which the next one rests."""
_SAVED_NS = 250_000_000
"""What a cell may use at once after a rest, in the same unit."""
_KNOWN_NS = 1_000_000_000
"""How long argv and executable of a process are believed without reading them again. Its start and the place of its
stack, which every exec moves, are looked at each time; a machine without address randomisation is why there is a limit."""
_MAX_KNOWN = 256
_MAX_HOLDERS = 64
"""Holders of one socket that are looked at; where there are more, the answer is not certain."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds the socket, and its step now."""

    pid: int
    step: int | None
    method: Method = "cgroup"
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Charge:
    """The outcome."""

    step: int | None
    attribution: Attribution
    pid: int | None
    """Which holder to name: the first one of the step charged, else the first one."""
    socket_step: int | None
    """The step that made the socket, where it is not the one charged."""


def charge(socket_step: int | None, holders: Sequence[Holder], *, is_certain: bool = True) -> Charge:
    """Apply the rule of this module.

    ``holders`` are in the order of their start. ``is_certain`` is False when several sockets fit or not every process
    could be looked at: confidence is then at most 0.5, as there may be another holder.
    """
    steps = {holder.step for holder in holders if holder.step is not None}
    method: Method
    if len(steps) == 1:
        step: int | None = next(iter(steps))
        basis = [holder for holder in holders if holder.step == step]
        method = basis[0].method
        confidence = min(holder.confidence for holder in basis)
    elif steps and socket_step is not None:
        step, method, confidence = socket_step, "socket", _SEVERAL
    elif steps:
        step, method, confidence = min(steps), "cgroup", _GUESS
    elif socket_step is not None:
        step, method, confidence = socket_step, "socket", _GONE
    else:
        step, method, confidence = None, "netns", _CELL_ONLY
    if any(holder.step is None for holder in holders) and step is not None:
        confidence = min(confidence, _SEVERAL)
    if not is_certain:
        confidence = min(confidence, _SEVERAL)
    named = next((h.pid for h in holders if h.step == step), holders[0].pid if holders else None)
    return Charge(
        step=step,
        attribution=Attribution(method=method, confidence=confidence),
        pid=named,
        socket_step=socket_step if socket_step != step else None,
    )


@dataclass(slots=True)
class _Watched:
    view: CellView
    diag: socket.socket | None
    scope_of_step: Callable[[int | None], Scope]
    uid_map: list[tuple[int, int, int]]
    rested_ns: int = 0
    """When holders may be looked for again: see :data:`_REST`."""
    known: dict[int, tuple[int, procfs.Seen]] = field(default_factory=dict)
    """Processes that were read, and when; see :meth:`_Look._see`."""


Answer = tuple[Scope, Attribution, Process | None, int | None]
"""(scope, method, process, step stamped on the socket where it is another)."""


class SocketAttributor:
    """Says who opened a socket of a cell; ``vallum.core.ports.Attributor``. On the event loop, about 1 ms for 20 processes.

    Looking for holders costs what the guest wants it to cost (it may have a million descriptors), so each cell gets at
    most a fifth of the node's time for it. Beyond that the socket's own stamp answers, with a confidence that says so.
    """

    def __init__(self) -> None:
        self._cells: dict[str, _Watched] = {}
        self.failures = 0
        """Times that the kernel refused to say (the flow is then charged to the cell alone)."""

    def watch(
        self,
        cell: str,
        view: CellView,
        *,
        root_pid: int,
        diag: socket.socket | None,
        scope_of_step: Callable[[int | None], Scope],
    ) -> None:
        """Answer for ``cell``. ``diag`` is its door of that name; ``scope_of_step(None)`` is the scope of the cell."""
        self._cells[cell] = _Watched(view, diag, scope_of_step, procfs.read_uid_map(root_pid))

    def unwatch(self, cell: str) -> None:
        """Forget the cell."""
        self._cells.pop(cell, None)

    def rest_s(self, cell: str) -> float:
        """Seconds until holders will be looked for again; 0 when at once, or when the cell is not watched."""
        watched = self._cells.get(cell)
        return 0.0 if watched is None else max(0, watched.rested_ns - mono_ns()) / 1e9

    def attribute(self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> Answer:
        """Who sent from ``src``, the guest's side as the gateway sees it, to ``dst``, where the guest wanted to go.

        When the kernel does not say, the answer is the cell alone (``netns``), never a guess.

        Raises:
            KeyError: the cell is not watched.
        """
        return self.attribute_many(cell, [Asked(protocol, src, dst)])[0]

    def attribute_many(self, cell: str, asked: Sequence[Asked]) -> list[Answer]:
        """As :meth:`attribute`, for several at once: the cell's processes are looked through once for all of them.

        Raises:
            KeyError: the cell is not watched.
        """
        watched = self._cells[cell]
        began_ns, worked_ns = mono_ns(), thread_time_ns()
        owners = self._find(watched, asked, is_rested=began_ns >= watched.rested_ns)
        look = _Look(watched)
        answers = [look.answer(owner) for owner in owners]
        # What was saved up by doing nothing counts for a moment only. Work is what this thread did, not what it waited for.
        watched.rested_ns = max(watched.rested_ns, began_ns - _SAVED_NS) + _REST * (thread_time_ns() - worked_ns)
        return answers

    def _find(self, watched: _Watched, asked: Sequence[Asked], *, is_rested: bool) -> list[SocketOwner | None]:
        found = [self._find_sockets(watched.diag, each) for each in asked]
        if not is_rested:
            return describe_owners(found, None)
        owners = describe_owners(found, watched.view.pids())
        if any(owner is not None and owner.inode and not owner.holders for owner in owners):
            # Forked or handed on between listing and looking: look once more.
            owners = describe_owners([self._find_sockets(watched.diag, each) for each in asked], watched.view.pids())
        return owners

    def _find_sockets(self, diag: socket.socket | None, asked: Asked) -> list[DiagSocket]:
        if diag is None:
            return []
        try:
            return find_sockets(diag, asked.protocol, asked.src, asked.dst)
        except (DiagError, MalformedNetlinkError, ValueError, OSError):
            self.failures += 1
            return []


class _Look:
    """What is read of a cell's processes while one lot of questions is answered: of each process once."""

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        self._seen: dict[int, procfs.Seen | None] = {}
        self._holders: dict[int, Holder] = {}

    def answer(self, owner: SocketOwner | None) -> Answer:
        watched = self._watched
        if owner is None:
            return watched.scope_of_step(None), charge(None, ()).attribution, None, None
        pids = owner.holders[:_MAX_HOLDERS]
        seen = [(pid, self._see(pid)) for pid in pids]
        seen.sort(key=lambda pair: (pair[1].stat.start_ticks if pair[1] else 0, pair[0]))
        stamped = watched.view.step_of_cgroup(owner.cgroup_id) if owner.cgroup_id is not None else None
        outcome = charge(
            stamped,
            [self._hold(pid) for pid, _ in seen],
            is_certain=owner.complete and not owner.ambiguous and len(pids) == len(owner.holders),
        )
        process = next((found.process for pid, found in seen if pid == outcome.pid and found), None)
        return watched.scope_of_step(outcome.step), outcome.attribution, process, outcome.socket_step

    def _see(self, pid: int) -> procfs.Seen | None:
        if pid not in self._seen:
            self._seen[pid] = self._recall(pid) or self._read(pid)
        return self._seen[pid]

    def _recall(self, pid: int) -> procfs.Seen | None:
        """What was read of a process a moment ago, when it is the same one in the same program still."""
        read_ns, seen = self._watched.known.get(pid, (0, None))
        if seen is None or not seen.stat.start_stack or mono_ns() - read_ns > _KNOWN_NS:
            return None
        now = procfs.read_stat(pid)
        is_same = (
            now is not None
            and not now.is_dead
            and (now.start_ticks, now.start_stack) == (seen.stat.start_ticks, seen.stat.start_stack)
        )
        return seen if is_same else None

    def _read(self, pid: int) -> procfs.Seen | None:
        seen = procfs.read_process(pid, self._watched.uid_map)
        known = self._watched.known
        known.pop(pid, None)
        if seen is not None:
            known[pid] = mono_ns(), seen
            if len(known) > _MAX_KNOWN:
                del known[next(iter(known))]
        return seen

    def _hold(self, pid: int) -> Holder:
        if pid not in self._holders:
            step, method, confidence = self._watched.view.step_of_pid(pid)
            self._holders[pid] = Holder(pid, step, cast(Method, method), confidence)
        return self._holders[pid]
