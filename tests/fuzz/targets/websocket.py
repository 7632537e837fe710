"""Coverage-guided fuzzing of WebSocket frames.

The first byte says whether frames are masked and where the input is cut. What passes is frames again, and in pieces the
same payload passes as at once.
"""

from __future__ import annotations

from vallum.gateway.http.websocket import FrameError, FrameFilter

SEEDS = (
    b"\x00\x81\x02ab\x88\x00",
    b"\x41\x01\x82\x01\x02\x03\x04ab\x80\x81\x01\x02\x03\x04c",
    b"\x80\x82\x7e\x00\x80" + bytes(128),
    b"\x40\x89\x00",
)


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


def fuzz(data: bytes) -> None:
    if not data:
        return
    masked, cut, rest = bool(data[0] & 1), data[0] * len(data) // 256, data[1:]
    _, whole_failed = payload_of([rest], masked=masked)
    _, parts_failed = payload_of([rest[:cut], rest[cut:]], masked=masked)
    assert whole_failed == parts_failed
