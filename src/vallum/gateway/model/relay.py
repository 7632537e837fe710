"""How an upstream's reply becomes what the agent reads, piece by piece. Pure.

Words go on as they come. From the first part of a tool call, and from the beginning of the end, everything waits in
``tail`` until the caller has opened the steps and written the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from vallum.core.messages import Part, Reasoning, Reply, Text, ToolCall
from vallum.gateway.model.dialects.contract import Assembler, Dialect, StreamWriter
from vallum.gateway.model.dialects.fields import dump
from vallum.gateway.model.sse import SseEvent, rewrite_event, write_event


class Relay(Protocol):
    """One streamed reply on its way."""

    def feed(self, event: SseEvent) -> bytes:
        """What may go to the agent at once. Raises DialectError."""
        ...

    @property
    def is_over(self) -> bool:
        """The last event has come."""
        ...

    def finish(self) -> Reply:
        """The reply. Raises DialectError when it is not complete."""
        ...

    def tail(self, reply: Reply) -> bytes:
        """What was held back; ``reply`` with the ids that its calls were given."""
        ...


class PassThrough:
    """Agent and upstream speak the same: events go on as they came, if they are known."""

    def __init__(self, assembler: Assembler, *, hold_all: bool) -> None:
        self._assembler = assembler
        self._hold_all = hold_all
        self._held: list[bytes] = []

    @property
    def is_over(self) -> bool:
        """As :class:`Relay`."""
        return self._assembler.is_over

    def feed(self, event: SseEvent) -> bytes:
        """As :class:`Relay`."""
        fed = self._assembler.feed(event)
        if fed.drop:
            return b""
        data = rewrite_event(event)
        if fed.hold or self._hold_all or self._held:
            self._held.append(data)
            return b""
        return data

    def finish(self) -> Reply:
        """As :class:`Relay`."""
        return self._assembler.finish()

    def tail(self, reply: Reply) -> bytes:
        """As :class:`Relay`."""
        del reply
        return b"".join(self._held)


class Translation:
    """Agent and upstream speak differently: the reply is written anew."""

    def __init__(self, assembler: Assembler, writer: StreamWriter, *, hold_all: bool) -> None:
        self._assembler = assembler
        self._writer = writer
        self._hold_all = hold_all
        self._has_begun = False

    @property
    def is_over(self) -> bool:
        """As :class:`Relay`."""
        return self._assembler.is_over

    def feed(self, event: SseEvent) -> bytes:
        """As :class:`Relay`."""
        deltas = self._assembler.feed(event).deltas
        if self._hold_all:
            return b""
        out = b"" if self._has_begun else self._writer.start()
        self._has_begun = True
        return out + b"".join(self._writer.delta(delta) for delta in deltas)

    def finish(self) -> Reply:
        """As :class:`Relay`."""
        return self._assembler.finish()

    def tail(self, reply: Reply) -> bytes:
        """As :class:`Relay`."""
        return self._writer.finish(reply) if self._has_begun else write_whole(self._writer, reply)


def write_whole(writer: StreamWriter, reply: Reply) -> bytes:
    """A whole reply as a stream."""
    words = [part for part in reply.parts if isinstance(part, Text) or (isinstance(part, Reasoning) and part.text)]
    return b"".join((writer.start(), *(writer.delta(part) for part in words), writer.finish(reply)))


def write_error_event(dialect: Dialect, status: int, message: str, rule: str) -> bytes:
    """An error inside a stream that has begun."""
    error = dialect.write_error(status, message, rule)
    if dialect.name == "responses":
        error = {"type": "error", "code": rule, "message": message, "param": None, "sequence_number": 0}
    return write_event(dump(error).encode(), "error" if dialect.name in ("messages", "responses") else "")


def name_calls(reply: Reply, call: str, model: str) -> Reply:
    """The reply with an id for itself and for each of its tool calls."""
    parts: list[Part] = []
    for index, part in enumerate(reply.parts):
        if isinstance(part, ToolCall) and not part.id:
            part = msgspec.structs.replace(part, id=f"call_{call}_{index}")  # noqa: PLW2901
        parts.append(part)
    return msgspec.structs.replace(reply, parts=tuple(parts), id=reply.id or call, model=reply.model or model)


def rejection(reply: Reply, reasons: dict[str, str]) -> Sequence[tuple[str, str]]:
    """What the model is told about each call of a reply that was not passed on: (call id, words)."""
    other = "not run: another call of the same answer was refused"
    return [(call.id, reasons.get(call.id, other)) for call in reply.tool_calls]
