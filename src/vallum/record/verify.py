"""Whether a run's log is what its ledger wrote.

Covered: an edited, removed, inserted or moved record anywhere; records cut off at the end, when the
log had been made durable after them; anything added after it was closed; a log in the directory of another run.
Not covered: a chain recomputed from end to end together with its anchor, by someone who may write
there; records after the last sync of an interrupted run, cut off at the end of a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import VerificationError
from vallum.record.chain import (
    LOG,
    MAX_RECORD_BYTES,
    ChainError,
    Position,
    check_anchor,
    link,
    open_log,
    read_anchor,
    split,
    walk,
)
from vallum.record.reader import is_live

_DIAGNOSED_BYTES = 256 * 1024 * 1024
"""How much of what follows a bad record is read to tell what was done to it."""


@dataclass(frozen=True)
class Verified:
    """A log that is what was written."""

    run: str
    count: int
    """Number of records."""
    head: str
    """Hash of the last; 64 zeros when there is none."""
    closed: bool
    """Whether its writer ended in order, so that its end is known too."""
    anchored: int
    """How many records, from the first, cannot have been cut off unseen."""
    notes: list[str]
    """What a reader should know: an unfinished tail, a live or a dead writer, notes of the ledger itself."""


class _Fact(msgspec.Struct):
    kind: str
    scope: _Owner
    note: str = ""


class _Owner(msgspec.Struct):
    run: str


def verify(directory: Path, *, run: str | None = None) -> Verified:
    """Follow the whole chain of the run in ``directory``.

    Args:
        directory: of the run; or its log file.
        run: which run it must be; the directory's name when None. (A copy elsewhere may lie in any directory: give the id.)

    Raises:
        VerificationError: it was changed. Names the first bad record, its line and byte, and what was done as far as can be told.
        RecordError: it cannot be read.
    """
    if directory.name == LOG:
        directory = directory.parent
    run = run or directory.name
    live = is_live(directory)
    anchor = read_anchor(directory)
    end, there, notes = Position(), None, []
    with open_log(directory / LOG) as log:
        try:
            for line in walk(log):
                note = _check_owner(line.payload, run, end)
                if note:
                    notes.append(f"record {line.id}: {note}")
                end = line.after
                if anchor is not None and end.count == anchor.count:
                    there = end.head
        except ChainError as broken:
            raise VerificationError(_diagnose(log, broken), broken.seq) from broken
        log.seek(0, 2)
        unfinished = log.tell() - end.offset
    if anchor is not None:
        check_anchor(directory, anchor, end, there)
    closed = anchor is not None and anchor.closed
    anchored = anchor.count if anchor is not None else 0
    if unfinished and closed:
        raise VerificationError(
            f"record {end.count} (line {end.count + 1}, byte {end.offset}) was inserted after the log was closed",
            end.count,
        )
    if unfinished and not live:
        notes.append(
            f"{unfinished} bytes of an unfinished record at byte {end.offset}: the writer died; resuming the run cuts them"
        )
    if not closed:
        state = "its writer is at work" if live else "its writer ended without closing it"
        notes.append(
            f"not closed: {state}; whether records after number {anchored} were cut off at the end cannot be told"
        )
    return Verified(run, end.count, end.head.decode(), closed, anchored, notes)


def _check_owner(payload: bytes, run: str, at: Position) -> str:
    """The ledger's note when it is one."""
    where = f"record {at.count} (line {at.count + 1}, byte {at.offset})"
    try:
        fact = msgspec.json.decode(payload, type=_Fact)
    except MALFORMED as error:
        raise VerificationError(f"{where} is no event: {error}", at.count) from error
    if fact.scope.run != run:
        raise VerificationError(
            f"{where} belongs to run {fact.scope.run!r}: this is not the log of run {run}", at.count
        )
    return fact.note if fact.kind == "ledger.note" else ""


def _diagnose(log: BinaryIO, broken: ChainError) -> str:
    """What was done to the log, as far as its remains tell."""
    at = broken.at
    where = f"record {at.count} (line {at.count + 1}, byte {at.offset})"
    if len(broken.raw) >= MAX_RECORD_BYTES:
        return str(broken)
    log.seek(at.offset)
    rest: list[tuple[bytes, bytes] | None] = []
    while log.tell() - at.offset < _DIAGNOSED_BYTES and (raw := log.readline(MAX_RECORD_BYTES)):
        rest.append(split(raw))
    first = rest[0]
    successor = next((n for n, parts in enumerate(rest[1:], 1) if parts and link(at.head, parts[1]) == parts[0]), None)
    if successor is not None:
        belongs = first is not None and any(
            parts is not None and link(parts[0], first[1]) == first[0] for parts in rest[1:]
        )
        if belongs:
            return (
                f"{where} was reordered: the record that follows the one before it stands {successor} lines further on"
            )
        return f"{where} was inserted: the true one stands {successor} line{'s' if successor > 1 else ''} further on"
    if first is None:
        return f"{where} was edited: its line is not a record any more"
    follower = rest[1] if len(rest) > 1 else None
    computed = link(at.head, first[1])
    if follower and link(computed, follower[1]) == follower[0]:
        return f"{where} was edited: its hash was changed, its content is what was written"
    if follower and link(first[0], follower[1]) == follower[0]:
        return f"{where} was edited, or records before it were removed: it does not follow from the one before it"
    return f"{where} was edited, and so was what follows it, or records were removed"
