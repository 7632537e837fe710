"""What a sensor is given by the node. Sensors state facts; they hold no reference to what judges them.

Sensors never raise into the node's event loop because of a guest: what cannot be read is said in the
event (empty ``exe``, lower confidence) or in a ``SensorStatus``.
"""

from __future__ import annotations

from typing import Literal, Protocol

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError
from vallum.core.events import AnyEvent, SensorStatus
from vallum.core.scope import BY_NODE, Attribution, Scope

State = Literal["watching", "degraded", "blind"]
"""What a living sensor says of itself."""


def make_status(sensor: str, scope: Scope, state: State, detail: str, dropped: int = 0) -> SensorStatus:
    """What ``sensor`` says of itself now, for the cell or step of ``scope``."""
    return SensorStatus(
        t_ns=wall_ns(),
        mono_ns=mono_ns(),
        scope=scope,
        attribution=BY_NODE,
        sensor=sensor,
        state=state,
        detail=detail,
        dropped=dropped,
    )


class Hooks(Protocol):
    """The node, as sensors see it. Called on the event loop; every method returns at once."""

    def emit(self, event: AnyEvent) -> int:
        """Append ``event`` to the ledger of ``event.scope.run`` and return its id.

        Raises:
            RecordError: it could not be written.
        """
        ...

    def scope_of_pid(self, cell: str, pid: int) -> tuple[Scope, Attribution]:
        """Whose a host pid of ``cell`` is now. ``scope.step`` is None when the kernel no longer tells (it is gone).

        Raises:
            RecordError: the cell has ended; the sensor forgets it.
        """
        ...

    def record_failed(self, cell: str, error: RecordError) -> None:
        """The ledger refused a fact of ``cell``. The sensor has stopped watching it; the node stops the run."""
        ...


class CellView(Protocol):
    """The part of a cell that attribution needs (``vallum.sandbox.base.Cell`` has all of it)."""

    def pids(self, step: int | None = None) -> list[int]:
        """Host pids of the cell, or of one step."""
        ...

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """(step, method, confidence) of a host pid."""
        ...

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Step that a cgroup v2 id belongs to; None when it is none of this cell's."""
        ...
