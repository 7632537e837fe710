"""A package mirror: an index page and files, each with its sha256 in the link as PyPI does."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping

from vallum.testing.fakes.base import Endpoint, Received
from vallum.testing.fakes.http import HttpFake

PACKAGE = "toy-1.0.tar.gz"


def make_tarball(name: str, files: Mapping[str, bytes]) -> bytes:
    """A reproducible .tar.gz: the same files give the same bytes, so its checksum can be written down."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(content)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


TOY = make_tarball(
    "toy-1.0",
    {
        "toy.py": b'"""A toy package."""\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n    return a + b\n',
        "test_toy.py": b"import unittest\n\nfrom toy import add\n\n\nclass TestAdd(unittest.TestCase):\n"
        b"    def test_sum(self):\n        self.assertEqual(add(2, 2), 4)\n",
    },
)
"""The one package of a mirror that is not given others."""


class PackageMirror(HttpFake):
    """Units: ``requests``, ``downloads``, ``downloaded_bytes``."""

    def __init__(
        self, endpoints: Iterable[Endpoint | tuple[str, int]], packages: Mapping[str, bytes] | None = None
    ) -> None:
        super().__init__(endpoints)
        self.packages = dict(packages) if packages is not None else {PACKAGE: TOY}
        """Name -> content; fixed from here on."""
        self._digests = {name: hashlib.sha256(content).hexdigest() for name, content in self.packages.items()}

    def sha256(self, package: str) -> str:
        """Hex digest of a package.

        Raises:
            KeyError: the mirror has no such package.
        """
        return self._digests[package]

    def respond(self, method: str, target: str, headers: dict[str, str], count: Received) -> tuple[int, bytes, str]:
        """``/`` is the index, ``/packages/NAME`` a file."""
        path = target.partition("?")[0]
        if method not in ("GET", "HEAD"):
            return 405, b"only GET and HEAD here\n", "text/plain"
        if path == "/":
            links = "".join(
                f'<a href="/packages/{name}#sha256={self.sha256(name)}">{name}</a>\n' for name in self.packages
            )
            return 200, f"<!doctype html>\n{links}".encode(), "text/html"
        body = self.packages.get(path.removeprefix("/packages/"))
        if body is None:
            return 404, b"no such package\n", "text/plain"
        count.count("downloads")
        count.count("downloaded_bytes", len(body))
        return 200, body, "application/octet-stream"
