"""The owner's secrets that the gateway puts into granted requests: one file each under ``HOME/credentials``.

Covered: a file that others may read or write, that is not the owner's or not a plain file is not used, and no cell starts while
one is there (a secret that cannot be read cannot be kept from leaving either). Values are in no argument list, environment,
record or log. Not covered: whoever is the owner (or root) reads the files; the system keyring is as good as the machine's.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path
from types import ModuleType
from typing import Literal

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import ControlMissing, InvalidInput, NodeError
from vallum.core.scope import check_id
from vallum.core.text import show
from vallum.gateway.kit import Credential
from vallum.rules.grants import parse_cidr, parse_host
from vallum.rules.names import is_under

MIN_SECRET_BYTES = 8
"""Shorter ones would be found everywhere when the record is searched for them."""
MAX_SECRET_BYTES = 16 * 1024
MAX_CREDENTIALS = 64
_MAX_FILE_BYTES = 128 * 1024
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_FORBIDDEN = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "expect"}
)
KEYRING_SERVICE = "vallum"

Place = Literal["file", "keyring"]


class StoredCredential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A credential as it is kept. Fields as of :class:`vallum.gateway.kit.Credential`."""

    name: str
    hosts: tuple[str, ...]
    header: str = "authorization"
    prefix: str = "Bearer "
    user: str = ""
    host_keys: tuple[str, ...] = ()
    place: Place = "file"
    secret: bytes = b""
    """Empty when it is in the keyring."""

    def check(self) -> StoredCredential:
        """Return it with its hosts in their normal form.

        Raises:
            InvalidInput: something of it cannot be used; the secret is not in the message.
        """
        check_id(self.name, "the credential's name")
        if not self.hosts:
            raise InvalidInput(f"credential {self.name} names no host: say where it may be sent with --host")
        if self.header not in ("basic", "ssh-key") and (
            not _HEADER.fullmatch(self.header) or self.header in _FORBIDDEN
        ):
            raise InvalidInput(
                f"{show(self.header)!r} is no header for a credential: give for example authorization or x-api-key"
            )
        if any(not " " <= c <= "~" for c in self.prefix):
            raise InvalidInput(f"the prefix of credential {self.name} has characters that a header cannot carry")
        return msgspec.structs.replace(self, hosts=tuple(_parse_host(host, self.name) for host in self.hosts))


def read_header(header: str | None, prefix: str | None) -> tuple[str, str]:
    """Header and prefix of a credential, from what was given of them. Pure."""
    carrier = (header or "authorization").lower()
    if prefix is None:
        prefix = "Bearer " if carrier == "authorization" else ""
    return carrier, prefix


def check_secret(stored: StoredCredential, secret: bytes) -> bytes:
    """Return the secret.

    Raises:
        InvalidInput: it cannot be sent the way that its credential is; it is not in the message.
    """
    size = len(secret)
    if not MIN_SECRET_BYTES <= size <= MAX_SECRET_BYTES:
        raise InvalidInput(
            f"the secret of {stored.name} has {size} bytes: give {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}, and nothing around it"
        )
    if stored.header == "ssh-key":
        if b"PRIVATE KEY-----" not in secret:
            raise InvalidInput(f"the secret of {stored.name} is no private key in PEM form: give the key file on stdin")
        return secret
    if any(not 0x20 <= byte <= 0x7E for byte in secret):
        raise InvalidInput(
            f"the secret of {stored.name} has bytes that a header cannot carry: give printable ASCII in one line"
        )
    if stored.header == "basic" and b":" not in secret:
        raise InvalidInput(f"the secret of {stored.name} is for Authorization: Basic: give user:password")
    return secret


def _parse_host(text: str, name: str) -> str:
    parsed = parse_cidr(text) or parse_host(text)
    if parsed is None or parsed == "*":
        raise InvalidInput(
            f"credential {name}: {show(text)!r} is no host that it may be sent to: give a name, *.name or an address (not all of them)"
        )
    return parsed


def covers(hosts: tuple[str, ...], target: str) -> bool:
    """Whether a host pattern or network (as rules have them) lies within the hosts of a credential. Pure."""
    for pattern in hosts:
        if pattern == target:
            return True
        if pattern.startswith("*.") and target != "*" and is_under(target.removeprefix("*."), pattern[2:]):
            return True
    return False


