"""Bytes and text of the guest, made safe to keep, print and compare.

Nothing the guest names (argv, file names, host names) is trusted to be text. It is kept without
loss, and shown without control characters, so that no terminal or log can be driven by it.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def keep(raw: bytes) -> str:
    """Decode bytes of the guest losslessly: what is not UTF-8 becomes ``\\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def show(text: str, limit: int = 200) -> str:
    """Make text of the guest safe for a terminal: control and bidirectional characters escaped, length capped."""
    # Cut first: nothing gets shorter by escaping, and a text of millions of characters must cost nothing.
    safe = _UNSAFE.sub(lambda m: repr(m.group())[1:-1], text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
