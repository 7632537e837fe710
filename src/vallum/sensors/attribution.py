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
from dataclasses import dataclass
from typing import cast

from vallum.core.events import Process
from vallum.core.scope import Attribution, Method, Scope
from vallum.sensors import procfs
from vallum.sensors.base import CellView
from vallum.sensors.netlink import MalformedNetlinkError
from vallum.sensors.socket_owner import DiagError, SocketOwner, find_owner

_SEVERAL, _GUESS, _GONE, _CELL_ONLY = 0.5, 0.3, 0.8, 0.5


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


@dataclass(frozen=True, slots=True)
class _Watched:
    view: CellView
    diag: socket.socket | None
    scope_of_step: Callable[[int | None], Scope]
    uid_map: list[tuple[int, int, int]]


class SocketAttributor:
    """Says who opened a socket of a cell; ``vallum.core.ports.Attributor``. On the event loop, about 1 ms for 20 processes."""

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

    def attribute(
        self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]
    ) -> tuple[Scope, Attribution, Process | None, int | None]:
        """(scope, method, process, step stamped on the socket where it is another).

        ``src`` is the guest's side as the gateway sees it, ``dst`` where the guest wanted to go. When the kernel does not
        say, the answer is the cell alone (``netns``), never a guess.

        Raises:
            KeyError: the cell is not watched.
        """
        watched = self._cells[cell]
        owner = self._ask(watched, protocol, src, dst)
        if owner is None:
            outcome = charge(None, ())
            return watched.scope_of_step(None), outcome.attribution, None, None
        seen = [(pid, procfs.read_process(pid, watched.uid_map)) for pid in owner.holders]
        seen.sort(key=lambda pair: (pair[1].stat.start_ticks if pair[1] else 0, pair[0]))
        stamped = watched.view.step_of_cgroup(owner.cgroup_id) if owner.cgroup_id is not None else None
        outcome = charge(
            stamped,
            [_holder(watched.view, pid) for pid, _ in seen],
            is_certain=owner.complete and not owner.ambiguous,
        )
        process = next((found.process for pid, found in seen if pid == outcome.pid and found), None)
        return watched.scope_of_step(outcome.step), outcome.attribution, process, outcome.socket_step

    def _ask(self, watched: _Watched, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> SocketOwner | None:
        if watched.diag is None:
            return None
        try:
            owner = find_owner(watched.diag, protocol, src, dst, watched.view.pids())
            if owner is not None and not owner.holders and owner.inode:
                # Forked or handed on between listing and looking: look once more.
                owner = find_owner(watched.diag, protocol, src, dst, watched.view.pids())
        except (DiagError, MalformedNetlinkError, ValueError, OSError):
            self.failures += 1
            return None
        return owner


def _holder(view: CellView, pid: int) -> Holder:
    step, method, confidence = view.step_of_pid(pid)
    return Holder(pid, step, cast(Method, method), confidence)
