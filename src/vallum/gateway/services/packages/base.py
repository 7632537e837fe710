"""The contract of an ecosystem of packages, and what its indexes are taken for. Pure.

An index *vouches* for files: it says which URL has which digest, and perhaps since when. An ecosystem is a module of this
folder with an object that has the methods of :class:`Ecosystem`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, Protocol
from urllib.parse import urljoin

import msgspec

from vallum.gateway.http.exchange import Headers, RequestHead
from vallum.rules.paths import encode_path, normalise_path

Digests = tuple[tuple[str, str], ...]
"""(algorithm as hashlib names it, hexadecimal digits in lower case)."""

STRONG = ("sha512", "sha384", "sha256")
"""Algorithms for which nobody can make a second file, best first: only these vouch for what is kept in the cache."""
_HEX_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha384": 96, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")


class Vouch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an index says of one file."""

    ecosystem: str
    name: str
    version: str
    digests: Digests = ()
    published_ns: int | None = None
    """Since when it can be had (nanoseconds since the epoch), where the index says so."""
    kind: Literal["package", "metadata", "index"] = "package"
    """``metadata``: of a package (PEP 658). ``index``: a part of the index itself."""

    @property
    def strong(self) -> str:
        """The best digest that nobody can forge, as ``sha256:...``; empty when there is none."""
        known = dict(self.digests)
        return next((f"{algorithm}:{known[algorithm]}" for algorithm in STRONG if algorithm in known), "")


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """Many files below one URL, shared by every cell that read the same list."""

    source: str
    """URL of the list."""
    root: str
    files: Mapping[str, tuple[str, str, str]]
    """Path below ``root`` to (name, version, SHA-256)."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of an index's answer."""

    vouches: dict[str, Vouch]
    """By URL, as :func:`locate` writes it."""
    body: bytes | None = None
    """What the guest is given; None: as it came."""
    content_type: bytes = b""
    listing: Listing | None = None
    hidden: int = 0
    """Files or versions that were left out because they are too young."""
    kept: int = 0
    """Those that stayed; not counted where nothing is ever left out."""


class UnreadableError(Exception):
    """An index's answer is not what it should be. Says why."""


class Ecosystem(Protocol):
    """One kind of package index."""

    name: str
    has_ages: bool
    """Whether its indexes say when a file was published."""

    def is_index(self, head: RequestHead) -> bool:
        """Whether this asks an index for what it has."""
        ...

    def guess(self, path: str) -> Vouch | None:
        """What file a decoded path would be, by its looks alone; without digests."""
        ...

    def prepare(self, headers: Headers, *, needs_ages: bool) -> Headers:
        """The guest's headers as an index is asked with: its ages where they are needed."""
        ...

    def read(self, url: str, content_type: str, body: bytes, *, accept: str, newest_ns: int | None) -> Reading:
        """Read an index's answer. May take long: for a thread.

        Args:
            accept: what the guest accepts.
            newest_ns: what was published later is left out; None: nothing is.

        Raises:
            UnreadableError: it cannot be read; nothing of it vouches for anything.
        """
        ...


def locate(url: str) -> str:
    """The URL under which a file is known: without query, fragment and the scheme's own port, its path as requests have it."""
    bare = url.partition("#")[0].partition("?")[0]
    scheme, _, rest = bare.partition("://")
    authority, slash, path = rest.partition("/")
    authority = authority.lower().rpartition("@")[2]
    for name, port in (("https", ":443"), ("http", ":80")):
        if scheme == name:
            authority = authority.removesuffix(port)
    normal = normalise_path(slash + path)
    return f"{scheme}://{authority}{slash + path if normal is None else encode_path(normal)}"


def resolve(base: str, url: str) -> str:
    """Where ``url`` of a page at ``base`` leads, as :func:`locate` writes it. Raises UnreadableError: nowhere."""
    try:
        return locate(urljoin(base, url))
    except ValueError as error:
        raise UnreadableError(f"the index has a URL that is none ({error})") from error


def check_digest(algorithm: str, digits: str) -> Digests:
    """The digest, when it is one that hashlib can compute; otherwise none."""
    digits = digits.lower()
    if len(digits) == _HEX_DIGITS.get(algorithm) and _HEX.fullmatch(digits):
        return ((algorithm, digits),)
    return ()


def read_time(text: object) -> int | None:
    """Nanoseconds since the epoch of an ISO 8601 time; None when it is none. Without a zone it is UTC."""
    if not isinstance(text, str) or len(text) > 64:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError):
        return None


def replace_header(headers: Headers, name: bytes, value: bytes) -> Headers:
    """The headers with one in place of all of its name."""
    return (*(pair for pair in headers if pair[0] != name), (name, value))
