"""Package indexes and packages for tests: real wheels, source distributions, npm tarballs and .debs, made in memory.

:class:`PackageIndex` answers for a Python index, an npm registry and a Debian archive; what it is told to lie about it
lies about.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import lzma
import socket
import ssl
import tarfile
import time
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

JSON = "application/vnd.pypi.simple.v1+json"


class Answer(NamedTuple):
    """What a request is answered with."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def make_wheel(name: str, version: str, *, requires: tuple[str, ...] = (), source: str = "") -> bytes:
    """A pure wheel with one module ``name`` whose content is ``source``."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": source or f"version = {version!r}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {one}\n" for one in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vallum\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_record_hash(text.encode())},{len(text)}\n" for path, text in files.items())
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return out.getvalue()


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def make_sdist(name: str, version: str, backend: str) -> bytes:
    """A source distribution that brings its build backend along (PEP 517); the module ``backend`` runs when it is built."""
    top = f"{name}-{version}"
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    info = f"Metadata-Version: 1.1\nName: {name}\nVersion: {version}\n"
    return make_tarball({f"{top}/pyproject.toml": build, f"{top}/backend.py": backend, f"{top}/PKG-INFO": info})


def make_npm(name: str, version: str, *, scripts: Mapping[str, str] | None = None) -> bytes:
    """An npm package with one module."""
    manifest = {"name": name, "version": version, "main": "index.js", "scripts": dict(scripts or {})}
    files = {"package/package.json": json.dumps(manifest), "package/index.js": f"module.exports = {version!r}\n"}
    return make_tarball(files)


def make_tarball(files: Mapping[str, str]) -> bytes:
    """A gzipped tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def make_deb(name: str, version: str, files: Mapping[str, str], *, postinst: str = "") -> bytes:
    """A binary Debian package for every architecture."""
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: T <t@example.test>\n"
        "Description: a package of a test\n"
    )
    scripts = {"./postinst": f"#!/bin/sh\n{postinst}\n"} if postinst else {}
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar_of({"./control": control, **scripts}),
        "data.tar.gz": _tar_of({f".{path}": text for path, text in files.items()}),
    }
    out = b"!<arch>\n"
    for member, data in members.items():
        out += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def _tar_of(files: Mapping[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        made = set()
        for path, text in files.items():
            folders = path.split("/")[1:-1]
            for depth in range(1, len(folders) + 1):
                folder = "./" + "/".join(folders[:depth])
                if folder not in made:
                    made.add(folder)
                    directory = tarfile.TarInfo(folder)
                    directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(directory)
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(text.encode()), 0o755
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


class PackageIndex:
    """Serves ``/simple/NAME/``, ``/files/FILE``, npm's ``/NAME``, and ``/debian/``. Not safe for threads."""

    def __init__(self, files_origin: str) -> None:
        """``files_origin``: where the simple index says that its files are, e.g. ``https://files.test``."""
        self._origin = files_origin
        self._wheels: dict[str, dict[str, tuple[bytes, float, bytes]]] = {}
        self._npm: dict[str, dict[str, tuple[bytes, float, dict[str, str]]]] = {}
        self._debs: dict[str, tuple[str, str, bytes]] = {}
        self.served: dict[str, bytes] = {}
        """Content of a path, in place of what the index promised."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """(host, target, headers) of what really arrived."""

    def add_python(self, file: str, content: bytes, *, age_s: float = 1e6, metadata: bytes = b"") -> None:
        """Offer a wheel or source distribution, published so long ago."""
        name = file.split("-", 1)[0].replace("_", "-").lower()
        self._wheels.setdefault(name, {})[file] = content, time.time() - age_s, metadata

    def add_npm(
        self, name: str, version: str, content: bytes, *, age_s: float = 1e6, scripts: Mapping[str, str] | None = None
    ) -> None:
        """Offer a version of an npm package."""
        self._npm.setdefault(name, {})[version] = content, time.time() - age_s, dict(scripts or {})

    def add_deb(self, name: str, version: str, content: bytes) -> None:
        """Offer a Debian package in suite ``stable``, component ``main``."""
        self._debs[f"pool/main/{name}_{version}_all.deb"] = name, version, content

    def answer(self, host: str, target: str, headers: Mapping[str, str]) -> Answer:
        """What a request is answered with; kept in :attr:`requests`."""
        self.requests.append((host, target, dict(headers)))
        path = unquote(target.partition("?")[0])
        if path in self.served:
            return Answer(200, "application/octet-stream", self.served[path])
        parts = path.strip("/").split("/")
        accept = headers.get("accept", "")
        if parts[0] == "simple" and len(parts) == 2 and parts[1] in self._wheels:
            return self._simple(parts[1], accept)
        if parts[0] == "files":
            return self._file(parts[-1])
        if parts[0] == "debian":
            return self._debian("/".join(parts[1:]))
        name = path.strip("/").partition("/-/")[0]
        if name in self._npm:
            return self._npm_answer(name, path, host)
        return Answer(404, "text/plain", b"not here\n")

    def _simple(self, name: str, accept: str) -> Answer:
        files, links = [], []
        for file, (content, published, metadata) in self._wheels[name].items():
            digest = hashlib.sha256(content).hexdigest()
            url = f"{self._origin}/files/{file}"
            entry: dict[str, object] = {"filename": file, "url": url, "hashes": {"sha256": digest}, "yanked": False}
            entry["upload-time"] = _iso(published)
            entry["size"] = len(content)
            if metadata:
                entry["core-metadata"] = {"sha256": hashlib.sha256(metadata).hexdigest()}
            files.append(entry)
            links.append(f'<a href="{url}#sha256={digest}">{file}</a>')
        if JSON in accept:
            versions = sorted({file.split("-")[1].removesuffix(".tar.gz") for file in self._wheels[name]})
            page = {"meta": {"api-version": "1.1"}, "name": name, "versions": versions, "files": files}
            return Answer(200, JSON, json.dumps(page).encode())
        return Answer(200, "text/html", ("<html><body>" + "\n".join(links) + "</body></html>").encode())

    def _file(self, file: str) -> Answer:
        bare = file.removesuffix(".metadata")
        for files in self._wheels.values():
            if bare in files:
                content, _, metadata = files[bare]
                return Answer(200, "application/octet-stream", metadata if file != bare else content)
        return Answer(404, "text/plain", b"no such file\n")

    def _npm_answer(self, name: str, path: str, host: str) -> Answer:
        versions: dict[str, dict[str, Any]] = {}
        times = {}
        for version, (content, published, scripts) in self._npm[name].items():
            file = f"{name.rpartition('/')[2]}-{version}.tgz"
            if path == f"/{name}/-/{file}":
                return Answer(200, "application/octet-stream", content)
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
            dist = {"tarball": f"https://{host}/{name}/-/{file}", "integrity": integrity}
            dist["shasum"] = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            versions[version] = {"name": name, "version": version, "dist": dist, "scripts": scripts}
            versions[version] |= {"hasInstallScript": True} if scripts else {}
            times[version] = _iso(published)
        if "/-/" in path:
            return Answer(404, "text/plain", b"no such tarball\n")
        page = {"name": name, "dist-tags": {"latest": list(versions)[-1]}, "versions": versions, "time": times}
        return Answer(200, "application/json", json.dumps(page).encode())

    def _debian(self, path: str) -> Answer:
        if path in self._debs:
            return Answer(200, "application/octet-stream", self._debs[path][2])
        lists = {"main/binary-amd64/Packages": b"", "main/binary-all/Packages": b""}
        stanzas = [
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: T <t@example.test>\n"
            f"Filename: {file}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
            "Description: a package of a test\n"
            for file, (name, version, content) in self._debs.items()
        ]
        lists["main/binary-amd64/Packages"] = "\n".join(stanzas).encode()
        made = dict(lists)
        for at, text in lists.items():
            made[at + ".xz"] = lzma.compress(text)
            made[at + ".gz"] = gzip.compress(text, mtime=0)
        entries = "".join(f" {hashlib.sha256(data).hexdigest()} {len(data)} {at}\n" for at, data in made.items())
        release = (
            f"Origin: T\nSuite: stable\nCodename: stable\nDate: {time.strftime('%a, %d %b %Y %H:%M:%S', time.gmtime())} UTC\n"
            f"Architectures: all amd64\nComponents: main\nAcquire-By-Hash: yes\nSHA256:\n{entries}"
        )
        if path == "dists/stable/Release":
            return Answer(200, "text/plain", release.encode())
        below = path.removeprefix("dists/stable/")
        if below in made:
            return Answer(200, "application/octet-stream", made[below])
        digest = path.rpartition("/by-hash/SHA256/")[2]
        for data in made.values():
            if hashlib.sha256(data).hexdigest() == digest:
                return Answer(200, "application/octet-stream", data)
        return Answer(404, "text/plain", b"not here\n")


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(moment))


async def serve_index(
    index: PackageIndex, host: str, at: tuple[str, int] | socket.socket, context: ssl.SSLContext | None = None
) -> asyncio.Server:
    """Serve ``index`` as ``host`` (HTTP/1.1, one request after the other) at an address or listening socket, TLS with
    ``context``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                status, kind, body, more = index.answer(host, target, headers)
                lines = [f"HTTP/1.1 {status} OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
                lines += [f"{name}: {value}" for name, value in more]
                writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # the client has gone, or is none
        finally:
            writer.close()

    if isinstance(at, socket.socket):
        return await asyncio.start_server(serve, sock=at, ssl=context)
    return await asyncio.start_server(serve, *at, ssl=context)
