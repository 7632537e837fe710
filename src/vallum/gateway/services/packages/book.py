"""What the indexes that one cell has read vouch for, and the verdict on a file by it. Pure but for the cell's own book.

Covered: a file whose bytes are not those that its index promised; a file that is younger than the minimum age, also
where it is asked for without asking the index first; an index that takes back what another host's index said.
Not covered: ages of indexes in HTML and of Debian's, which have none; an index that lies about the age of its own files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import msgspec

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell
from vallum.gateway.services.packages.base import Digests, Listing, Reading, Vouch

MAX_FILES = 50_000
"""Files of one cell that are remembered; what was vouched for longest ago is forgotten."""
MAX_LISTINGS = 16

DIGEST_RULE = "package-digest"
AGE_RULE = "package-too-young"


class Book:
    """What was vouched for in one cell. No cell sees another's."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, dict[str, Vouch]] = OrderedDict()
        self._lists: OrderedDict[str, Listing] = OrderedDict()

    def learn(self, origin: str, reading: Reading) -> None:
        """Take what an index at ``origin`` (a host) said. It replaces what the same origin said before."""
        for url, vouch in reading.vouches.items():
            self.vouch(origin, url, vouch)
        if reading.listing is not None:
            self._lists.pop(reading.listing.source, None)
            self._lists[reading.listing.source] = reading.listing
            while len(self._lists) > MAX_LISTINGS:
                self._lists.popitem(last=False)

    def vouch(self, origin: str, url: str, vouch: Vouch) -> None:
        """Take what one origin says of one URL."""
        said = self._files.pop(url, {})
        said[origin] = vouch
        self._files[url] = said
        while len(self._files) > MAX_FILES:
            self._files.popitem(last=False)

    def find(self, url: str) -> Vouch | None:
        """What is known of a URL: every origin's digests, and the latest date of them. None: nobody vouched for it."""
        said = self._files.get(url)
        if said is None:
            return self._find_listed(url)
        self._files.move_to_end(url)
        vouches = list(said.values())
        dates = [vouch.published_ns for vouch in vouches if vouch.published_ns is not None]
        digests: Digests = tuple(dict.fromkeys(pair for vouch in vouches for pair in vouch.digests))
        return msgspec.structs.replace(vouches[-1], digests=digests, published_ns=max(dates, default=None))

    def _find_listed(self, url: str) -> Vouch | None:
        for listing in reversed(self._lists.values()):
            if url.startswith(listing.root) and (found := listing.files.get(url[len(listing.root) :])) is not None:
                name, version, digits = found
                return Vouch(ecosystem="debian", name=name, version=version, digests=(("sha256", digits),))
        return None


def judge_age(vouch: Vouch, *, is_known: bool, min_age_s: float, now_ns: int) -> Decision | None:
    """The denial of a file that is too young, or of unknown age because no index was asked about it. Else None."""
    what = f"{vouch.name} {vouch.version}".strip()
    if not is_known:
        reason = (
            f"{show(what)} was asked for without its index, so nobody can tell that it is at least "
            f"{show_age(min_age_s)} old: install it by name"
        )
        return Decision(verdict="deny", rule=AGE_RULE, reason=reason)
    if vouch.published_ns is None or now_ns - vouch.published_ns >= min_age_s * 1e9:
        return None
    age = max(0.0, (now_ns - vouch.published_ns) / 1e9)
    reason = f"{show(what)} was published {show_age(age)} ago, and this cell takes what is at least {show_age(min_age_s)} old"
    return Decision(verdict="deny", rule=AGE_RULE, reason=reason)


def judge_digest(vouch: Vouch, found: Mapping[str, str]) -> Decision | None:
    """The denial of bytes whose digests (algorithm to digits) are not those that were vouched for. Else None."""
    for algorithm, digits in vouch.digests:
        if found.get(algorithm) != digits:
            reason = (
                f"{show(vouch.name)} {show(vouch.version)} has another {algorithm} than its index says: "
                f"{found.get(algorithm, 'none')} instead of {digits}"
            )
            return Decision(verdict="deny", rule=DIGEST_RULE, reason=reason)
    return None


def show_age(seconds: float) -> str:
    """A length of time as people say it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


_books: WeakKeyDictionary[GatewayCell, Book] = WeakKeyDictionary()


def book_of(cell: GatewayCell) -> Book:
    """The book of a cell; it goes with the cell."""
    return _books.setdefault(cell, Book())
