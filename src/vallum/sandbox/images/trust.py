"""A certificate authority that a cell trusts beside those of its image: files and variables where clients look.

What is added is one more lower directory under the image's own, so the image and the host stay as they are, and a guest
that changes it changes its own copy.

Covered: the system's bundle and hashed directory (curl, wget, git, apt, go, openssl, python), Java's store, and variables
for clients with roots of their own (pip, uv, requests, httpx, node, cargo, deno, AWS tools); images without a bundle.
Not covered: clients that pin certificates or keep roots elsewhere (browsers' NSS stores, a JDK brought by an image that
has a system store, too).

Source: openssl-rehash(1) for the name of a hashed link; JDK, PKCS12KeyStore, for what it calls a trusted entry.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from vallum.core.errors import SandboxError
from vallum.sandbox.base import Image, Layer

DIRECTORY = "/etc/vallum"
CERTIFICATE = f"{DIRECTORY}/ca.pem"
BUNDLE = f"{DIRECTORY}/ca-bundle.pem"
JAVA_STORE = f"{DIRECTORY}/truststore.p12"

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
)
"""Where distributions keep their bundle; several may be the same file."""
JAVA_STORES = ("/etc/ssl/certs/java/cacerts", "/etc/pki/ca-trust/extracted/java/cacerts", "/etc/pki/java/cacerts")
HASHED = "/etc/ssl/certs"

ENVIRON = {
    **dict.fromkeys(
        (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "GIT_SSL_CAINFO",
            "PIP_CERT",
            "CARGO_HTTP_CAINFO",
            "AWS_CA_BUNDLE",
            "DENO_CERT",
        ),
        BUNDLE,
    ),
    "NODE_EXTRA_CA_CERTS": CERTIFICATE,
}

_MAX_BYTES = 8 << 20
_MAX_LINKS = 40


@dataclass(frozen=True)
class Seen:
    """What a guest would find at a path."""

    path: str
    """Without links."""
    file: Path
    """Where that is outside."""
    found: os.stat_result


class ImageView:
    """Paths of an image as its guest sees them, links included. For trees that nobody changes meanwhile."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = sorted(layers, key=lambda layer: -len(PurePosixPath(layer.at).parts))

    def layer_of(self, path: str) -> Layer:
        """The layer that shows an absolute path without links."""
        return next(layer for layer in self._layers if PurePosixPath(path).is_relative_to(layer.at))

    def find(self, path: str) -> Seen | None:
        """What is there; None for nothing, for what lies behind a file, and for links in a circle."""
        todo = list(PurePosixPath(path).parts[1:])[::-1]
        seen = self._look("/")
        links = 0
        while todo and seen is not None:
            name = todo.pop()
            at = str(PurePosixPath(seen.path).parent if name == ".." else PurePosixPath(seen.path) / name)
            before, seen = seen, self._look(at)
            if seen is not None and stat.S_ISLNK(seen.found.st_mode):
                links += 1
                target = PurePosixPath(os.readlink(seen.file))  # noqa: PTH115 - text of the guest's, not a way of ours
                parts = list(target.parts)
                if target.is_absolute():
                    parts, before = parts[1:], self._look("/") or before
                todo += parts[::-1]
                seen = before if links <= _MAX_LINKS else None
        return seen

    def read(self, seen: Seen) -> bytes | None:
        """Content of a regular file of a sensible size."""
        if not stat.S_ISREG(seen.found.st_mode) or seen.found.st_size > _MAX_BYTES:
            return None
        fd = os.open(seen.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            return file.read(_MAX_BYTES)

    def _look(self, path: str) -> Seen | None:
        """What the uppermost directory of the layer that has it has at a path, of which no part before the last is a link."""
        layer = self.layer_of(path)
        below = PurePosixPath(path).relative_to(layer.at)
        for lower in layer.lowers:
            file = Path(lower, below)
            try:
                found = file.lstat()
            except (FileNotFoundError, NotADirectoryError):
                if self._hides(Path(lower), below):
                    return None
                continue
            is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
            return None if is_whiteout else Seen(path, file, found)
        return None

    @staticmethod
    def _hides(lower: Path, below: PurePosixPath) -> bool:
        """Whether a lower directory hides what those under it have at a path that it has not."""
        for parent in below.parents:
            file = lower / parent
            try:
                found = file.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not stat.S_ISDIR(found.st_mode):
                return True
            for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
                try:
                    if os.getxattr(file, name, follow_symlinks=False) == b"y":
                        return True
                except OSError:
                    continue  # it has none, or the file system knows none
        return False


def trust_authority(
    image: Image, certificate_pem: bytes, roots_pem: bytes, directory: Path, further: Mapping[str, bytes] | None = None
) -> Image:
    """The image, trusting one more authority. Some 50 ms, most of it Java's store; do it in a thread.

    Args:
        certificate_pem: the authority's certificate.
        roots_pem: further certificates to trust, and those of the host for an image that has none.
        further: other files to put there (path -> content), e.g. known_hosts.
        directory: is made; kept for as long as a cell has it under it, then deleted by the caller.

    Raises:
        SandboxError: it cannot be written; nothing is left behind.
    """
    view = ImageView(image.layers)
    try:
        files = _choose_files(view, certificate_pem, roots_pem)
        for path, content in (further or {}).items():
            seen = view.find(path)
            files[seen.path if seen is not None else path] = content
        layers = _write(image.layers, view, files, directory)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise SandboxError(
            f"the certificates of the run cannot be written to {directory}: {error.strerror}; make room there"
        ) from error
    environ = dict(ENVIRON)
    if JAVA_STORE in files:
        environ["JAVA_TOOL_OPTIONS"] = f"-Djavax.net.ssl.trustStore={JAVA_STORE} -Djavax.net.ssl.trustStoreType=PKCS12"
    return msgspec.structs.replace(image, layers=layers, environ={**environ, **image.environ})


def _choose_files(view: ImageView, certificate_pem: bytes, roots_pem: bytes) -> dict[str, bytes]:
    """Path in the guest (without links) -> content."""
    bundles = [seen for path in BUNDLES if (seen := view.find(path)) and stat.S_ISREG(seen.found.st_mode)]
    own = next((data for seen in bundles if (data := view.read(seen))), b"")
    bundle = b"\n".join(part.strip() for part in (own, roots_pem, certificate_pem) if part.strip()) + b"\n"
    files = {CERTIFICATE: certificate_pem, BUNDLE: bundle, **{seen.path: bundle for seen in bundles}}
    hashed = view.find(HASHED)
    if hashed is not None and stat.S_ISDIR(hashed.found.st_mode):
        files[f"{hashed.path}/{hash_subject(certificate_pem)}.0"] = certificate_pem
    elif hashed is None and not bundles:
        files[BUNDLES[0]] = bundle
    stores = [seen.path for path in JAVA_STORES if (seen := view.find(path)) and stat.S_ISREG(seen.found.st_mode)]
    store = make_java_store(bundle)
    files.update(dict.fromkeys(stores or [JAVA_STORE], store))
    return files


def _write(layers: list[Layer], view: ImageView, files: dict[str, bytes], directory: Path) -> list[Layer]:
    directory.mkdir(mode=0o700, parents=True)
    tops: dict[str, Path] = {}
    for path, data in files.items():
        at = view.layer_of(path).at
        top = tops.setdefault(at, directory / str(len(tops)))
        _make_directory(top, None)
        below = PurePosixPath(path).relative_to(at)
        for parent in list(below.parents)[-2::-1]:
            _make_directory(top / parent, view.find(str(PurePosixPath(at) / parent)))
        file = top / below
        file.write_bytes(data)
        file.chmod(0o444)
    chosen = []
    for layer in layers:
        if layer.at not in tops:
            chosen.append(layer)
            continue
        lowers = [*layer.lowers[: layer.sealed], str(tops[layer.at]), *layer.lowers[layer.sealed :]]
        chosen.append(msgspec.structs.replace(layer, lowers=lowers))
    return chosen


def _make_directory(path: Path, like: Seen | None) -> None:
    """A directory that shows the mode and owner that it had: the uppermost one counts."""
    if path.exists():
        return
    path.mkdir()
    if like is not None and os.geteuid() == 0:
        os.chown(path, like.found.st_uid, like.found.st_gid)
    path.chmod(stat.S_IMODE(like.found.st_mode) if like is not None else 0o755)  # whatever the umask


def hash_subject(certificate_pem: bytes) -> str:
    """What a certificate is called in a hashed directory, without its number.

    SHA-1 of the subject in canonical form (UTF-8, lower case, single blanks, without the outer SEQUENCE).
    """
    from cryptography import x509  # slow to load, and few cells need it

    subject = x509.load_pem_x509_certificate(certificate_pem).subject
    names = [x509.NameAttribute(each.oid, " ".join(str(each.value).lower().split())) for each in subject]
    encoded = x509.Name(names).public_bytes()
    digest = hashlib.sha1(encoded[_header(encoded, 0, 0x30)[0] :], usedforsecurity=False).digest()
    return f"{int.from_bytes(digest[:4], 'little'):08x}"


def make_java_store(bundle_pem: bytes) -> bytes:
    """A PKCS#12 store of every certificate of a bundle, without a password (as JDKs have shipped theirs since 18)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    entries = []
    for number, piece in enumerate(bundle_pem.split(b"-----BEGIN CERTIFICATE-----")[1:]):
        try:
            der = base64.b64decode(piece.partition(b"-----END CERTIFICATE-----")[0])
            if not has_positive_serial(der):
                continue  # two old roots have none, which RFC 5280 forbids and the library is about to refuse
            certificate = x509.load_der_x509_certificate(der)
        except ValueError:
            continue
        entries.append(pkcs12.PKCS12Certificate(certificate, f"root-{number}".encode()))
    return _without_mac(pkcs12.serialize_java_truststore(entries, serialization.NoEncryption()))


def _without_mac(store: bytes) -> bytes:
    """Without the seal of the empty password, which makes a JDK refuse every other: so it takes any, and none."""
    outer, _ = _header(store, 0, 0x30)
    safe = outer + sum(_header(store, outer, 0x02))
    content = store[outer : safe + sum(_header(store, safe, 0x30))]
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")  # a store is never as short as 127 bytes
    return bytes([0x30, 0x80 | len(size)]) + size + content


def has_positive_serial(der: bytes) -> bool:
    """Whether a certificate's serial number is above zero (RFC 5280 section 4.1.2.2). Raises ValueError: it is none."""
    at = 0
    for _ in range(2):  # Certificate, TBSCertificate
        at += _header(der, at, 0x30)[0]
    if der[at : at + 1] == b"\xa0":
        size, length = _header(der, at, 0xA0)
        at += size + length
    size, length = _header(der, at, 0x02)
    return int.from_bytes(der[at + size : at + size + length], "big", signed=True) > 0


def _header(der: bytes, at: int, tag: int) -> tuple[int, int]:
    """(size of the header, length of the value) of one DER value."""
    if der[at : at + 1] != bytes([tag]) or len(der) < at + 2:
        raise ValueError("not a certificate")
    first = der[at + 1]
    if first < 0x80:
        return 2, first
    return 2 + (first & 0x7F), int.from_bytes(der[at + 2 : at + 2 + (first & 0x7F)], "big")
