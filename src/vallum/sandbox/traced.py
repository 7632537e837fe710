"""Cells that report themselves what their processes do, because the host's kernel does not see them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class TraceListener(Protocol):
    """Who is told what a traced cell's processes do. Called on the event loop; returns at once."""

    def started(self, pid: int, ppid: int, exe: str, argv: list[str], uid: int | None) -> None:
        """A process runs a program."""
        ...

    def exited(self, pid: int, status: int) -> None:
        """A process has ended; ``status`` as of wait(2). Its step can still be asked."""
        ...

    def connected(self, pid: int, address: str, port: int) -> None:
        """A process is about to connect a socket."""
        ...

    def blind(self, why: str) -> None:
        """Nothing more will be told; the cell is being ended."""
        ...


@runtime_checkable
class TracedCell(Protocol):
    """A cell whose kernel is not the host's, and which therefore tells itself what its processes do.

    Process ids of such a cell are its own, not the host's.
    """

    @property
    def dropped(self) -> int:
        """Reports that were lost."""
        ...

    def listen(self, listener: TraceListener) -> None:
        """Tell ``listener`` from now on; before the first command nothing is missed."""
        ...

    def drain(self) -> None:
        """Tell everything that has been reported so far."""
        ...
