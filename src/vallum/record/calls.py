"""A tool call as a person reads it."""

from __future__ import annotations

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.events import ToolCall


def describe_call(call: ToolCall) -> str:
    """The command of a tool call as one line of a shell, or its raw arguments where it has none."""
    try:
        arguments = msgspec.json.decode(call.arguments, type=_Arguments)
    except MALFORMED:
        return call.arguments
    if arguments.argv is not None:
        return " ".join(_quote(word) for word in arguments.argv)
    command = arguments.command if arguments.command is not None else arguments.cmd
    return command if isinstance(command, str) else call.arguments


class _Arguments(msgspec.Struct):
    argv: list[str] | None = None
    command: object = None
    cmd: object = None


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")


def _quote(word: str) -> str:
    return word if word and _PLAIN.issuperset(word) else "'" + word.replace("'", "'\"'\"'") + "'"
