"""Coverage-guided fuzzing of WebSocket frames: ``python tests/fuzz/websocket.py [-runs=N] [CORPUS]``.

The first byte says whether frames are masked and where the input is cut. What passes is frames again, and in pieces the
same payload passes as at once.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
    from vallum.gateway.http.websocket import FrameError, FrameFilter


def payload_of(pieces: list[bytes], *, masked: bool) -> tuple[bytes, bool]:
    """What passes, read by the same reader, and whether it ended with an error."""
    frames, again = FrameFilter((), masked=masked), FrameFilter((), masked=masked)
    plain = b""
    try:
        for piece in pieces:
            passed = frames.feed(piece)
            plain += passed if not masked else b""
            again.feed(passed)  # what passed never fails
    except FrameError:
        return plain, True
    assert again.messages == frames.messages
    return plain, False


def run(data: bytes) -> None:
    if not data:
        return
    masked, cut, rest = bool(data[0] & 1), data[0] * len(data) // 256, data[1:]
    _, whole_failed = payload_of([rest], masked=masked)
    _, parts_failed = payload_of([rest[:cut], rest[cut:]], masked=masked)
    assert whole_failed == parts_failed


if __name__ == "__main__":
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
