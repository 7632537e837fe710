"""Pages of a ledger for a client: raw JSON lines, checked against the chain as they are read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import msgspec

from vallum.client.wire import Cursor, EventPage
from vallum.core.scope import Scope
from vallum.record.chain import Position
from vallum.record.reader import read_lines


class _Scoped(msgspec.Struct):
    scope: Scope


_scoped = msgspec.json.Decoder(_Scoped)


def read_page(directory: Path, episode: str | None, start: Cursor | None, limit: int) -> EventPage:
    """At most ``limit`` records from ``start`` on; those of other episodes are passed over.

    Raises:
        RecordError: there is no such run, or it cannot be read.
        VerificationError: it was changed.
    """
    at = Position(*start) if start is not None else Position()
    lines = []
    read = 0
    for line in islice(read_lines(directory, start=at), limit):
        read += 1
        at = line.after
        if episode is None or _scoped.decode(line.payload).scope.episode == episode:
            lines.append(b'{"id":%d,' % line.id + line.payload[1:])
    after = (at.offset, at.count, at.head)
    return EventPage(lines=lines, next=after if read == limit else None, after=after)
