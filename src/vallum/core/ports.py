"""Where the pieces meet. Mechanisms never import each other; the node hands them these."""

from __future__ import annotations

from typing import Protocol

from vallum.core.events import AnyEvent, Process
from vallum.core.scope import Attribution, Scope


class Sink(Protocol):
    """Takes events. Returns the event's id in its run's ledger once it is written (acknowledged)."""

    def emit(self, event: AnyEvent) -> int:
        """Append ``event``.

        Raises:
            RecordError: it could not be written; the caller stops what it was recording.
        """
        ...


class Attributor(Protocol):
    """Says who opened a socket of a cell."""

    def attribute(
        self, cell: str, *, protocol: str, src: tuple[str, int], dst: tuple[str, int]
    ) -> tuple[Scope, Attribution, Process | None, int | None]:
        """Scope, method, process and the step stamped on the socket where that is another one."""
        ...