class CredentialStore:
    """The credentials of one home. Nothing is kept in memory between calls but what the keyring said."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        """Names of all, sorted."""
        try:
            found = [entry.name for entry in os.scandir(self._directory) if entry.name.endswith(".json")]
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".json") for name in found if not name.startswith("."))

    def list(self) -> list[StoredCredential]:
        """All, without their secrets.

        Raises:
            NodeError: a file is not to be trusted, or cannot be read.
        """
        return [msgspec.structs.replace(self._read(name), secret=b"") for name in self.names()]

    def load(self) -> tuple[Credential, ...]:
        """All, with their secrets. Blocks where one is in the keyring.

        Raises:
            NodeError: a file is not to be trusted, or cannot be read; or the keyring does not answer.
        """
        return tuple(self._unlock(self._read(name)) for name in self.names())

    def add(self, credential: StoredCredential, secret: bytes, *, replace: bool = False) -> None:
        """Keep one; on the disk, or nothing of it, on return.

        Raises:
            InvalidInput: there is one of that name (and not ``replace``), or it cannot be used.
            NodeError: it cannot be written.
        """
        credential = credential.check()
        check_secret(credential, secret)
        names = self.names()
        if credential.name in names and not replace:
            raise InvalidInput(f"there is a credential {credential.name} already: remove it first, or add --replace")
        if credential.name not in names and len(names) >= MAX_CREDENTIALS:
            raise InvalidInput(f"there are {len(names)} credentials: remove one that is not needed any more")
        if credential.place == "keyring":
            _keyring_set(self._key_of(credential.name), secret)
        kept = msgspec.structs.replace(credential, secret=secret if credential.place == "file" else b"")
        self._write(credential.name, msgspec.json.encode(kept))

    def remove(self, name: str) -> None:
        """Forget one.

        Raises:
            InvalidInput: there is none of that name.
            NodeError: it cannot be removed.
        """
        if name not in self.names():
            raise InvalidInput(f"there is no credential {show(name)!r}: `vallum credentials list` shows them")
        with contextlib.suppress(NodeError):
            if self._read(name).place == "keyring":
                _keyring_delete(self._key_of(name))
        try:
            (self._directory / f"{name}.json").unlink()
        except OSError as error:
            raise NodeError(f"credential {name} cannot be removed from {self._directory}: {error.strerror}") from error

    def _key_of(self, name: str) -> str:
        return f"{self._directory}:{name}"

    def _unlock(self, stored: StoredCredential) -> Credential:
        secret = stored.secret if stored.place == "file" else _keyring_get(self._key_of(stored.name), stored.name)
        return Credential(
            name=stored.name, hosts=stored.hosts, header=stored.header, prefix=stored.prefix, secret=secret,
            user=stored.user, host_keys=stored.host_keys,
        )  # fmt: skip

    def _read(self, name: str) -> StoredCredential:
        path = self._directory / f"{name}.json"
        try:
            _refuse_loose(self._directory, os.lstat(self._directory), 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise NodeError(f"the credential file {path} cannot be read: {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            _refuse_loose(path, os.fstat(fd), 0o600)
            raw = file.read(_MAX_FILE_BYTES + 1)
        try:
            stored = msgspec.json.decode(raw, type=StoredCredential)
            if stored.name != name:
                raise InvalidInput(f"it is of a credential {show(stored.name)!r}")
            stored = stored.check()
            if stored.place == "file":
                check_secret(stored, stored.secret)
        except (*MALFORMED, InvalidInput) as error:
            raise NodeError(f"the credential file {path} cannot be used ({error}): remove and add it again") from error
        return stored

    def _write(self, name: str, data: bytes) -> None:
        temporary = self._directory / f".{name}.{secrets.token_hex(4)}"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_loose(self._directory, os.lstat(self._directory), 0o700)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                temporary.replace(self._directory / f"{name}.json")
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise NodeError(f"credential {name} cannot be kept in {self._directory}: {error.strerror}") from error


def _refuse_loose(path: Path, found: os.stat_result, mode: int) -> None:
    wanted = stat.S_ISDIR if mode == 0o700 else stat.S_ISREG
    if not wanted(found.st_mode):
        raise NodeError(
            f"{path} is not a plain {'directory' if mode == 0o700 else 'file'}: credentials are not read from it"
        )
    if found.st_uid != os.geteuid():
        raise NodeError(
            f"{path} belongs to uid {found.st_uid}, not to you: credentials are not read from it; remove it"
        )
    if found.st_mode & 0o077:
        raise NodeError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):o}, so others may see the secret: run chmod {mode:o} on it, "
            "and consider a new secret"
        )


def _keyring_get(key: str, name: str) -> bytes:
    keyring, broken = _keyring()
    try:
        secret = keyring.get_password(KEYRING_SERVICE, key)
    except broken as error:
        raise NodeError(f"the keyring does not give credential {name}: {type(error).__name__}; unlock it") from error
    if secret is None:
        raise NodeError(f"the keyring has no credential {name} any more: remove and add it again")
    return str(secret).encode()


def _keyring_set(key: str, secret: bytes) -> None:
    keyring, broken = _keyring()
    try:
        keyring.set_password(KEYRING_SERVICE, key, secret.decode())
    except broken as error:
        raise NodeError(
            f"the keyring does not take it: {type(error).__name__}; unlock it, or leave --keyring out"
        ) from error


def _keyring_delete(key: str) -> None:
    keyring, broken = _keyring()
    with contextlib.suppress(broken):
        keyring.delete_password(KEYRING_SERVICE, key)


def _keyring() -> tuple[ModuleType, type[Exception]]:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError as error:
        raise ControlMissing("the system keyring needs the library keyring: install vallum[keyring]") from error
    return keyring, KeyringError
