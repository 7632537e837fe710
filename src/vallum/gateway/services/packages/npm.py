"""npm packages: packuments (full and abbreviated) and tarballs. Pure.

Source: https://github.com/npm/registry/blob/main/docs/responses/package-metadata.md; integrity: W3C Subresource Integrity.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote

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

ABBREVIATED = "application/vnd.npm.install-v1+json"
_PACKUMENT = re.compile(r"/(?:@[^/]+/)?[^/@-][^/]*")
_TARBALL = re.compile(r"/((?:@[^/]+/)?[^/]+)/-/([^/]+)\.tgz")
_SEMVER = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:\+.*)?")


class Npm:
    """See :class:`~vallum.gateway.services.packages.base.Ecosystem`."""

    name = "npm"
    has_ages = True

    def is_index(self, head: RequestHead) -> bool:
        """As :meth:`Ecosystem.is_index`."""
        path = unquote(head.path)
        accept = (head.header(b"accept") or b"").decode("latin-1")
        if "/-/" in path:
            return False
        return ABBREVIATED in accept or (_PACKUMENT.fullmatch(path) is not None and "json" in accept)

    def guess(self, path: str) -> Vouch | None:
        """As :meth:`Ecosystem.guess`."""
        found = _TARBALL.search(path)
        if found is None:
            return None
        name = found[1]
        return Vouch(ecosystem="npm", name=name, version=found[2].removeprefix(name.rpartition("/")[2] + "-"))

    def prepare(self, headers: Headers, *, needs_ages: bool) -> Headers:
        """As :meth:`Ecosystem.prepare`. Only the full packument has times."""
        return replace_header(headers, b"accept", b"application/json") if needs_ages else headers

    def read(self, url: str, content_type: str, body: bytes, *, accept: str, newest_ns: int | None) -> Reading:
        """As :meth:`Ecosystem.read`. A tag of what is left out goes; ``latest`` moves to the highest version that stays."""
        try:
            page = msgspec.json.decode(body)
        except MALFORMED as error:
            raise UnreadableError(f"the packument is not JSON ({error})") from error
        versions = page.get("versions") if isinstance(page, dict) else None
        if not isinstance(versions, dict):
            raise UnreadableError("the packument has no versions")
        times = page.get("time")
        published = {name: read_time(text) for name, text in times.items()} if isinstance(times, dict) else {}
        vouches = {}
        young = []
        for version, manifest in versions.items():
            dist = manifest.get("dist") if isinstance(manifest, dict) else None
            if not isinstance(dist, dict) or not isinstance(dist.get("tarball"), str):
                raise UnreadableError(f"version {version} of the packument has no tarball")
            published_ns = published.get(version)
            vouches[resolve(url, dist["tarball"])] = Vouch(
                ecosystem="npm",
                name=str(page.get("name", "")),
                version=version,
                digests=read_digests(dist),
                published_ns=published_ns,
            )
            if newest_ns is not None and published_ns is not None and published_ns > newest_ns:
                young.append(version)
        if young:
            _drop(page, versions, young)
        return Reading(
            vouches=vouches,
            body=msgspec.json.encode(page) if young else None,
            content_type=b"application/json",
            hidden=len(young),
            kept=len(versions),
        )


def read_digests(dist: dict[str, Any]) -> Digests:
    """The digests in ``dist``: ``integrity`` (SRI) and ``shasum`` (SHA-1). Those that cannot be read are left out."""
    known: list[tuple[str, str]] = []
    integrity = dist.get("integrity")
    for word in integrity.split()[:8] if isinstance(integrity, str) else ():
        algorithm, _, encoded = word.partition("?")[0].partition("-")
        try:
            digits = base64.b64decode(encoded, validate=True).hex()
        except (binascii.Error, ValueError):
            continue
        known += check_digest(algorithm, digits)
    if isinstance(dist.get("shasum"), str):
        known += check_digest("sha1", dist["shasum"])
    # With several of one algorithm any may fit (SRI); taking the last alone is stricter.
    return tuple(dict(known).items())


def _drop(page: dict[str, Any], versions: dict[str, Any], young: list[str]) -> None:
    for version in young:
        del versions[version]
        page["time"].pop(version, None)
    tags = page.get("dist-tags")
    if not isinstance(tags, dict):
        return
    had_latest = "latest" in tags
    page["dist-tags"] = tags = {tag: version for tag, version in tags.items() if version in versions}
    stable = [version for version in versions if _SEMVER.fullmatch(version)]
    if had_latest and "latest" not in tags and stable:
        tags["latest"] = max(stable, key=_order)


def _order(version: str) -> tuple[int, ...]:
    found = _SEMVER.fullmatch(version)
    return tuple(map(int, found.groups())) if found is not None else ()
