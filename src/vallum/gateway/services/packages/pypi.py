"""Python packages: the simple index in HTML (PEP 503) and JSON (PEP 691, 700), its files and their metadata (PEP 658). Pure."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.gateway.http.exchange import Headers, RequestHead
from vallum.gateway.services.packages.base import (
    Digests,
    Reading,
    UnreadableError,
    Vouch,
    check_digest,
    read_time,
    replace_header,
    resolve,
)

JSON = "application/vnd.pypi.simple.v1+json"
HTML = "application/vnd.pypi.simple.v1+html"
_INDEX = re.compile(r"/\+?simple/([^/]+)/?")
_ENDINGS = (".whl", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".zip", ".egg")
_METADATA = ".metadata"
_ASKED = f"{JSON}, {HTML};q=0.2, text/html;q=0.1".encode()
_TAKES_JSON = re.compile(r"(?:application/vnd\.pypi\.simple\.(?:v1|latest)\+json)\s*(?:;\s*q=(0\.[0-9]*|[01]))?")


class _Anchors(HTMLParser):
    """Links of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.found: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "base" and not self.base:
            self.base = values.get("href", "")
        elif tag == "a" and "href" in values:
            self.found.append(values)


class Pypi:
    """See :class:`~vallum.gateway.services.packages.base.Ecosystem`."""

    name = "pypi"
    has_ages = True

    def is_index(self, head: RequestHead) -> bool:
        """As :meth:`Ecosystem.is_index`."""
        return _INDEX.search(head.path) is not None and not head.path.lower().endswith((*_ENDINGS, _METADATA))

    def guess(self, path: str) -> Vouch | None:
        """As :meth:`Ecosystem.guess`."""
        file = path.rstrip("/").rpartition("/")[2].lower()
        is_metadata = file.endswith(_METADATA)
        name, version = split_file(file.removesuffix(_METADATA))
        if not name or "/-/" in path or "/pool/" in path:  # npm's and Debian's
            return None
        return Vouch(ecosystem="pypi", name=name, version=version, kind="metadata" if is_metadata else "package")

    def prepare(self, headers: Headers, *, needs_ages: bool) -> Headers:
        """As :meth:`Ecosystem.prepare`."""
        return replace_header(headers, b"accept", _ASKED) if needs_ages else headers

    def read(self, url: str, content_type: str, body: bytes, *, accept: str, newest_ns: int | None) -> Reading:
        """As :meth:`Ecosystem.read`. HTML tells no ages, so nothing is left out of it."""
        if "json" in content_type:
            return _read_json(url, body, accept=accept, newest_ns=newest_ns)
        if "html" in content_type:
            return _read_html(url, body)
        raise UnreadableError(f"a simple index answered with {content_type or 'no type'}")


def split_file(file: str) -> tuple[str, str]:
    """Name and version in the name of a wheel or source distribution; empty where it is neither."""
    ending = next((ending for ending in _ENDINGS if file.lower().endswith(ending)), None)
    if ending is None:
        return "", ""
    stem = file[: -len(ending)]
    if ending in {".whl", ".egg"}:
        parts = stem.split("-")
        name, version = parts[0], parts[1] if len(parts) > 1 else ""
    else:
        name, _, version = stem.rpartition("-")
        name, version = (name, version) if name else (stem, "")
    return re.sub(r"[-_.]+", "-", name).lower(), version


def takes_json(accept: str) -> bool:
    """Whether a client accepts the JSON form of the simple index (PEP 691)."""
    found = _TAKES_JSON.search(accept)
    return found is not None and float(found[1] or 1) > 0


