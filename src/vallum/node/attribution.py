"""Who opened this connection: the cell by its door, the step and the process by what the kernel says of the socket."""

from __future__ import annotations

from vallum.core.events import Process
from vallum.core.scope import Attribution, Scope
from vallum.node.live import LiveCell
from vallum.sensors.socket_owner import charge, find_owner, read_process


def attribute(live: LiveCell, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> tuple[Scope, Attribution, Process | None, int | None]:
    """Scope, method, process, and the step stamped on the socket where that is another than the one charged.

    Falls back to the cell alone (method ``netns``) when the kernel names no socket: the process was
    gone, or this machine has no socket diagnostics.
    """
    raise NotImplementedError
