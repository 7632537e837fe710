"""Debian packages: Release files vouch for lists of packages, lists for packages. Pure.

apt verifies the signature of a Release file itself; here it says only what the files after it have to be. A Debian index
does not say when a package was published, so there is no minimum age. Flat repositories are read, too; differences of
lists (``Packages.diff``) are not.

Source: https://wiki.debian.org/DebianRepository/Format.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from urllib.parse import quote, unquote

import zstandard

from vallum.gateway.http.exchange import Headers, RequestHead
from vallum.gateway.services.packages.base import Listing, Reading, UnreadableError, Vouch, check_digest, locate
from vallum.rules.paths import encode_path, normalise_path

MAX_LIST_BYTES = 512 * 1024 * 1024
"""Of a list of packages, decompressed."""
MAX_FILES = 400_000
MAX_LISTINGS = 12
"""Lists that are kept for all cells."""
_RELEASE = re.compile(r"(.*/)(?:In)?Release")
_LIST = re.compile(r"Packages(?:\.(?:xz|gz|bz2|lzma|zst))?")
_LISTED = re.compile(r" ([0-9a-fA-F]{64}) +\d+ +(\S+)")
_PACKAGE = re.compile(r"([a-z0-9][a-z0-9+.-]*)_([^_/]+)_[^_/]+\.u?deb")
_PIECE = 1024 * 1024

Files = dict[str, tuple[str, str, str]]
_lists: OrderedDict[bytes, Files] = OrderedDict()


class Debian:
    """See :class:`~vallum.gateway.services.packages.base.Ecosystem`."""

    name = "debian"
    has_ages = False

    def is_index(self, head: RequestHead) -> bool:
        """As :meth:`Ecosystem.is_index`."""
        file = unquote(head.path.rpartition("/")[2])
        return file in {"Release", "InRelease"} or _LIST.fullmatch(file) is not None

    def guess(self, path: str) -> Vouch | None:
        """As :meth:`Ecosystem.guess`."""
        found = _PACKAGE.fullmatch(path.rpartition("/")[2])
        if found is None:
            return None
        return Vouch(ecosystem="debian", name=found[1], version=unquote(found[2]))

    def prepare(self, headers: Headers, *, needs_ages: bool) -> Headers:
        """As :meth:`Ecosystem.prepare`."""
        return headers

    def read(self, url: str, content_type: str, body: bytes, *, accept: str, newest_ns: int | None) -> Reading:
        """As :meth:`Ecosystem.read`."""
        bare = locate(url)
        release = _RELEASE.fullmatch(bare)
        if release is not None:
            return Reading(vouches=read_release(release[1], body.decode("utf-8", "replace")))
        root, dists, _ = bare.partition("/dists/")
        if not dists:  # a flat repository: files lie beside their list
            hashed = "/by-hash/" in bare
            root = bare.partition("/by-hash/")[0] if hashed else bare.rpartition("/")[0]
        root += "/"
        key = sha256(body).digest()
        files = _lists.get(key)
        if files is None:
            files = _lists[key] = read_list(body)
            while len(_lists) > MAX_LISTINGS:
                _lists.popitem(last=False)
        return Reading(vouches={}, listing=Listing(source=bare, root=root, files=files))


def read_release(base: str, text: str) -> dict[str, Vouch]:
    """What a Release file says of the lists of packages below ``base``, by name and by hash."""
    vouches = {}
    in_section = False
    for line in text.splitlines():
        if not line.startswith(" "):
            in_section = line.rstrip() == "SHA256:"
            continue
        found = _LISTED.fullmatch(line) if in_section else None
        if found is None:
            continue
        path, digits = found[2], found[1].lower()
        folder, _, file = path.rpartition("/")
        if _LIST.fullmatch(file) is None or ".." in path:
            continue
        vouch = Vouch(ecosystem="debian", name=path, version="", digests=check_digest("sha256", digits), kind="index")
        vouches[base + path] = vouch
        vouches[f"{base}{folder}{'/' if folder else ''}by-hash/SHA256/{digits}"] = vouch
    return vouches


def read_list(body: bytes) -> Files:
    """The packages of a ``Packages`` file, in whatever compression: path to (name, version, SHA-256).

    Raises:
        UnreadableError: it cannot be decompressed, or is too large.
    """
    files: Files = {}
    stanza: dict[str, str] = {}
    rest = b""
    for piece in _decompress(body):
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if not line.strip():
                _take(files, stanza)
                stanza = {}
            elif line.startswith((b"Package:", b"Version:", b"Filename:", b"SHA256:")):
                name, _, value = line.decode("utf-8", "replace").partition(":")
                stanza[name] = value.strip()
        if len(rest) > _PIECE or len(files) > MAX_FILES:
            raise UnreadableError("the list of packages has a line or a length that no list has")
    _take(files, stanza)
    return files


def _take(files: Files, stanza: dict[str, str]) -> None:
    file = stanza.get("Filename", "").removeprefix("./")
    if file and check_digest("sha256", stanza.get("SHA256", "")):
        normal = normalise_path("/" + quote(file))
        at = file if normal is None else encode_path(normal)[1:]
        files[at] = (stanza.get("Package", ""), stanza.get("Version", ""), stanza["SHA256"].lower())


def _decompress(body: bytes) -> Iterator[bytes]:
    """The content piece by piece, so that little that grows large is not kept whole."""
    total = 0
    try:
        for piece in _pieces(body):
            total += len(piece)
            if total > MAX_LIST_BYTES:
                raise UnreadableError(f"the list of packages has more than {MAX_LIST_BYTES} bytes")
            yield piece
    except (lzma.LZMAError, OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UnreadableError(f"the list of packages cannot be decompressed ({error})") from error


def _pieces(body: bytes) -> Iterator[bytes]:
    if body.startswith(b"\x28\xb5\x2f\xfd"):
        with zstandard.ZstdDecompressor(max_window_size=128 * 1024 * 1024).stream_reader(BytesIO(body)) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    elif body.startswith(b"\x1f\x8b"):
        inflater, data = zlib.decompressobj(31), body
        while data:
            yield inflater.decompress(data, _PIECE)
            data = inflater.unconsumed_tail
    elif body.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        yield from _drain(lzma.LZMADecompressor(memlimit=256 * 1024 * 1024), body)
    elif body.startswith(b"BZh"):
        yield from _drain(bz2.BZ2Decompressor(), body)
    else:
        yield body


def _drain(decompressor: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes) -> Iterator[bytes]:
    while not decompressor.eof:
        piece = decompressor.decompress(data, _PIECE)
        data = b""
        if not piece and decompressor.needs_input:
            raise EOFError("it is cut short")
        yield piece
