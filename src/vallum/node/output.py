"""What a command writes, kept within bounds: the first and the last part, and how much there was."""

from __future__ import annotations

import hashlib


class Capture:
    """Keeps at most ``limit_bytes`` of a stream: its head and its tail.

    Memory is bounded by about the limit whatever the guest writes; the digest and the count are of everything.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._half = max(1, limit_bytes // 2)
        self._head = bytearray()
        self._tail = bytearray()
        self._digest = hashlib.sha256()
        self.total = 0
        """Bytes seen."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self.total += len(data)
        self._digest.update(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 2 * self._half:
                del self._tail[: len(self._tail) - self._half]

    @property
    def sha256(self) -> str:
        """Hex digest of everything seen."""
        return self._digest.hexdigest()

    def kept(self) -> bytes:
        """Head and tail; where something was left out, a line between says how much."""
        tail = self._tail[-self._half :]
        missing = self.total - len(self._head) - len(tail)
        if missing <= 0:
            return bytes(self._head + tail)
        return bytes(self._head) + b"\n[vallum: %d bytes left out]\n" % missing + bytes(tail)
