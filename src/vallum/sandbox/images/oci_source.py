"""Where an image's blobs lie on this machine: an OCI layout, an archive of one, what ``docker save`` wrote, a pull.

Covered: files that are none (a FIFO would hang us), JSON of any size, archives whose names or links lead nowhere; a
blob that is read whole is checked against its digest. Not covered: layers are checked while they are unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import stat
from pathlib import Path
from typing import BinaryIO, Protocol

from vallum.core.errors import InvalidInput
from vallum.core.tar import LayerError, TarReader
from vallum.core.text import keep, show
from vallum.sandbox.images.oci_spec import MAX_JSON_BYTES

_MAX_MEMBERS = 10_000


class Source(Protocol):
    """Blobs by name: a digest, or in what ``docker save`` wrote a path."""

    def open(self, blob: str) -> BinaryIO:
        """A blob from its beginning.

        Raises:
            InvalidInput: it is not there.
        """
        ...


def read_blob(source: Source, digest: str, what: str) -> bytes:
    """A manifest or configuration, whole.

    Raises:
        InvalidInput: missing, too large, or not of its digest.
    """
    data = read_json(source, digest, what)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise InvalidInput(f"{what} is not usable: the blob {digest} is corrupt: its bytes have another digest")
    return data


def read_json(source: Source, name: str, what: str) -> bytes:
    """A file of a place, whole.

    Raises:
        InvalidInput: missing or too large.
    """
    try:
        with source.open(name) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{what} is not usable: {name} cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise InvalidInput(f"{what} is not usable: {name} is larger than {MAX_JSON_BYTES} bytes")
    return data


def open_regular(path: Path) -> BinaryIO:
    """A regular file, unbuffered.

    Raises:
        OSError: it is not there, or is something else.
    """
    # O_NONBLOCK: a FIFO must not hang us. What it is, is asked of the open descriptor.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file", str(path))
    return os.fdopen(fd, "rb", buffering=0)


def read_all(path: Path) -> bytes:
    """A small file.

    Raises:
        OSError: it is not there, or is something else.
    """
    with open_regular(path) as file:
        return file.read(MAX_JSON_BYTES + 1)


class Directory:
    """Blobs as files: ``blobs/sha256/<hex>`` of a layout, or ``<hex>`` side by side as ``skopeo`` writes them."""

    def __init__(self, path: Path, what: str, *, blobs: str = "blobs/sha256/") -> None:
        """``blobs`` goes before the digest's digits."""
        self._path = path
        self._what = what
        self._blobs = blobs

    def open(self, blob: str) -> BinaryIO:
        """See :class:`Source`."""
        name = self._blobs + blob.removeprefix("sha256:") if blob.startswith("sha256:") else blob
        try:
            return open_regular(self._path / name)
        except OSError as error:
            raise InvalidInput(f"{self._what} is not usable: {name} cannot be read: {error.strerror}") from error


class Archive:
    """Blobs as members of a plain tar file, read where they lie."""

    def __init__(self, path: Path, what: str) -> None:
        """Finds out what is where.

        Raises:
            InvalidInput: it cannot be read, or is no plain tar archive.
        """
        self._path = path
        self._what = what
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            with open_regular(path) as file:
                self._scan(file)
        except OSError as error:
            raise InvalidInput(f"{what} is not there: {path}: {error.strerror}") from error
        except LayerError as error:
            raise InvalidInput(
                f"{what} is not usable: {path} is not a plain tar archive ({error}); decompress it first"
            ) from error

    def _scan(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        reader = TarReader(file.read)
        for number, member in enumerate(reader):
            if number >= _MAX_MEMBERS:
                raise LayerError(f"it has more than {_MAX_MEMBERS} members")
            name = posixpath.normpath(keep(member.name))
            self._members.pop(name, None)
            self._links.pop(name, None)
            if member.kind == "symlink":
                # Older `docker save` wrote a layer once and linked to it.
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), keep(member.link)))
            elif member.kind == "file":
                start = file.tell()
                if start + member.size > size:
                    raise LayerError("it ends inside a file")
                self._members[name] = (start, member.size)
                file.seek(start + member.size)
                reader.skip_data()

    def open(self, blob: str) -> BinaryIO:
        """See :class:`Source`."""
        name = posixpath.normpath(
            "blobs/sha256/" + blob.removeprefix("sha256:") if blob.startswith("sha256:") else blob
        )
        found = self._members.get(self._links.get(name, name))
        if found is None:
            raise InvalidInput(f"{self._what} is not usable: {show(name)} is not in the archive")
        return io.BufferedReader(_Part(open_regular(self._path), *found), 1 << 17)


class _Part(io.RawIOBase):
    """A stretch of a file, which is closed with it."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._left = size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: self._left]  # type: ignore[arg-type]
        data = self._file.read(len(view))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
