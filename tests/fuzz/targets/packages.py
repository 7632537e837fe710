"""Package indexes: simple HTML and JSON, packuments, Release and Packages. Read, or refused by UnreadableError alone.

The first byte chooses. What is left out for its age is not in what the guest is given.
"""

from __future__ import annotations

import msgspec

from vallum.gateway.services.packages.base import UnreadableError
from vallum.gateway.services.packages.debian import Debian, read_list
from vallum.gateway.services.packages.npm import Npm
from vallum.gateway.services.packages.pypi import JSON, Pypi

NEWEST_NS = 1_700_000_000 * 10**9
_SHA = b"a" * 64
SEEDS = (
    b'\x00<html><body><a href="a-1.tar.gz#sha256=' + _SHA + b'" data-core-metadata="true">a</a></body></html>',
    b'\x01{"name":"a","files":[{"filename":"a-1.tar.gz","url":"a-1.tar.gz","hashes":{"sha256":"' + _SHA + b'"},'
    b'"upload-time":"2024-01-01T00:00:00Z","core-metadata":true,"yanked":false}],"versions":["1"]}',
    (
        b'\x02{"name":"a","dist-tags":{"latest":"1.0.0"},"time":{"1.0.0":"2024-01-01T00:00:00Z"},"versions":{"1.0.0":'
        b'{"dist":{"tarball":"http://x/a/-/a-1.0.0.tgz","shasum":"x","integrity":"sha512-AAAA"}}}}'
    ),
    b"\x03Origin: x\nSHA256:\n " + _SHA + b" 10 main/binary-amd64/Packages\n",
    b"\x04Package: a\nVersion: 1\nFilename: pool/a_1_all.deb\nSHA256: " + _SHA + b"\n\n",
)


def fuzz(data: bytes) -> None:
    if not data:
        return
    kind, body = data[0] % 5, data[1:]
    try:
        match kind:
            case 0:
                Pypi().read("https://x.example/simple/a/", "text/html", body, accept="", newest_ns=None)
            case 1:
                for accept in (JSON, "text/html"):
                    reading = Pypi().read("https://x.example/simple/a/", JSON, body, accept=accept, newest_ns=NEWEST_NS)
                    assert reading.hidden == 0 or reading.body is not None
            case 2:
                reading = Npm().read("https://x.example/a", "application/json", body, accept="", newest_ns=NEWEST_NS)
                if reading.body is not None:
                    page = msgspec.json.decode(reading.body)
                    assert len(page["versions"]) == reading.kept
            case 3:
                Debian().read("https://x.example/dists/a/Release", "", body, accept="", newest_ns=None)
            case 4:
                read_list(body)
    except UnreadableError:
        pass
