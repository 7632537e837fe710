r"""The format of a ledger: how records are chained, and what a directory of a run holds.

A line is ``<hash> <json>\n``, and ``hash_n = sha256(hash_{n-1} + "\n" + json_n)``, all hashes as 64
lower-case hex digits, ``hash_{-1}`` being 64 zeros. A record's number is its line's, from 0. So
anyone can follow the chain with a shell and ``sha256sum``.

Beside the log lies ``head.json``, the *anchor*: how many records there were, and the hash of the
last, when the log was last made durable. It is what makes a log that was cut at the end of a line
different from one that ends there.

Covered: a change, removal, insertion or new order of records, by anyone who does not recompute the chain.
Not covered: one who may write here and recomputes the whole chain and the anchor. That needs a
signature or a copy of the head kept elsewhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import RecordError, VerificationError

GENESIS = b"0" * 64
"""The hash before the first record."""

LOG = "ledger.log"
ANCHOR = "head.json"

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Longest line that is written or read: bounds what a reader of a foreign file can be made to hold."""

_HEX = frozenset(b"0123456789abcdef")


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a log stood when it was last made durable."""

    count: int
    """Number of records."""
    head: str
    """Hash of the last of them."""
    bytes: int
    """Length of the log."""
    closed: bool
    """Whether its writer ended in order. Nothing follows then."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two records."""

    offset: int = 0
    count: int = 0
    head: bytes = GENESIS


@dataclass(frozen=True, slots=True)
class Line:
    """One record as it lies in the log."""

    id: int
    offset: int
    payload: bytes
    """JSON of the event."""
    after: Position
    """The place after it; its ``head`` is this record's hash."""


class ChainError(VerificationError):
    """The first record that does not follow from those before it."""

    def __init__(self, why: str, at: Position, raw: bytes) -> None:
        super().__init__(f"record {at.count} (line {at.count + 1}, byte {at.offset}) {why}", at.count)
        self.at = at
        self.raw = raw


def link(head: bytes, payload: bytes) -> bytes:
    """The hash of a record that follows ``head``."""
    return sha256(head + b"\n" + payload).hexdigest().encode()


def split(raw: bytes) -> tuple[bytes, bytes] | None:
    """(hash, json) of a whole line, None when it has not the form of one."""
    if len(raw) < 68 or raw[64] != 0x20 or raw[-1] != 0x0A or not _HEX.issuperset(raw[:64]):
        return None
    return raw[:64], raw[65:-1]


def walk(log: BinaryIO, start: Position | None = None) -> Iterator[Line]:
    """Whole records from ``start`` on, each checked against the one before it. An unterminated tail ends it.

    Raises:
        ChainError: a line is not a record, or does not follow from those before it.
    """
    at = start or Position()
    log.seek(at.offset)
    while raw := log.readline(MAX_RECORD_BYTES):
        if raw[-1] != 0x0A:
            if len(raw) == MAX_RECORD_BYTES:
                raise ChainError(f"is longer than any record ({MAX_RECORD_BYTES} bytes)", at, raw)
            return
        parts = split(raw)
        if parts is None:
            raise ChainError("is not a record: its line was changed", at, raw)
        stated, payload = parts
        if link(at.head, payload) != stated:
            raise ChainError("does not follow from the one before it", at, raw)
        after = Position(at.offset + len(raw), at.count + 1, stated)
        yield Line(at.count, at.offset, payload, after)
        at = after


def open_log(path: Path) -> BinaryIO:
    """Open a log for reading; never through a link, never anything but a regular file.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RecordError(f"the record {path} cannot be read: {error.strerror}; {_remedy(error)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RecordError(f"the record {path} cannot be read: it is not a regular file; restore the run's directory")
    return os.fdopen(fd, "rb", buffering=256 * 1024)


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "run the command as the user who started the run"
    if isinstance(error, FileNotFoundError):
        return "'vallum runs' lists what there is"
    return "check the disk and the path"


def read_anchor(directory: Path) -> Anchor | None:
    """The anchor of a run, None when its log was never made durable.

    Raises:
        VerificationError: there is one, but it is not what a ledger writes.
        RecordError: it cannot be read.
    """
    path = directory / ANCHOR
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"the anchor {path} cannot be read: {error.strerror}; {_remedy(error)}") from error
    with os.fdopen(fd, "rb") as file:
        try:
            anchor = msgspec.json.decode(file.read(4096), type=Anchor)
        except (*MALFORMED, OSError) as error:
            raise VerificationError(f"the anchor {path} was changed: {error}", 0) from error
    if anchor.count < 0 or len(anchor.head) != 64:
        raise VerificationError(f"the anchor {path} was changed: no ledger writes such a count or hash", 0)
    return anchor


def check_anchor(directory: Path, anchor: Anchor, end: Position, head_there: bytes | None) -> None:
    """Compare a followed log with its anchor. ``head_there`` is the hash of record ``anchor.count - 1``.

    Raises:
        VerificationError: records are missing at the end, were added after the end, or all of them were rewritten.
    """
    if end.count < anchor.count:
        missing = anchor.count - end.count
        raise VerificationError(
            f"record {end.count} (line {end.count + 1}, byte {end.offset}) is missing: the log of {directory.name} was "
            f"truncated, its last {missing} record{'s' if missing > 1 else ''} removed",
            end.count,
        )
    if head_there is not None and head_there.decode() != anchor.head:
        raise VerificationError(
            f"record {max(anchor.count - 1, 0)} has another hash than the anchor {ANCHOR} states: "
            f"the log of {directory.name} or its anchor was rewritten",
            max(anchor.count - 1, 0),
        )
    if anchor.closed and end.count > anchor.count:
        raise VerificationError(
            f"record {anchor.count} (line {anchor.count + 1}, byte {anchor.bytes}) was inserted after the log of "
            f"{directory.name} was closed",
            anchor.count,
        )
