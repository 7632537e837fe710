"""Secrets taken out of what is recorded and of what comes back from servers. Pure.

Covered: registered secrets and credentials, as they are and in base64, hexadecimal or percent-encoding; values of query
parameters whose names say that they are secret. Not covered: a secret inside a compressed or encrypted answer, or in
another writing of it: best effort, the walls are elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vallum.core.text import show
from vallum.gateway.http.canaries import forms_of

MAX_TARGET = 2000
REDACTED = "REDACTED"
_SENSITIVE = re.compile("token|key|sig|secret|passw|auth|credential|session|code", re.IGNORECASE)
_BORDERS = re.compile("([&;?])")


def redact_target(target: str, secrets: Iterable[bytes]) -> str:
    """A request target as it is recorded: escaped, without secrets, at most :data:`MAX_TARGET` characters."""
    raw = target.encode("utf-8", "backslashreplace")
    for secret in secrets:
        for form in forms_of(secret):
            if form in raw:
                raw = raw.replace(form, REDACTED.encode())
    text = raw.decode("utf-8", "backslashreplace")
    # Nobody reads further; and what a guest makes long must not take long.
    path, mark, query = text[: 2 * MAX_TARGET].partition("?")
    return show(path + mark + "".join(map(_redact_parameter, _BORDERS.split(query))), MAX_TARGET)


def _redact_parameter(text: str) -> str:
    name, equals, _ = text.partition("=")
    return f"{name}={REDACTED}" if equals and _SENSITIVE.search(name) else text


class Masker:
    """Replaces secrets in a stream by as many asterisks, across the borders of its pieces."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._forms = sorted({form for secret in secrets for form in forms_of(secret)}, key=len, reverse=True)
        self._longest = max(map(len, self._forms), default=0)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be given out; the beginning of a secret at the end is kept until it is clear."""
        masked = self.mask(self._held + data)
        keep = self._unclear(masked)
        self._held = masked[len(masked) - keep :]
        return masked[: len(masked) - keep]

    def finish(self) -> bytes:
        """What was kept."""
        held, self._held = self._held, b""
        return held

    def mask(self, data: bytes) -> bytes:
        """The same length, without secrets that are whole."""
        for form in self._forms:
            if form in data:
                data = data.replace(form, b"*" * len(form))
        return data

    def _unclear(self, data: bytes) -> int:
        for length in range(min(self._longest - 1, len(data)), 0, -1):
            tail = data[len(data) - length :]
            if any(form.startswith(tail) for form in self._forms):
                return length
        return 0
