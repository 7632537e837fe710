"""Paths of requests: one normal form, and patterns over it.

Covered: a path is decoded once and only once; what is judged is what is sent; what could be read in two ways (NUL,
backslash, a second level of encoding, a way out of the root) is refused and never guessed at. An encoded slash, which
npm and GitLab need, is judged in both readings. Not covered: what a server makes of a path by rules of its own (``;``
parameters, case folding): grant such servers as whole hosts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import quote

MAX_PATH = 8192
SLASH = "%2F"
"""An encoded slash in the normal form: part of its segment."""
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_STRAY = re.compile(r"%(?![0-9A-Fa-f]{2})")
_DOUBTFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\\%?#]")
_STARS = re.compile(r"(\*\*|\*)")
_SAFE = "/!$&'()*+,;=:@-._~"


def normalise_path(text: str) -> str | None:
    """The path in the form that rules compare (decoded text), or None when it can be read in two ways.

    Percent-encoding is undone once, but for ``%2F``; ``.`` and ``..`` segments (RFC 3986, 5.2.4) and empty segments are
    removed; a trailing slash stays. Refused: no leading slash, ``..`` above the root, a backslash, control characters,
    ``?``, ``#`` or ``%`` after decoding, a dot segment or an empty one beside ``%2F``, what is no UTF-8, more than 8192
    characters. Applied to its own result it changes nothing. ``text`` is the target without its query.
    """
    if not text.startswith("/") or len(text) > MAX_PATH or _STRAY.search(text):
        return None
    decoded = [_decode(segment) for segment in text.split("/")[1:]]
    kept: list[str] = []
    for segment in decoded:
        if segment is None or (segment == ".." and not kept):
            return None
        if segment == "..":
            kept.pop()
        elif segment not in {"", "."}:
            kept.append(segment)
    path = "/" + "/".join(kept)
    return path + "/" if kept and decoded[-1] in {"", ".", ".."} else path


def _decode(segment: str) -> str | None:
    pieces = re.split("%2[Ff]", segment)
    texts = []
    for piece in pieces:
        try:
            raw = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), piece.encode("utf-8").decode("latin-1"))
            text = raw.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return None
        if _DOUBTFUL.search(text) or (len(pieces) > 1 and text in {"", ".", ".."}):
            return None
        texts.append(text)
    return SLASH.join(texts)


def encode_path(path: str) -> str:
    """The form of a normalised path that is sent, so that the server reads what was judged."""
    return SLASH.join(quote(piece, safe=_SAFE) for piece in path.split(SLASH))


def read_ways(path: str) -> tuple[str, ...]:
    """Every way in which servers read a normalised path: a grant must cover all of them, a denial any."""
    return (path, path.replace(SLASH, "/")) if SLASH in path else (path,)


def parse_pattern(text: str) -> str | None:
    """A path pattern in its normal form, or None: as :func:`normalise_path`, with ``*`` and ``**`` kept."""
    path = normalise_path(text)
    return path if path == text and "***" not in text else None


def match_path(pattern: str, path: str) -> bool:
    """Whether a normalised path fits: ``*`` stands for any text in one segment, ``**`` for any across segments.

    ``/a/**`` also fits ``/a/`` and ``/a``. The time is linear in the path, whatever the pattern: who asks chose the path.
    """
    return _compile(pattern)(path)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> Callable[[str], bool]:
    under, suffix = (pattern[:-3], "(?:/.*)?") if pattern.endswith("/**") else (pattern, "")
    pieces = [piece for piece in _STARS.split(under) if piece]
    # A star before a slash or the end stops in one place only. Two others, and a backtracking matcher tries all pairs.
    unsure = sum(
        piece == "**" or (piece == "*" and not after.startswith("/"))
        for piece, after in zip(pieces, [*pieces[1:], "/"], strict=False)
    )
    if unsure > 1:
        automata = [_Automaton(under), *([_Automaton(pattern)] if suffix else [])]
        return lambda path: any(automaton.fits(path) for automaton in automata)
    body = "".join(".*" if p == "**" else "[^/]*" if p == "*" else re.escape(p) for p in pieces)
    expression = re.compile(body + suffix, re.DOTALL)
    return lambda path: expression.fullmatch(path) is not None


class _Automaton:
    """The pattern as a nondeterministic automaton, all states at once in the bits of a number (shift-and)."""

    def __init__(self, pattern: str) -> None:
        tokens = [symbol for piece in _STARS.split(pattern) for symbol in ([piece] if piece in {"*", "**"} else piece)]
        self.letters: dict[str, int] = defaultdict(int)
        self.stars = self.across = 0
        for at, symbol in enumerate(tokens):
            if symbol in {"*", "**"}:
                self.stars |= 1 << at
                self.across |= (symbol == "**") << at
            else:
                self.letters[symbol] |= 1 << at
        self.end = 1 << len(tokens)

    def fits(self, path: str) -> bool:
        """Whether all of the path is accepted."""
        letters, across, stars = self.letters, self.across, self.stars
        states = 1 | ((1 & stars) << 1)
        for letter in path:
            stay = across if letter == "/" else stars
            states = ((states & letters.get(letter, 0)) << 1) | (states & stay)
            states |= (states & stars) << 1  # a star may stand for nothing; two never stand side by side
            if not states:
                return False
        return bool(states & self.end)
