"""A conversation on disk, one JSON line a fact, so that a run that was interrupted can be resumed.

For the agent's own use: it says what the agent remembers, not what happened. That is in the ledger.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vallum.agent.messages import Message, Usage
from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput


class Added(msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="t"):
    """A message was added."""

    message: Message


class Used(msgspec.Struct, frozen=True, kw_only=True, tag="usage", tag_field="t"):
    """A reply took this much."""

    usage: Usage


class Compacted(msgspec.Struct, frozen=True, kw_only=True, tag="compacted", tag_field="t"):
    """The conversation was replaced."""

    messages: list[Message]


Line = Added | Used | Compacted
_decoder = msgspec.json.Decoder(Line)


class Transcript:
    """Appends to a file; or to nothing, without a path."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def add(self, message: Message) -> None:
        """Keep a message."""
        self._write(Added(message=message))

    def count(self, usage: Usage) -> None:
        """Keep what a reply took."""
        self._write(Used(usage=usage))

    def replace(self, messages: list[Message]) -> None:
        """The conversation is another one now."""
        self._write(Compacted(messages=messages))

    def _write(self, line: Line) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise InvalidInput(f"the transcript {self._path} cannot be written: {error.strerror}") from error


def read_transcript(path: Path) -> tuple[list[Message], Usage]:
    """The conversation so far and what it took. Calls that have no result are given one that says so.

    Raises:
        InvalidInput: it cannot be read, or a line of it is no line of a transcript.
    """
    messages: list[Message] = []
    used = Usage()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidInput(f"the transcript {path} cannot be read: {error.strerror}") from error
    for number, raw in enumerate(lines, 1):
        try:
            line = _decoder.decode(raw)
        except MALFORMED as error:
            if number == len(lines):
                break  # torn by the end of whoever wrote it
            raise InvalidInput(f"{path}, line {number}: no line of a transcript ({error})") from error
        match line:
            case Added(message=message):
                messages.append(message)
            case Used(usage=usage):
                used += usage
            case Compacted(messages=kept):
                messages = list(kept)
    return answer_open_calls(messages), used


def answer_open_calls(messages: list[Message]) -> list[Message]:
    """The conversation with a result for every call: servers refuse one without."""
    answered = {message.tool_call_id for message in messages if message.role == "tool"}
    found: list[Message] = []
    pending: list[Message] = []
    for message in messages:
        if message.role != "tool":
            found += pending
            pending = []
        found.append(message)
        pending += [
            Message(role="tool", tool_call_id=call.id, content="(interrupted: it may or may not have run)")
            for call in message.tool_calls
            if call.id not in answered
        ]
    return found + pending
