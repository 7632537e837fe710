"""A compressed layer as a stream of plain bytes, with digests of both sides and limits on what comes out.

Covered: streams that inflate beyond all measure (by bytes and by ratio), truncated ones, members after one another,
zstd windows that would take gigabytes. What the file says it is (its media type) is not asked: the first bytes say it.
Not covered: that the digests are right; who unpacks compares them before anything is used.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import IO, Protocol, cast

from vallum.core.errors import SandboxError
from vallum.core.tar import LayerError

_CHUNK = 1 << 17
_MAX_WINDOW_BYTES = 1 << 27
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"


@dataclass(frozen=True)
class LayerLimits:
    """What one layer may be, unpacked."""

    max_bytes: int = 64 << 30
    """Of the plain archive: a layer with a model's weights has some tens of GB."""
    max_entries: int = 2_000_000
    max_ratio: int = 300
    """Plain to compressed bytes, beyond the first ``free_bytes``."""
    free_bytes: int = 64 << 20
    reserve_bytes: int = 256 << 20
    """Of the file system, left for everything else (or a twentieth of it, if that is less): records must go on."""


class Reader(Protocol):
    """Where bytes come from."""

    def read(self, most: int, /) -> bytes:
        """Up to ``most`` bytes; none at the end."""
        ...


class _Counted:
    """What is read, counted and digested."""

    def __init__(self, source: Reader, *, same_as: _Counted | None = None) -> None:
        """``same_as``: these bytes are that one's, which digests them."""
        self._source = source
        self._held = b""
        self._same_as = same_as
        self._hash = hashlib.sha256()
        self.count = 0

    @property
    def digest(self) -> str:
        """Of everything so far."""
        return self._same_as.digest if self._same_as is not None else f"sha256:{self._hash.hexdigest()}"

    def peek(self) -> bytes:
        """The first four bytes."""
        while len(self._held) < 4 and (part := self._take(4 - len(self._held))):
            self._held += part
        return self._held

    def read(self, most: int = _CHUNK) -> bytes:
        """For the decompressors."""
        if self._held:
            part, self._held = self._held[:most], self._held[most:]
            return part
        return self._take(most)

    def _take(self, most: int) -> bytes:
        part = self._source.read(most)
        self.count += len(part)
        if self._same_as is None:
            self._hash.update(part)
        return part


class _Gunzip:
    """Several gzip members after one another, with output of bounded size at a time."""

    def __init__(self, source: _Counted) -> None:
        self._source = source
        self._inflater = zlib.decompressobj(31)
        self._input = b""
        self._more = False

    def read(self, most: int, /) -> bytes:
        """See :class:`Reader`.

        Raises:
            LayerError: it is damaged or ends early.
        """
        while True:
            if self._inflater.eof:
                self._input = self._inflater.unused_data or self._source.read()
                if not self._input:
                    return b""
                self._inflater = zlib.decompressobj(31)
            elif not self._input and not self._more:
                self._input = self._source.read()
                if not self._input:
                    raise LayerError("the compressed layer ends too early")
            try:
                out = self._inflater.decompress(self._input, most)
            except zlib.error as error:
                raise LayerError(f"the compressed layer is damaged ({error})") from error
            self._input = self._inflater.unconsumed_tail
            self._more = len(out) == most
            if out:
                return out


class _Unzstd:
    """zstd through the binding that every package index has."""

    def __init__(self, source: _Counted) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise SandboxError(
                "a layer of the image is compressed with zstd, which needs the Python package 'zstandard': install it with pip"
            ) from error
        self._error: type[Exception] = zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        # Of a file it wants nothing but read().
        self._reader = decompressor.stream_reader(cast("IO[bytes]", source), read_size=_CHUNK, read_across_frames=True)

    def read(self, most: int, /) -> bytes:
        """See :class:`Reader`. A stream that ends early just ends: its digest tells.

        Raises:
            LayerError: it is damaged.
        """
        try:
            return self._reader.read(most)
        except self._error as error:
            raise LayerError(f"the compressed layer is damaged ({error})") from error


class LayerStream:
    """Plain bytes of a layer. :meth:`finish` reads to the end and tells the digests."""

    def __init__(self, source: Reader, limits: LayerLimits) -> None:
        self._raw = _Counted(source)
        self._limits = limits
        first = self._raw.peek()
        inner: Reader = self._raw
        if first.startswith(_GZIP):
            inner = _Gunzip(self._raw)
        elif first == _ZSTD or (first[1:] == _SKIPPABLE and first[0] & 0xF0 == 0x50):
            inner = _Unzstd(self._raw)
        self._plain = _Counted(inner, same_as=self._raw if inner is self._raw else None)
        self._buffer = b""
        self._at = 0

    def read(self, most: int) -> bytes:
        """Up to ``most`` plain bytes; none at the end.

        Raises:
            LayerError: it is damaged, or larger than the limits.
        """
        if self._at >= len(self._buffer):
            self._buffer, self._at = self._plain.read(_CHUNK), 0
            self._check_limits()
        part = self._buffer[self._at : self._at + most]
        self._at += len(part)
        return part

    def _check_limits(self) -> None:
        count, limits = self._plain.count, self._limits
        if count > limits.max_bytes:
            raise LayerError(f"it unpacks to more than {limits.max_bytes} bytes")
        if count > limits.free_bytes + limits.max_ratio * self._raw.count:
            raise LayerError(f"it unpacks to more than {limits.max_ratio} times its size, as no honest layer does")

    def finish(self) -> tuple[str, str, int]:
        """(digest of the compressed bytes, digest of the plain bytes, number of compressed bytes), after the last one.

        Raises:
            LayerError: as :meth:`read`.
        """
        while self.read(_CHUNK):
            pass
        while self._raw.read():  # after the last frame
            pass
        return (
            self._raw.digest,
            self._plain.digest,
            self._raw.count,
        )
