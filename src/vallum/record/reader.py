"""Reading a run's log: by anyone who may read the file, with or without its writer at work.

What is read has been checked against the chain: a record that was changed is never handed on.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput, RecordError
from vallum.core.events import Record, decode
from vallum.core.text import show
from vallum.record.chain import LOG, Line, Position, open_log, read_anchor, walk

_POLL_S = 0.1


class _When(msgspec.Struct):
    t_ns: int


def read_lines(directory: Path, *, start: Position | None = None, follow: bool = False) -> Iterator[Line]:
    """Records of the run in ``directory`` as they lie in its log, oldest first.

    A record that is only half there (its writer is at work, or died) ends the reading, or is waited for.

    Args:
        directory: of the run.
        start: where an earlier reading ended.
        follow: go on as the log grows, until its writer closes it.

    Raises:
        RecordError: it cannot be read.
        VerificationError: a record does not follow from those before it.
    """
    at = start or Position()
    with open_log(directory / LOG) as log:
        while True:
            ended = not follow or _has_ended(directory, log)
            for line in walk(log, at):
                at = line.after
                yield line
            if ended:
                return
            time.sleep(_POLL_S)


def read_records(directory: Path, *, start: Position | None = None, follow: bool = False) -> Iterator[Record]:
    """As :func:`read_lines`, decoded.

    Raises:
        RecordError: also when a record is none of this version's events.
    """
    for line in read_lines(directory, start=start, follow=follow):
        yield decode_line(line, directory)


def decode_line(line: Line, directory: Path) -> Record:
    """The event of a line.

    Raises:
        RecordError: it is none of this version's events.
    """
    try:
        return Record(id=line.id, event=decode(line.payload))
    except MALFORMED as error:
        raise RecordError(
            f"record {line.id} of run {directory.name} cannot be understood ({error}): it is unchanged, but another "
            "version of vallum wrote it; read it with that version"
        ) from error


def is_live(directory: Path) -> bool:
    """Whether a writer holds the run's log now.

    Raises:
        RecordError: it cannot be read.
    """
    with open_log(directory / LOG) as log:
        return _is_locked(log)


def find_run(runs: Path, ref: str) -> str:
    """The id of the run that ``ref`` means: an id, the beginning of exactly one, or ``latest``.

    Raises:
        InvalidInput: none or several; the message names what there is.
        RecordError: the directory of the runs cannot be read.
    """
    ids = list_ids(runs)
    if ref in ids:
        return ref
    if not ids:
        raise InvalidInput(f"there are no runs in {runs}: make one with 'vallum run -- CMD', or give another --home")
    if ref == "latest":
        return max(ids, key=lambda run: (_started_ns(runs / run), run))
    matching = [run for run in ids if ref and run.startswith(ref)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        some = ", ".join(matching[:5]) + (", ..." if len(matching) > 5 else "")
        raise InvalidInput(f"{len(matching)} runs begin with {show(ref, 80)!r} ({some}): give more of the id")
    raise InvalidInput(f"there is no run {show(ref, 80)!r} in {runs}: 'vallum runs' lists what there is")


def list_ids(runs: Path) -> list[str]:
    """Ids of all runs with a log, sorted.

    Raises:
        RecordError: the directory cannot be read.
    """
    try:
        return sorted(entry.name for entry in runs.iterdir() if not entry.is_symlink() and (entry / LOG).is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(
            f"the runs in {runs} cannot be read: {error.strerror}; run the command as their owner or give another --home"
        ) from error


def _started_ns(directory: Path) -> int:
    try:
        with open_log(directory / LOG) as log:
            return msgspec.json.decode(log.readline(1 << 20)[65:], type=_When).t_ns
    except (RecordError, *MALFORMED):
        # An empty or damaged log is no reason to find no run at all; what is wrong shows when it is read.
        return 0


def _has_ended(directory: Path, log: BinaryIO) -> bool:
    anchor = read_anchor(directory)
    return (anchor is not None and anchor.closed) or not _is_locked(log)


def _is_locked(log: BinaryIO) -> bool:
    try:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(log, fcntl.LOCK_UN)
    return False
