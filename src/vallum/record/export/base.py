"""What every format of export is: episodes in, files out.

Writing is the caller's: a format names its files and gives their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vallum.record.trajectory import EpisodeTrajectories


@dataclass(frozen=True)
class ExportFile:
    """A file of an export."""

    name: str
    """Letters, digits, ``.``, ``_`` and ``-`` only: safe in any directory."""
    data: bytes


class ExportFormat(Protocol):
    """A format. Instances hold its options and no state between calls."""

    name: str

    def write(self, episodes: Iterable[EpisodeTrajectories]) -> Iterator[ExportFile]:
        """The files of some episodes, in their order.

        Raises:
            RecordError: what the record holds cannot be put into this format.
            InvalidInput: a library that the format needs is not installed; the message names the extra.
        """
        ...