def _read_json(url: str, body: bytes, *, accept: str, newest_ns: int | None) -> Reading:
    try:
        page = msgspec.json.decode(body)
    except MALFORMED as error:
        raise UnreadableError(f"the simple index is not JSON ({error})") from error
    files = page.get("files") if isinstance(page, dict) else None
    if not isinstance(files, list):
        raise UnreadableError("the simple index has no list of files")
    vouches: dict[str, Vouch] = {}
    kept: list[dict[str, Any]] = []
    hidden = 0
    for file in files:
        if not isinstance(file, dict) or not isinstance(file.get("url"), str):
            raise UnreadableError("the simple index has a file without a URL")
        at = resolve(url, file["url"])
        name, version = split_file(unquote(at.rpartition("/")[2]))
        published_ns = read_time(file.get("upload-time"))
        digests = _digests(file.get("hashes"))
        vouches[at] = Vouch(ecosystem="pypi", name=name, version=version, digests=digests, published_ns=published_ns)
        metadata = file.get("core-metadata", file.get("dist-info-metadata"))
        if metadata:
            vouches[at + _METADATA] = msgspec.structs.replace(vouches[at], digests=_digests(metadata), kind="metadata")
        if newest_ns is not None and published_ns is not None and published_ns > newest_ns:
            hidden += 1
        else:
            kept.append(file)
    if hidden:
        page["files"] = kept
        _drop_versions(page, kept)
    if not takes_json(accept):
        return Reading(
            vouches=vouches, body=_write_html(page, kept), content_type=b"text/html", hidden=hidden, kept=len(kept)
        )
    changed = msgspec.json.encode(page) if hidden else None
    return Reading(vouches=vouches, body=changed, content_type=JSON.encode(), hidden=hidden, kept=len(kept))


def _drop_versions(page: dict[str, Any], kept: list[dict[str, Any]]) -> None:
    """Leave only versions in PEP 700's list that have a file."""
    if isinstance(page.get("versions"), list):
        left = {split_file(str(file.get("filename", "")))[1].replace("_", "+") for file in kept}
        page["versions"] = [version for version in page["versions"] if version in left]


def _digests(hashes: object) -> Digests:
    if not isinstance(hashes, dict):
        return ()
    return tuple(
        pair for name, digits in hashes.items() if isinstance(digits, str) for pair in check_digest(str(name), digits)
    )


def _write_html(page: dict[str, Any], files: list[dict[str, Any]]) -> bytes:
    """The page as PEP 503 has it, for clients that do not take JSON."""
    links = []
    for file in files:
        hashes = _digests(file.get("hashes"))
        fragment = "#{}={}".format(*hashes[-1]) if hashes else ""
        attributes = {"href": file["url"] + fragment}
        if file.get("requires-python"):
            attributes["data-requires-python"] = str(file["requires-python"])
        if (yanked := file.get("yanked")) not in (None, False):
            attributes["data-yanked"] = yanked if isinstance(yanked, str) else ""
        if metadata := file.get("core-metadata", file.get("dist-info-metadata")):
            known = _digests(metadata)
            value = "{}={}".format(*known[-1]) if known else "true"
            attributes |= {"data-core-metadata": value, "data-dist-info-metadata": value}
        words = " ".join(f'{name}="{html.escape(value)}"' for name, value in attributes.items())
        links.append(f"<a {words}>{html.escape(str(file.get('filename', '')))}</a><br>")
    title = html.escape(str(page.get("name", "")))
    head = (
        f'<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>'
    )
    return "\n".join([head + "<body>", *links, "</body></html>", ""]).encode()


def _read_html(url: str, body: bytes) -> Reading:
    parser = _Anchors()
    try:
        parser.feed(body.decode("utf-8", "replace"))
        parser.close()
        base = urljoin(url, parser.base)
    except (ValueError, AssertionError) as error:
        raise UnreadableError(f"the simple index is not HTML ({error})") from error
    vouches: dict[str, Vouch] = {}
    for values in parser.found:
        try:
            at = resolve(base, values["href"])
        except UnreadableError:
            continue
        fragment = values["href"].partition("#")[2]
        name, version = split_file(unquote(at.rpartition("/")[2]))
        if not name:
            continue
        algorithm, _, digits = fragment.partition("&")[0].partition("=")
        vouches[at] = Vouch(ecosystem="pypi", name=name, version=version, digests=check_digest(algorithm, digits))
        metadata = values.get("data-core-metadata", values.get("data-dist-info-metadata"))
        if metadata is not None:
            algorithm, _, digits = metadata.partition("=")
            vouches[at + _METADATA] = msgspec.structs.replace(
                vouches[at], digests=check_digest(algorithm, digits), kind="metadata"
            )
    return Reading(vouches=vouches)
