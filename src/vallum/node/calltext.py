"""Which of the open tool calls a command line runs: the text of the call, found in the words of the process. Pure.

Agents run a shell command as ``bash -c CMD``, or wrapped: ``bash -c "... eval 'CMD' ..."``, ``bash -c $'...\\nCMD\\n...'``.
So a call fits when the text is a word of its own, or stands in a word between quotes or line ends.

Not covered: agents that type into a shell that runs already, or change the command before they run it: nothing fits then.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

COMMAND_KEYS = ("command", "cmd", "script", "commands", "code", "bash_command", "shell")
"""Names of arguments that hold a command; where a call has one of them, its other texts do not count."""
MAX_TEXTS = 64
MAX_COMMAND_CHARS = 8192
_EDGES = frozenset("'\"\n")
_QUOTES = ("'\"'\"'", "'\\''")
"""How a shell word in single quotes holds one."""


def read_texts(arguments: str) -> tuple[str, ...]:
    """The texts of a tool call by which a command line may show it; empty when its arguments are no JSON object."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(value, dict):
        return ()
    named = [value[key] for key in COMMAND_KEYS if key in value]
    texts = (text.strip() for text in _texts(named or list(value.values())))
    return tuple(islice(dict.fromkeys(text for text in texts if text), MAX_TEXTS))


def _texts(values: Sequence[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            # A command as words: its last one is the script of ``["bash", "-lc", CMD]``.
            yield value[-1]


def find_calls(argv: Sequence[str], texts: Mapping[int, Sequence[str]]) -> tuple[int, ...]:
    """Which steps (keys of ``texts``) the command line fits; a text that is a whole word beats one inside a word."""
    words = [word.strip() for word in argv]
    whole = tuple(step for step, its in texts.items() if any(text in words for text in its))
    if whole:
        return whole
    plain = [_unquote(word) for word in words]
    return tuple(step for step, its in texts.items() if any(_stands_in(text, word) for text in its for word in plain))


def find_commands(argv: Sequence[str], texts: Mapping[int, Sequence[str]]) -> tuple[int, ...]:
    """Which steps are of one simple command that is exactly this command line."""
    words = list(argv)
    return tuple(step for step, its in texts.items() if words and any(_split(text) == words for text in its))


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text) if len(text) <= MAX_COMMAND_CHARS else []
    except ValueError:
        return []


def _unquote(word: str) -> str:
    for quoted in _QUOTES:
        word = word.replace(quoted, "'")
    return word


def _stands_in(text: str, word: str) -> bool:
    at = word.find(text)
    while at >= 0:
        end = at + len(text)
        if (at == 0 or word[at - 1] in _EDGES) and (end == len(word) or word[end] in _EDGES):
            return True
        at = word.find(text, at + 1)
    return False
