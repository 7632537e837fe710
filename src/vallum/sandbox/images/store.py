"""The image store: unpacked layers, each once, shared by every image and cell; and what is known of pulled images.

    layers/sha256-<hex>         a layer by the digest of its plain archive (diff id), owners as in the image
    layers/sha256-<hex>-mine    the same, made by an ordinary user: all of it is that user's
    layers/....implied          directories that a layer does not list (it goes with the layer)
    layers/.new-...             being made; removed when its maker is gone
    blobs/sha256/<hex>          manifests and configurations of pulled images
    refs/<hex>                  what a pulled name stood for
    pulls/<hex>                 a pull under way
    locks/...                   never deleted: two processes could otherwise hold "the same" lock

Covered: several processes at once (``flock``), a crash at any moment (a layer has its name only when all of it is on
disk), leftovers of a crash. Not covered: layers that no image needs any more are kept; delete them by hand while no
cell of theirs lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.tar import LayerError
from vallum.core.text import show
from vallum.sandbox.images.beneath import remove_tree
from vallum.sandbox.images.layer import Unpacked, Unpacker
from vallum.sandbox.images.layer_stream import LayerLimits, LayerStream
from vallum.sandbox.images.oci_source import Source, read_all
from vallum.sandbox.images.syncfs_priv import sync_file_system

log = logging.getLogger(__name__)

_NEW = ".new-"
_PULL = "pull-"
_LOOK_EVERY_S = 0.05
_FORGOTTEN_S = 3600.0
"""A small file that takes longer to write is nobody's any more."""


@dataclass(frozen=True)
class LayerRef:
    """One layer of an image."""

    diff_id: str
    """Digest of the plain archive."""
    blob: str
    """What the source calls it."""
    digest: str | None
    """Digest of the bytes as they are kept, where the manifest states one."""
    size: int | None
    """Their number, likewise."""


