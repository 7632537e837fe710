"""Images of registries, fetched by ``skopeo`` (no Docker engine) into a directory that is gone when it was unpacked.

What ``skopeo`` says is no evidence: the manifest is compared with the digest that was asked for, everything else with
what the manifest says. It runs with an environment of its own making (proxies, certificates and credentials are
passed on) and is ended when it fetches more than the manifest announced.
Not covered: bugs of ``skopeo`` itself; it talks to the registry with the node's privilege.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.text import keep, show
from vallum.sandbox.images.oci_source import Directory
from vallum.sandbox.images.oci_spec import (
    MAX_JSON_BYTES,
    Manifest,
    check_digest,
    choose_platform,
    find_architecture,
    parse_manifest,
)
from vallum.sandbox.images.store import Store, hash_bytes

log = logging.getLogger(__name__)

LOOK_WITHIN_S = 120.0
"""For a manifest."""
FETCH_WITHIN_S = 6 * 3600.0
"""For everything; a registry that sends a byte now and then must not hold us for ever."""
SAY_EVERY_S = 5.0
_SLACK_BYTES = 64 << 20
_POLL_S = 0.1

_PASSED_ON = (
    "HOME", "PATH", "XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "CONTAINERS_REGISTRIES_CONF", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

# Source: distribution/reference, reference.go (grammar of references).
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?P<repository>(?:(?P<host>[A-Za-z0-9.-]+(?::[0-9]+)?|\[[0-9a-fA-F:]+\](?::[0-9]+)?)/)?{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)

_TROUBLES: tuple[tuple[str, type[InvalidInput | SandboxError], str], ...] = (
    (
        r"no space left on device|disk quota exceeded",
        SandboxError,
        "the disk of the image store is full; free some space there",
    ),
    (
        r"unauthorized|authentication required|access to the resource is denied|invalid username/password|\b403\b|forbidden",
        SandboxError,
        "the registry wants to know who asks, or there is no such image; log in with: skopeo login REGISTRY",
    ),
    (
        r"manifest unknown|name unknown|not found|\b404\b|repository name not known",
        InvalidInput,
        "the registry has no such image",
    ),
    (
        r"x509|certificate|server gave HTTP response to HTTPS client|tls:",
        SandboxError,
        "the registry cannot be trusted: no TLS, or a certificate that is not valid here; see containers-certs.d(5) and containers-registries.conf(5)",
    ),
    (
        r"connection (refused|reset)|no such host|timeout|deadline exceeded|unreachable|no route to host|EOF|dial tcp|misbehaving",
        SandboxError,
        "the registry cannot be reached; check its name and the network of this machine",
    ),
    (
        r"policy\.json",
        SandboxError,
        "skopeo has no policy; install the package containers-common (golang-github-containers-common)",
    ),
    (
        r"signature|policy",
        SandboxError,
        "the policy of this machine (containers-policy.json) does not accept the image",
    ),
    (
        r"toomanyrequests|too many requests|rate limit",
        SandboxError,
        "the registry allows no more requests now; wait, or log in",
    ),
)


@dataclass(frozen=True)
class Name:
    """An image of a registry."""

    repository: str
    tag: str | None
    digest: str | None

    @property
    def full(self) -> str:
        """As registries are asked; a digest says it all, so a tag beside it is dropped."""
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag or 'latest'}"

    def pinned(self, digest: str) -> Name:
        """The same repository, by digest."""
        return replace(self, digest=digest)


@dataclass(frozen=True)
class Pulled:
    """An image that was fetched."""

    digest: str
    """Of its manifest for this machine."""
    source: Directory


def parse_name(text: str, what: str) -> Name:
    """``[registry[:port]/]name[:tag][@sha256:...]``. Pure.

    Raises:
        InvalidInput: it is not of that form.
    """
    match = _NAME.fullmatch(text) if len(text) < 512 else None
    if match is None:
        raise InvalidInput(
            f"{what} is not usable: write docker://[REGISTRY/]NAME[:TAG] or docker://[REGISTRY/]NAME@sha256:DIGEST"
        )
    host, repository = match["host"], match["repository"]
    if host is None or not (any(mark in host for mark in ".:[") or host == "localhost"):
        # As everywhere: a name without a registry is Docker Hub's, and there a name without an owner is in `library`.
        repository = "docker.io/" + (repository if "/" in repository else f"library/{repository}")
    return Name(repository=repository, tag=match["tag"], digest=match["digest"])


def pull(name: Name, place: Path, what: str, store: Store) -> Pulled:
    """Fetch an image into ``place``, an empty directory of ours.

    Raises:
        InvalidInput: the registry has no such image, or it is not for this machine, or not what was asked for.
        SandboxError: no skopeo, no registry, no room, no permission.
    """
    program = shutil.which("skopeo")
    if program is None:
        raise SandboxError(
            f"{what} cannot be pulled: skopeo is not installed; install it (Debian, Ubuntu: apt-get install skopeo; Fedora: dnf install skopeo)"
        )
    with store.explained():
        store.sweep()
        (place / "tmp").mkdir(mode=0o700)
    skopeo = _Skopeo(program, place, what, store)
    digest, manifest = skopeo.look(name)
    skopeo.fetch(name.pinned(digest), digest, manifest)
    return Pulled(digest, Directory(place / "image", what, blobs=""))


class _Skopeo:
    """Runs it."""

    def __init__(self, program: str, place: Path, what: str, store: Store) -> None:
        self._program = program
        self._place = place
        self._what = what
        self._store = store

    def look(self, name: Name) -> tuple[str, Manifest]:
        """(digest, manifest) for this machine."""
        for _ in range(4):
            raw = self._run(["inspect", "--raw", f"docker://{name.full}"], LOOK_WITHIN_S, most_bytes=_SLACK_BYTES)
            digest = hash_bytes(raw)
            if name.digest is not None and digest != name.digest:
                raise InvalidInput(
                    f"{self._what} is not usable: the registry sent something else: its digest is {digest}"
                )
            manifest = parse_manifest(raw, self._what)
            if manifest.manifests is None:
                return digest, manifest
            name = name.pinned(choose_platform(manifest.manifests, self._what).digest)
        raise InvalidInput(f"{self._what} is not usable: its indexes are nested too deeply")

    def fetch(self, name: Name, digest: str, manifest: Manifest) -> None:
        """Everything, into ``image``; then under the names that a source expects."""
        announced = sum(layer.size for layer in manifest.layers or ())
        found = os.statvfs(self._place)
        if announced > found.f_bavail * found.f_frsize:
            with self._store.explained():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        image = self._place / "image"
        log.info("pulling %s: %d layers, %.1f MB", name.full, len(manifest.layers or ()), announced / 1e6)
        self._run(
            ["--override-os", "linux", "--override-arch", find_architecture(), "--tmpdir", str(self._place / "tmp"),
             "copy", "--quiet", f"docker://{name.full}", f"dir:{image}"],
            FETCH_WITHIN_S, most_bytes=2 * announced + _SLACK_BYTES, say=name.full,
        )  # fmt: skip
        # `dir:` keeps the manifest as it came, under a name of its own.
        with self._store.explained():
            (image / "manifest.json").rename(image / check_digest(digest, self._what).removeprefix("sha256:"))

    def _run(self, arguments: Sequence[str], within_s: float, *, most_bytes: int, say: str = "") -> bytes:
        """Its output.

        Raises:
            InvalidInput, SandboxError: it failed.
        """
        environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            "TMPDIR": str(self._place / "tmp")
        }
        with (
            self._store.explained(),
            tempfile.TemporaryFile(dir=self._place) as out,
            tempfile.TemporaryFile(dir=self._place) as err,
        ):
            process = subprocess.Popen(
                [self._program, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ,
                cwd=self._place, start_new_session=True,
            )  # fmt: skip
            try:
                code = self._watch(process, within_s, most_bytes, say)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code != 0:
                raise explain(_head(err, 65536), self._what)
            return _head(out, MAX_JSON_BYTES + 1)

    def _watch(self, process: subprocess.Popen[bytes], within_s: float, most_bytes: int, say: str) -> int:
        began = said = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            now = time.monotonic()
            self._store.check_stop()
            if now - began > within_s:
                raise SandboxError(
                    f"{self._what} cannot be pulled: the registry took longer than {within_s:.0f} s; try again"
                )
            used = measure(self._place)
            if used > most_bytes:
                raise InvalidInput(f"{self._what} is not usable: the registry sends more than its manifest announced")
            if say and now - said > SAY_EVERY_S:
                said = now
                log.info("pulling %s: %.1f MB so far", say, used / 1e6)


def explain(words: bytes, what: str) -> InvalidInput | SandboxError:
    """What skopeo's words mean. Pure."""
    text = keep(words)
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    last = re.sub(r'^time="[^"]*" level=\w+ msg=', "", lines[-1]).strip('"')
    for pattern, kind, meaning in _TROUBLES:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"{what} cannot be pulled: {meaning} (skopeo: {show(last)})")
    return SandboxError(f"{what} cannot be pulled: skopeo failed: {show(last)}")


def measure(directory: Path) -> int:
    """Bytes of the regular files below a directory; what vanishes meanwhile does not count."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).lstat().st_size
    return total


def _head(file: object, most: int) -> bytes:
    assert hasattr(file, "seek")
    assert hasattr(file, "read")
    file.seek(0)
    data = file.read(most)
    assert isinstance(data, bytes)
    return data
