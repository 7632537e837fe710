"""What every format of export is: chosen episodes of runs in, files out.

Writing is the caller's: a format names its files and gives their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vallum.core.events import Record
from vallum.record.trajectory import EpisodeTrajectories


@dataclass(frozen=True)
class ExportFile:
    """A file of an export."""

    name: str
    """Letters, digits, ``.``, ``_`` and ``-`` only: safe in any directory."""
    data: bytes


@dataclass(frozen=True)
class ChosenRun:
    """What is exported of a run."""

    run: str
    episodes: list[EpisodeTrajectories]
    records: Callable[[], Iterator[Record]]
    """Reads the record again: the events of these episodes and those of the run itself."""


class ExportFormat(Protocol):
    """A format. Instances hold its options and no state between calls."""

    name: str

    def write(self, runs: Iterable[ChosenRun]) -> Iterator[ExportFile]:
        """The files of some runs, in their order; one run at a time is held.

        Raises:
            RecordError: what the record holds cannot be put into this format.
            InvalidInput: a library that the format needs is not installed; the message names the extra.
        """
        ...