class Store:
    """The store of one home. Cheap: nothing is kept in memory."""

    def __init__(
        self, directory: Path, *, owners: bool, limits: LayerLimits | None = None, stop: threading.Event | None = None
    ) -> None:
        """``directory`` is made when missing, 0700.

        Args:
            directory: the store.
            owners: keep the owners of files (needs root).
            limits: what one layer may be.
            stop: when set, whatever is under way ends with an error.

        Raises:
            SandboxError: it cannot be made.
        """
        self.directory = directory
        self.owners = owners
        self._limits = limits
        self.stop = stop or threading.Event()
        with self.explained():
            for name in ("layers", "locks", "pulls", "blobs", "blobs/sha256", "refs"):
                (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Say what the file system's refusals mean here."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SandboxError(
                    f"the disk of the image store {self.directory} is full; free some space there (nothing half-made was left)"
                ) from error
            raise SandboxError(
                f"the image store {self.directory} cannot be used: {error.strerror}; fix its permissions"
            ) from error

    def check_stop(self) -> None:
        """Whether to go on.

        Raises:
            SandboxError: nobody waits any more.
        """
        if self.stop.is_set():
            raise SandboxError("preparing the image was stopped because nobody waits for it any more")

    # ------------------------------------------------------------------ layers

    def find_layer(self, diff_id: str) -> Path:
        """Where a layer is, or will be."""
        return self.directory / "layers" / (diff_id.replace(":", "-") + ("" if self.owners else "-mine"))

    def add_layer(self, layer: LayerRef, source: Source, what: str) -> Path:
        """Unpack a layer unless it is there; another process that is at it is waited for.

        Raises:
            InvalidInput: the layer is corrupt, or its author wants what no layer may.
            SandboxError: the disk is full, or the store cannot be written.
        """
        final = self.find_layer(layer.diff_id)
        if final.is_dir():
            return final
        with self.lock(final.name), self.explained():
            if final.is_dir():
                return final
            self.sweep()
            began = time.monotonic()
            temporary, implied = final.with_name(_NEW + final.name), self._find_implied(final)
            remove_tree(os.fsencode(temporary))
            temporary.mkdir(mode=0o700)
            try:
                done = self._fill(temporary, layer, source, what)
                # Before the layer has its name: nobody reads this until then.
                _write_durably(implied, b"\0".join(done.implied), "wb")
                temporary.rename(final)
                _sync_directory(final.parent)
            except BaseException:
                remove_tree(os.fsencode(temporary))
                implied.unlink(missing_ok=True)
                raise
        log.info("layer %s of %s unpacked in %.1f s", layer.diff_id[:19], show(what), time.monotonic() - began)
        return final

    def _fill(self, target: Path, layer: LayerRef, source: Source, what: str) -> Unpacked:
        name = layer.digest or layer.diff_id
        with source.open(layer.blob) as blob:
            unpacker = Unpacker(target, owners=self.owners, limits=self._limits, stop=self.stop)
            try:
                done = unpacker.unpack(LayerStream(blob, self._limits or LayerLimits()))
                if layer.size not in (None, done.raw_bytes) or layer.digest not in (None, done.digest):
                    raise LayerError(f"its bytes are not those of its digest: it has {done.digest}")
                if layer.diff_id != done.diff_id:
                    raise LayerError(
                        f"unpacked it is not what the configuration says: {done.diff_id} instead of {layer.diff_id}"
                    )
            except LayerError as error:
                raise InvalidInput(f"{what} is not usable: the layer {name} is corrupt or hostile: {error}") from error
            finally:
                unpacker.close()
        if done.devices:
            log.info("layer %s has %d device nodes, which cells do not get", name[:19], done.devices)
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_file_system(fd)
        finally:
            os.close(fd)
        return done

    def read_implied(self, layer: Path) -> frozenset[bytes]:
        """Directories of an unpacked layer whose owner and mode are for the layers below to say."""
        with self.explained():
            data = self._find_implied(layer).read_bytes()
        return frozenset(data.split(b"\0")) if data else frozenset()

    @staticmethod
    def _find_implied(layer: Path) -> Path:
        return layer.with_name(layer.name + ".implied")

    def sweep(self) -> None:
        """Remove what makers that are gone left half-made."""
        for left in (self.directory / "layers").glob(_NEW + "*"):
            with self._try_lock(left.name.removeprefix(_NEW)) as is_ours:
                if is_ours:
                    remove_tree(os.fsencode(left))
        for left in (self.directory / "pulls").glob("*"):
            with self._try_lock(_PULL + left.name) as is_ours:
                if is_ours:
                    remove_tree(os.fsencode(left))
        for left in (*self.directory.glob("refs/" + _NEW + "*"), *self.directory.glob("blobs/sha256/" + _NEW + "*")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _FORGOTTEN_S:
                    left.unlink()

    # ------------------------------------------------------------------ locks

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Be the only one at ``name``, on this machine; wait for others.

        Raises:
            SandboxError: stopped while waiting.
        """
        while True:
            with self._try_lock(name) as is_ours:
                if is_ours:
                    yield
                    return
            self.check_stop()
            self.stop.wait(_LOOK_EVERY_S)

    @contextlib.contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        with self.explained():
            fd = os.open(self.directory / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ pulled images

    @contextlib.contextmanager
    def hold_pull(self, name: str) -> Iterator[Path]:
        """Be the only one that pulls ``name``; gives an empty directory, gone when the block ends.

        Raises:
            SandboxError: stopped while waiting, or the store cannot be written.
        """
        key = hash_bytes(name.encode()).removeprefix("sha256:")
        place = self.directory / "pulls" / key
        with self.lock(_PULL + key):
            try:
                with self.explained():
                    remove_tree(os.fsencode(place))
                    place.mkdir(mode=0o700)
                yield place
            finally:
                with self.explained():
                    remove_tree(os.fsencode(place))

    def read_blob(self, digest: str) -> bytes | None:
        """A kept manifest or configuration; None when there is none of that digest that is still what it was."""
        try:
            data = read_all(self.directory / "blobs/sha256" / digest.removeprefix("sha256:"))
        except OSError:
            return None
        return data if hash_bytes(data) == digest else None

    def write_blob(self, data: bytes) -> None:
        """Keep a manifest or configuration."""
        self._write(self.directory / "blobs/sha256" / hash_bytes(data).removeprefix("sha256:"), data)

    def read_ref(self, name: str) -> str | None:
        """The manifest digest that ``name`` stood for when it was pulled; None when it never was."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            digest, _, stated = read_all(self._find_ref(name)).decode().partition(" ")
            return digest if stated == name else None
        return None

    def write_ref(self, name: str, digest: str) -> None:
        """Remember what ``name`` stands for."""
        self._write(self._find_ref(name), f"{digest} {name}".encode())

    def _find_ref(self, name: str) -> Path:
        return self.directory / "refs" / hash_bytes(name.encode()).removeprefix("sha256:")

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{_NEW}{secrets.token_hex(8)}")
        with self.explained():
            try:
                _write_durably(temporary, data, "xb")
                temporary.rename(path)
                _sync_directory(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def hash_bytes(data: bytes) -> str:
    """``sha256:...`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _write_durably(path: Path, data: bytes, mode: Literal["wb", "xb"]) -> None:
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
