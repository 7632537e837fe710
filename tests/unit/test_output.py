"""What a command writes is kept within bounds, and what is left out is said."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from vallum.node.output import Capture


@given(st.lists(st.binary(max_size=300), max_size=40), st.integers(min_value=2, max_value=500))
def test_head_and_tail_are_kept_and_the_digest_is_of_everything(chunks, limit):
    capture = Capture(limit)
    for chunk in chunks:
        capture.feed(chunk)
    whole = b"".join(chunks)
    kept = capture.kept()
    assert capture.total == len(whole)
    assert capture.sha256 == hashlib.sha256(whole).hexdigest()
    half = limit // 2
    if len(whole) <= 2 * half:
        assert kept == whole
    else:
        assert kept.startswith(whole[:half])
        assert kept.endswith(whole[-half:])
        assert b"[vallum: %d bytes left out]" % (len(whole) - 2 * half) in kept


def test_memory_is_bounded():
    capture = Capture(1000)
    for _ in range(1000):
        capture.feed(b"x" * 10_000)
    assert len(capture.kept()) < 1100
    assert capture.total == 10_000_000
