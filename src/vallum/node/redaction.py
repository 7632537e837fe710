"""Registered secrets taken out of everything that the node writes down.

Covered: the secret itself and its URL-escaped, base64 (at any alignment), hexadecimal, and (once or twice) JSON-escaped forms,
in any text of an event or a line of the log. Not covered: other encodings, compression, a secret that was cut in two, and
names of fields (they are the node's own).
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

import msgspec

from vallum.core.errors import RecordError
from vallum.core.events import AnyEvent, encode

MIN_FORM_CHARS = 8
E = TypeVar("E", bound=AnyEvent)


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that must not be written down."""

    name: str
    """What is written instead, e.g. ``credential github``."""
    value: bytes


def forms_of(value: bytes) -> list[str]:
    """The texts under which a secret is looked for, the longest first. Pure."""
    plain: set[str] = set()
    for part in parts_of(value):
        text = part.decode("utf-8", "backslashreplace")
        hexed = part.hex()
        escaped = quote(part, safe="")
        plain |= {text, hexed, hexed.upper(), escaped, quote(part), quote_plus(part), _lower_escapes(escaped)}
        for code in _base64_cores(part):
            plain |= {code, code.replace("+", "-").replace("/", "_"), quote(code, safe="")}
    found = set(plain)
    for form in plain:
        once = _escape(form)
        found |= {once, _escape(once), json.dumps(form)[1:-1]}
    return sorted((form for form in found if len(form) >= MIN_FORM_CHARS), key=lambda form: (-len(form), form))


def parts_of(value: bytes) -> list[bytes]:
    """The pieces of a secret that give it away by themselves: all of it, a password after its user, lines of a key. Pure."""
    parts = [value]
    head, colon, tail = value.partition(b":")
    if colon and b"\n" not in value and len(tail) >= MIN_FORM_CHARS and head:
        parts.append(tail)
    if b"-----BEGIN" in value:
        lines = [line.strip() for line in value.splitlines()]
        parts += [line for line in lines if len(line) >= 16 and not line.startswith(b"-----")]
    return parts


def _base64_cores(part: bytes) -> list[str]:
    """What every base64 text that holds the secret has in common, for each of the three places that it may begin at."""
    found = []
    for shift in range(3):
        code = base64.b64encode(b"\0" * shift + part).decode().rstrip("=")
        # The first characters are also of what is before it, the last of what follows.
        start = (shift * 8 + 5) // 6
        end = len(code) if (shift + len(part)) % 3 == 0 else len(code) - 1
        found.append(code[start:end])
    return found


def _lower_escapes(text: str) -> str:
    pieces = text.split("%")
    return pieces[0] + "".join("%" + piece[:2].lower() + piece[2:] for piece in pieces[1:])


def _escape(text: str) -> str:
    return msgspec.json.encode(text).decode()[1:-1]


class Redactor:
    """Takes secrets out of texts and events. Costs nothing while there are none."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, str] = {}
        self._forms: list[tuple[str, str]] = []
        self._needles: list[bytes] = []

    def learn(self, secrets: Iterable[Secret]) -> None:
        """Look for these, too. A secret is never forgotten while the node runs: what was sent once may come back."""
        new = [secret for secret in secrets if secret.value not in self._secrets]
        if not new:
            return
        for secret in new:
            self._secrets[secret.value] = secret.name
            self._forms += [(form, f"[{secret.name}]") for form in forms_of(secret.value)]
        self._forms.sort(key=lambda pair: -len(pair[0]))
        # An event is searched as its JSON, where each form is escaped once more.
        self._needles = sorted({_escape(form).encode() for form, _ in self._forms})

    def clean(self, event: E) -> E:
        """The event without secrets; the same object when there are none in it."""
        if not self._needles:
            return event
        raw = encode(event)
        if not any(needle in raw for needle in self._needles):
            return event
        kept: dict[str, Any] = msgspec.json.decode(raw)
        for name, value in kept.items():
            if name != "kind":
                kept[name] = self._clean_value(value)
        try:
            return msgspec.convert(kept, type(event))
        except msgspec.ValidationError as error:
            raise RecordError(
                f"an event of kind {kept['kind']} cannot be written without a registered secret: a canary is one of its own words"
            ) from error

    def clean_text(self, text: str) -> str:
        """The text without secrets."""
        for form, instead in self._forms:
            if form in text:
                text = text.replace(form, instead)
        return text

    def find(self, text: str) -> str:
        """Name of a secret that is in the text, or empty."""
        return next((instead[1:-1] for form, instead in self._forms if form in text), "")

    def _clean_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean_text(value)
        if isinstance(value, list):
            return [self._clean_value(one) for one in value]
        if isinstance(value, dict):
            return {self.clean_text(key): self._clean_value(one) for key, one in value.items()}
        return value


class LogFilter(logging.Filter):
    """Takes secrets out of the lines of a log."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        super().__init__()
        self._clean = clean

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True; the record's text is replaced."""
        record.msg, record.args = self._clean(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = self._clean(logging.Formatter().formatException(record.exc_info))
        return True
