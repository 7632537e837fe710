"""Looks for canaries (planted tokens, registered secrets) in what a guest sends, before it leaves. Sans-I/O.

Covered: the value as it is, in base64 (any alignment, both alphabets, with line breaks), in hexadecimal, in UTF-16, with
any of its bytes percent-encoded, across the borders of pieces; all of that inside a gzip or zlib body. The piece
of a value at the end of what has come is kept back until it is clear what it is.
Not covered: encryption, other encodings or two of them nested, a value cut in parts that go in separate requests or
WebSocket messages, compression inside other formats. It is a tripwire, not a wall.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from vallum.core.verdict import Decision
from vallum.gateway.http1 import RefusedError
from vallum.gateway.kit import Canary

if TYPE_CHECKING:
    from vallum.gateway.relay import Guard

MIN_FORM = 6
"""Shorter writings of a value would be found by chance."""
CLEAR = 4
"""So many first bytes of a value tell nothing, and are not kept back."""
MAX_RATIO = 200
MAX_INFLATED = 64 * 1024 * 1024
_PIECE = 256 * 1024
_BLANKS = b" \t\r\n"
_OTHERS = re.compile(rb"[^a-z0-9]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_WBITS = {b"\x1f\x8b": 31, b"\x78\x01": 15, b"\x78\x5e": 15, b"\x78\x9c": 15, b"\x78\xda": 15}
"""How zlib is told what begins so."""


class FoundError(Exception):
    """A canary is in what was to be sent; ``decision`` names it, never its value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.decision = Decision(verdict="deny", rule="canary", reason=reason)


def find_in_name(canaries: Iterable[Canary], name: str) -> str:
    """Name of the canary in a host name (which has no case, and may cut it in labels); empty when there is none.

    Looked for as it is, in hexadecimal and in base32, with and without the characters that no host name has.
    """
    letters = _OTHERS.sub(b"", name.lower().encode())
    return next((c.name for c in canaries if any(form in letters for form in _name_forms(c.value))), "")


