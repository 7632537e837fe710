"""Arguments of tool calls as the record keeps them."""

from __future__ import annotations

import json
from hashlib import sha256

MAX_ARGUMENT_CHARS = 128 * 1024
"""What the record keeps of a tool call's argument."""


def shorten(value: object) -> object:
    """An argument as the record keeps it: of a long one the beginning, its length and its hash. The agent decides how
    long a command is, and a record that its ledger cannot take would end every cell of the run."""
    if isinstance(value, str):
        return shorten_words([value], "characters", len(value))[0]
    return shorten_words(value, "words", len(value)) if isinstance(value, list) else value


def shorten_words(words: list[str], unit: str, count: int) -> list[str]:
    """The first :data:`MAX_ARGUMENT_CHARS` of all words together, and a last piece that says what was left out."""
    if sum(map(len, words)) + len(words) <= MAX_ARGUMENT_CHARS:
        return words
    digest = sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()
    note = f"[vallum: cut; all of it: {count} {unit}, sha256 {digest}]"
    kept: list[str] = []
    room = MAX_ARGUMENT_CHARS
    for word in words:
        kept.append(word[:room])
        room -= len(word) + 1
        if room <= 0:
            break
    return [kept[0] + note] if unit == "characters" else [*kept, note]


def shorten_json(arguments: str) -> str:
    """The arguments that a model gave a call, as one JSON object of at most some :data:`MAX_ARGUMENT_CHARS`; what is no
    object, or longer, is kept as text under ``arguments``."""
    try:
        value = json.loads(arguments) if len(arguments) <= MAX_ARGUMENT_CHARS else None
    except (ValueError, RecursionError):
        value = None
    return json.dumps(value if isinstance(value, dict) else {"arguments": shorten(arguments)}, ensure_ascii=True)
