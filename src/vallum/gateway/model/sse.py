"""Server-sent events (WHATWG HTML 9.2), sans-I/O, strict and bounded.

Covered: any split of the bytes, all three line ends, comments, a byte order mark. An event larger than
:data:`MAX_EVENT_BYTES`, a line that is not UTF-8, or an end in the middle of an event is an error, after which the
reader gives nothing more.
"""

from __future__ import annotations

import msgspec

MAX_EVENT_BYTES = 8 * 1024 * 1024
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which every client skips."""


class SseError(Exception):
    """The bytes are no stream of events."""


class SseEvent(msgspec.Struct, frozen=True):
    """One event. ``name`` is empty when the stream gave none."""

    data: str
    name: str = ""
    id: str = ""
    """From which a client may resume."""


class SseReader:
    """Bytes in, events out."""

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._data: list[str] = []
        self._name = ""
        self._id = ""
        self._size = 0
        self._is_first = True
        self._failed = False

    def feed(self, data: bytes) -> list[SseEvent]:
        """The events that ``data`` completes.

        Raises:
            SseError: it is no stream of events, now and from then on.
        """
        if self._failed:
            raise SseError("the stream was broken before")
        try:
            return self._feed(data)
        except SseError:
            self._failed = True
            raise

    def end(self) -> None:
        """The stream has ended.

        Raises:
            SseError: in the middle of an event.
        """
        rest = bytes(self._buffer).strip(b"\r\n")
        if self._failed or rest or self._data:
            raise SseError("the stream ended in the middle of an event")

    def _feed(self, data: bytes) -> list[SseEvent]:
        self._buffer += data
        events: list[SseEvent] = []
        at = 0
        while True:
            end, after = self._line_end(max(at, self._scanned))
            if end < 0:
                break
            line = bytes(self._buffer[at:end])
            at = after
            self._scanned = after
            if (event := self._take(line)) is not None:
                events.append(event)
        del self._buffer[:at]
        self._scanned = max(0, len(self._buffer) - 1)
        if len(self._buffer) + self._size > self._limit:
            raise SseError(f"an event has more than {self._limit} bytes")
        return events

    def _line_end(self, start: int) -> tuple[int, int]:
        """Where the line ends and the next begins; -1 when its end has not come. A CR at the very end waits for its LF."""
        newline = self._buffer.find(b"\n", start)
        limit = newline if newline >= 0 else len(self._buffer)
        carriage = self._buffer.find(b"\r", start, limit)
        if carriage >= 0:
            if carriage + 1 == len(self._buffer):
                return -1, -1
            return carriage, carriage + (2 if self._buffer[carriage + 1] == 0x0A else 1)
        return (newline, newline + 1) if newline >= 0 else (-1, -1)

    def _take(self, line: bytes) -> SseEvent | None:
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            event = SseEvent("\n".join(self._data), self._name, self._id) if self._data else None
            self._data, self._name, self._id, self._size = [], "", "", 0
            return event
        self._size += len(line)
        if self._size > self._limit:
            raise SseError(f"an event has more than {self._limit} bytes")
        if line.startswith(b":"):
            return None
        try:
            field, _, value = line.decode("utf-8").partition(":")
        except UnicodeDecodeError as error:
            raise SseError("a line is not UTF-8") from error
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif field == "id" and "\0" not in value:
            self._id = value
        return None


def write_event(data: bytes, name: str = "") -> bytes:
    """One event of one line of data."""
    return (b"event: %b\n" % name.encode() if name else b"") + b"data: " + data + b"\n\n"


def rewrite_event(event: SseEvent) -> bytes:
    """The event as it came, in one spelling."""
    lines = "".join(f"data: {line}\n" for line in event.data.split("\n"))
    head = (f"id: {event.id}\n" if event.id else "") + (f"event: {event.name}\n" if event.name else "")
    return (head + lines + "\n").encode()