@lru_cache(maxsize=1024)
def _name_forms(value: bytes) -> tuple[bytes, ...]:
    forms = {_OTHERS.sub(b"", value.lower()), value.hex().encode()}
    forms.add(base64.b32encode(value)[: len(value) * 8 // 5].lower())
    return tuple(form for form in forms if len(form) >= MIN_FORM)


@lru_cache(maxsize=1024)
def forms_of(value: bytes) -> tuple[bytes, ...]:
    """The writings of a value that are looked for: as it is, UTF-16, base64 at each alignment, hexadecimal."""
    forms = {value, b"".join(bytes((byte, 0)) for byte in value)}
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + value)
        # The first characters mix in what comes before the value, the last ones what comes after it.
        first = -(-shift * 8 // 6)
        last = (shift + len(value)) * 8 // 6
        forms |= {encoded[first:last], encoded[first:last].translate(bytes.maketrans(b"+/", b"-_"))}
    forms |= {value.hex().encode(), value.hex().upper().encode()}
    return tuple(sorted((form for form in forms if len(form) >= MIN_FORM), key=lambda form: (-len(form), form)))


class CanaryScanner:
    """Scans one stream of bytes. :meth:`feed` returns what may leave."""

    def __init__(self, canaries: Iterable[Canary]) -> None:
        self._forms = [(canary.name, form) for canary in canaries for form in forms_of(canary.value)]
        longest = max((len(form) for _, form in self._forms), default=0)
        self._reach = 4 * longest + 64
        self._context = b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes; those that may leave now.

        Raises:
            FoundError: a canary is in them. None of these bytes was returned.
        """
        if not self._forms:
            return data
        window = self._context + data
        squeezed = window.translate(None, _BLANKS)
        views = [window]
        if len(squeezed) != len(window):
            views.append(squeezed)
        if b"%" in window:
            views.append(_ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), window))
        for view in views:
            for name, form in self._forms:
                if form in view:
                    raise FoundError(f"the canary {name} was about to be sent")
        unclear = self._unclear(window)
        for view in views[1:]:
            if further := self._unclear(view):
                # Percent-encoding takes three bytes for one; blanks may stand between any two.
                unclear = max(unclear, min(3 * further + 64, self._reach))
        self._context = window[-self._reach :]
        ready = self._held + data
        keep = min(len(ready), unclear)
        self._held = ready[len(ready) - keep :]
        return ready[: len(ready) - keep]

    def finish(self) -> bytes:
        """No more comes: what was kept back."""
        held, self._held = self._held, b""
        return held

    def flush(self) -> bytes:
        """A message ends here: what was kept back. What comes after is still looked at together with it."""
        return self.finish()

    def _unclear(self, view: bytes) -> int:
        """How many bytes at the end may be the beginning of a canary."""
        unclear = 0
        for _, form in self._forms:
            tail = view[-(len(form) - 1) :]
            beginning = form[: CLEAR + 1]
            at = tail.find(beginning)
            while at >= 0 and len(tail) - at > unclear:
                if form.startswith(tail[at:]):
                    unclear = len(tail) - at
                    break
                at = tail.find(beginning, at + 1)
        return unclear


class BodyScanner:
    """Scans a body, and what is inside when it is compressed."""

    def __init__(self, canaries: Iterable[Canary]) -> None:
        kept = tuple(canaries)
        self._outer = CanaryScanner(kept)
        self._inner = CanaryScanner(kept)
        self._is_on = bool(kept)
        self._start = b""
        self._inflate: zlib._Decompress | None = None
        self._is_plain = False
        self._came = self._inflated = 0

    def feed(self, data: bytes) -> bytes:
        """As :meth:`CanaryScanner.feed`; also raises FoundError for what inflates without measure."""
        if not self._is_on:
            return data
        self._came += len(data)
        self._look_inside(data)
        return self._outer.feed(data)

    def finish(self) -> bytes:
        """As :meth:`CanaryScanner.finish`."""
        return self._outer.finish()

    def _look_inside(self, data: bytes) -> None:
        try:
            while data and not self._is_plain:
                if self._inflate is None:
                    self._start += data
                    data, self._start = self._begin(self._start)
                    continue
                self._scan(self._inflate.decompress(data, _PIECE))
                data = self._inflate.unconsumed_tail
                if self._inflate.eof:
                    # Another member may follow one of gzip.
                    data, self._inflate = self._inflate.unused_data, None
        except zlib.error:
            self._is_plain = True  # it only began like a compressed body

    def _begin(self, start: bytes) -> tuple[bytes, bytes]:
        """Choose by the first bytes how to inflate: bytes to inflate now, bytes to wait with."""
        if len(start) < 2:
            return b"", start
        wbits = _WBITS.get(start[:2])
        if wbits is None:
            self._is_plain = True
        else:
            self._inflate = zlib.decompressobj(wbits)
        return start, b""

    def _scan(self, content: bytes) -> None:
        self._inflated += len(content)
        self._inner.feed(content)
        if self._inflated > MAX_INFLATED and self._inflated > MAX_RATIO * self._came:
            raise FoundError("a compressed body inflates without measure, so that it cannot be searched for canaries")


def scan_head(canaries: Iterable[Canary], pieces: Iterable[bytes]) -> None:
    """Look through the parts of a request's head.

    Raises:
        FoundError: a canary is in them.
    """
    kept = tuple(canaries)
    if not kept:
        return
    scanner = CanaryScanner(kept)
    for piece in pieces:
        scanner.feed(piece)
        scanner.feed(b"\n")


class CanaryGuard:
    """For flows that are relayed in clear: looks for canaries in what another guard lets pass.

    A :class:`~vallum.gateway.relay.Guard`.
    """

    def __init__(self, inner: Guard, canaries: Iterable[Canary]) -> None:
        self._inner = inner
        self._scanner = CanaryScanner(tuple(canaries))

    @property
    def is_waiting(self) -> bool:
        """As :attr:`Guard.is_waiting`."""
        return self._inner.is_waiting

    def feed(self, data: bytes) -> bytes:
        """As :meth:`Guard.feed`; refuses what holds a canary."""
        return self._scan(self._inner.feed(data))

    def feed_response(self, data: bytes) -> bytes:
        """As :meth:`Guard.feed_response`."""
        return self._scan(self._inner.feed_response(data))

    def finish(self) -> bytes:
        """As :meth:`Guard.finish`."""
        return self._scan(self._inner.finish()) + self._scanner.finish()

    def _scan(self, data: bytes) -> bytes:
        try:
            return self._scanner.feed(data) if data else data
        except FoundError as error:
            raise RefusedError(error.decision) from error
