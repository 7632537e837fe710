"""What changed in a cell's files, from the listings that sealing makes. Pure but for reading a listing.

A listing (native/seal.c) tells every entry of a cell's own layer, in order, with the guest's ids and a SHA-256 of the
content. Comparing contents, not times: a guest can set a file's times as it likes.

Covered: what a guest put, changed or deleted anywhere in the cell's writable layers; a directory that was deleted and
made again (``replaced``). Not covered: files that came and went between two listings; tmpfs mounts (/dev/shm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from vallum.core.errors import SandboxError
from vallum.core.text import keep

CHUNK_BYTES = 1 << 20
MAX_PATH_BYTES = 8192
"""A guest can nest directories far beyond PATH_MAX; of such a path the beginning is told."""
TYPES = {"f": "file", "d": "directory", "l": "link", "p": "fifo", "s": "socket", "w": "whiteout"}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a listing."""

    path: bytes
    """Below the layer's place, without a leading slash; empty for the layer's own directory."""
    type: str
    """One of :data:`TYPES`."""
    mode: int
    uid: int
    gid: int
    size: int
    below: str
    """``0``: nothing is there in the layers below; ``=``: the same type, mode and owner; ``~``: something else."""
    replaced: bool
    """A directory that hides all that was below it."""
    digest: str

    def is_same(self, other: Entry) -> bool:
        """Whether a guest could not tell one from the other, times aside."""
        mine = (self.type, self.mode, self.uid, self.gid, self.size, self.replaced, self.digest)
        return mine == (other.type, other.mode, other.uid, other.gid, other.size, other.replaced, other.digest)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One path that is not as it was."""

    path: str
    """Absolute in the guest; bytes that are no UTF-8 are written ``\\xNN``."""
    change: Literal["added", "changed", "removed"]
    type: str
    """``file``, ``directory``, ``link``, ``fifo`` or ``socket``; of what was removed empty where it is not known."""
    bytes: int | None = None
    mode: int | None = None
    uid: int | None = None
    sha256: str = ""
    """Of the content (of a link: its target); with a leading ``s`` of a file with holes, see native/seal.c."""
    replaced: bool = False
    """A directory that was deleted and made again: what was in it before is gone."""


def parse_entry(head: bytes, path: bytes) -> Entry:
    """One record.

    Raises:
        SandboxError: it is none.
    """
    try:
        kind, mode, uid, gid, size, _mtime, below, flag, digest = head.decode("ascii").split(" ")
        return Entry(
            path=path, type=kind, mode=int(mode, 8), uid=int(uid), gid=int(gid), size=int(size),
            below=below, replaced=flag == "o", digest=digest,
        )  # fmt: skip
    except ValueError as error:
        raise SandboxError(
            f"a listing of sealed files is damaged at {path[:100]!r}; make the snapshot again"
        ) from error


def read_listing(path: Path) -> Iterator[Entry]:
    """Every entry of a listing, a piece at a time.

    Raises:
        SandboxError: it is damaged or gone.
    """
    rest = b""
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                *fields, rest = (rest + data).split(b"\0")
                if len(fields) % 2:
                    rest = fields.pop() + b"\0" + rest
                for at in range(0, len(fields), 2):
                    yield parse_entry(fields[at], fields[at + 1])
    except OSError as error:
        raise SandboxError(f"the listing {path} cannot be read: {error.strerror}; make the snapshot again") from error
    if rest:
        raise SandboxError(f"the listing {path} is cut short; make the snapshot again")


def compare(at: str, old: Iterable[Entry] | None, new: Iterable[Entry]) -> Iterator[Change]:
    """What changed below ``at`` from ``old`` to ``new``, two listings of the same cell's layer, in the order of paths.

    ``old`` None: since the cell began. Needs no more memory for many entries than for few.
    """
    gone: bytes | None = None
    for before, now in _pair(old or (), new):
        entry = now or before
        assert entry is not None
        if gone is not None and entry.path.startswith(gone + b"/"):
            continue
        change = _judge(before, now)
        if change is None:
            continue
        if change == "removed":
            gone = entry.path
            known = before if before is not None and before.type != "w" else None
            yield Change(path=_show(at, entry.path), change="removed", type=TYPES[known.type] if known else "")
        elif now is not None:
            yield Change(
                path=_show(at, now.path), change="added" if change == "added" else "changed", type=TYPES[now.type],
                bytes=now.size if now.type in "fl" else None, mode=now.mode, uid=now.uid,
                sha256="" if now.digest == "-" else now.digest, replaced=now.replaced,
            )  # fmt: skip


def _judge(before: Entry | None, now: Entry | None) -> str | None:
    """``added``, ``changed``, ``removed`` or None for the same path in two listings."""
    if now is None:
        return "removed" if before is not None and before.type != "w" and before.path else None
    if before is not None:
        if before.is_same(now):
            return None
        if now.type == "w":
            return "removed"
        return "added" if before.type == "w" else "changed"
    if not now.path:
        return None
    if now.type == "w":
        return None if now.below == "0" else "removed"
    if now.below == "0":
        return "added"
    # A directory is copied up when anything in it is written: that alone is no change of it.
    return None if now.type == "d" and now.below == "=" and not now.replaced else "changed"


def _pair(old: Iterable[Entry], new: Iterable[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Both listings side by side; each is in the order of a walk with sorted names."""
    olds, news = iter(old), iter(new)
    before, now = next(olds, None), next(news, None)
    while before is not None or now is not None:
        left = before.path.split(b"/") if before is not None else None
        right = now.path.split(b"/") if now is not None else None
        if left == right:
            yield before, now
            before, now = next(olds, None), next(news, None)
        elif right is None or (left is not None and left < right):
            yield before, None
            before = next(olds, None)
        else:
            yield None, now
            now = next(news, None)


def _show(at: str, path: bytes) -> str:
    return f"{at.rstrip('/')}/{keep(path[:MAX_PATH_BYTES])}"
