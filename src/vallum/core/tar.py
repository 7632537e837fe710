"""Reads a tar stream whose author is hostile. Pure: bytes come from a function, nothing is written.

Why not the standard library's: it reads extended headers of any length into memory, and follows formats that no
image uses. This reads what images are made of (ustar, pax, GNU long names) and refuses the rest. Where tar readers
differ it does as Go's ``archive/tar``, with which images are made and read everywhere else.

Covered: header checksums, numbers that are none, lengths of headers and names, a stream that ends early, sparse
members (refused). Not covered: what names mean (:func:`split_name` is for that, and the unpacker).

Sources: POSIX.1-2017 pax "ustar Interchange Format", GNU tar manual "Basic Tar Format", OCI image-spec layer.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vallum.core.text import keep, show

BLOCK = 512
MAX_NAME_BYTES = 4095
"""PATH_MAX without its NUL."""
MAX_PART_BYTES = 255
MAX_DEPTH = 256
"""Directories inside one another; beyond it a tree cannot even be deleted with a thousand descriptors."""
MAX_EXTENDED_BYTES = 1 << 20

Kind = Literal["file", "dir", "symlink", "hardlink", "fifo", "device"]

_KINDS: dict[bytes, Kind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink", b"3": "device", b"4": "device",
    b"5": "dir", b"6": "fifo",
}  # fmt: skip
_ZEROS = bytes(BLOCK)
_SECONDS = re.compile(rb"(-?[0-9]{1,18})(\.[0-9]*)?")
_LATEST_S = 1 << 33


class LayerError(Exception):
    """A layer cannot be used. ``str(error)`` is half a sentence that says why, safe to show."""


@dataclass(frozen=True)
class Member:
    """One entry of the archive, as its author states it."""

    name: bytes
    kind: Kind
    mode: int
    """Permission bits with setuid, setgid and sticky."""
    uid: int
    gid: int
    size: int
    """Bytes of data that follow; 0 for everything but files."""
    mtime_s: int
    link: bytes
    """Target of a link."""


def split_name(name: bytes, what: str = "name") -> list[bytes]:
    """The parts of a relative path; ``[]`` is the root itself.

    Raises:
        LayerError: absolute, with ``..``, too long, too deep, or with a NUL.
    """
    shown = show(keep(name[:300]))
    if name.startswith(b"/"):
        raise LayerError(f"a member has the absolute {what} {shown!r}")
    if len(name) > MAX_NAME_BYTES or b"\0" in name:
        raise LayerError(f"a member has a {what} that no file system can hold ({len(name)} bytes): {shown!r}")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise LayerError(f"a member has a {what} with '..': {shown!r}")
    if len(parts) > MAX_DEPTH or any(len(part) > MAX_PART_BYTES for part in parts):
        raise LayerError(f"a member has a {what} that is too deep or too long: {shown!r}")
    return parts


class TarReader:
    """Iterate over it for the members; :meth:`read_data` gives the data of the newest one (what is left is skipped)."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """``read(n)`` gives 1 to ``n`` bytes, or none at the end."""
        self._read = read
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """The members in order.

        Raises:
            LayerError: it is no tar archive, or one that is not read here.
        """
        long_name: bytes | None = None
        long_link: bytes | None = None
        extended: dict[bytes, bytes] = {}
        while (header := self._next_header()) is not None:
            flag = header[156:157]
            if flag in (b"L", b"K", b"x", b"g"):
                body = self._read_extended(_parse_number(header[124:136], "size"))
                if flag == b"L":
                    long_name = body.rstrip(b"\0")
                elif flag == b"K":
                    long_link = body.rstrip(b"\0")
                elif flag == b"x":
                    extended = parse_pax(body)
                # 'g' is for all that follows; as in Go it is read and not applied.
                continue
            member = make_member(header, long_name, long_link, extended)
            long_name, long_link, extended = None, None, {}
            self._left = member.size
            self._padding = -member.size % BLOCK
            yield member

    def read_data(self, most: int) -> bytes:
        """The next bytes of the newest member; none at its end.

        Raises:
            LayerError: the archive ends before.
        """
        if not self._left:
            return b""
        data = self._read(min(most, self._left))
        if not data:
            raise LayerError("the archive ends inside a file")
        self._left -= len(data)
        return data

    def skip_data(self) -> None:
        """The data of the newest member was passed by other means (its padding was not)."""
        self._left = 0

    def _next_header(self) -> bytes | None:
        while self._left:
            self.read_data(1 << 16)
        if self._padding:
            self._read_exactly(self._padding)
            self._padding = 0
        header = self._read_exactly(BLOCK, may_end=True)
        if not header:
            return None  # without an end mark; as Go has it
        if header == _ZEROS:
            if self._read_exactly(BLOCK, may_end=True) not in (_ZEROS, b""):
                raise LayerError("there is data after the archive's end")
            return None
        check_sum(header)
        return header

    def _read_extended(self, size: int) -> bytes:
        if size > MAX_EXTENDED_BYTES:
            raise LayerError(f"an extended header has {size} bytes, more than {MAX_EXTENDED_BYTES}")
        body = self._read_exactly(size)
        self._read_exactly(-size % BLOCK)
        return body

    def _read_exactly(self, size: int, *, may_end: bool = False) -> bytes:
        parts = []
        left = size
        while left:
            part = self._read(left)
            if not part:
                if may_end and left == size:
                    return b""
                raise LayerError("the archive ends inside a header")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def check_sum(header: bytes) -> None:
    """Whether these 512 bytes are a header.

    Raises:
        LayerError: the checksum says no.
    """
    stated = _parse_number(header[148:156], "checksum")
    blanked = header[:148] + b" " * 8 + header[156:]
    total = sum(blanked)
    # Some old writers summed signed bytes.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in blanked):
        raise LayerError("it is not a tar archive, or a header of it is damaged")


def make_member(
    header: bytes, long_name: bytes | None, long_link: bytes | None, extended: dict[bytes, bytes]
) -> Member:
    """A member from its header and what was said before it.

    Raises:
        LayerError: a kind that is not read here, or a number that is none.
    """
    flag = header[156:157]
    name = _cut(header[:100])
    # In GNU's own format these bytes are times, not the beginning of the name.
    if header[257:263] == b"ustar\0" and header[345]:
        name = _cut(header[345:500]) + b"/" + name
    name = extended.get(b"path") or long_name or name
    link = extended.get(b"linkpath") or long_link or _cut(header[157:257])
    if flag == b"S" or any(key.startswith(b"GNU.sparse.") for key in extended):
        raise LayerError(f"the member {show(keep(name[:300]))!r} is sparse, which images do not use; write it in full")
    kind = _KINDS.get(flag)
    if kind is None:
        raise LayerError(f"the member {show(keep(name[:300]))!r} is of an unknown kind {flag!r}")
    if kind == "file" and name.endswith(b"/"):
        kind = "dir"  # as the oldest writers say it
    size = _parse_pax_number(extended, b"size")
    if size is None:
        size = _parse_number(header[124:136], "size")
    uid = _parse_pax_number(extended, b"uid")
    gid = _parse_pax_number(extended, b"gid")
    return Member(
        name=name,
        kind=kind,
        mode=_parse_number(header[100:108], "mode") & 0o7777,
        uid=_parse_number(header[108:116], "uid") if uid is None else uid,
        gid=_parse_number(header[116:124], "gid") if gid is None else gid,
        size=size if kind == "file" else 0,
        mtime_s=_parse_time(extended.get(b"mtime"), header[136:148]),
        link=link,
    )


def parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Records ``<length> <key>=<value>\\n`` of an extended header.

    Raises:
        LayerError: one is not of that form.
    """
    records = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        if not digits.isdigit():
            raise LayerError("an extended header is damaged")
        end = at + int(digits)
        record = body[space + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(body) or not record.endswith(b"\n") or not equals or not key or end <= space:
            raise LayerError("an extended header is damaged")
        records[key] = value
        at = end
    return records


def _cut(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _parse_number(field: bytes, what: str) -> int:
    """Octal, or base 256 when the first bit is set. Never negative."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value >= 1 << 62:
            raise LayerError(f"a header has an impossible {what}")
        return value
    text = _cut(field).strip(b" ")
    if not text:
        return 0
    if not all(0x30 <= byte <= 0x37 for byte in text):
        raise LayerError(f"a header has a {what} that is no number")
    return int(text, 8)


def _parse_pax_number(extended: dict[bytes, bytes], key: bytes) -> int | None:
    value = extended.get(key)
    if not value:
        return None
    if not value.isdigit() or len(value) > 18:
        raise LayerError(f"an extended header has a {key.decode()} that is no number")
    return int(value)


def _parse_time(stated: bytes | None, field: bytes) -> int:
    """Whole seconds since 1970, brought into what every file system can hold. A time harms nobody: never an error."""
    if stated and (match := _SECONDS.fullmatch(stated)):
        value = int(match[1])
    else:
        try:
            value = _parse_number(field, "mtime")
        except LayerError:
            value = 0
    return min(max(value, 0), _LATEST_S)
