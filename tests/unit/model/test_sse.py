"""Server-sent events: any split, any line end, bounded."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.gateway.model.sse import SseError, SseEvent, SseReader, rewrite_event, write_event

STREAM = b'\xef\xbb\xbf: hello\r\nevent: a\r\ndata: 1\r\ndata:2\r\n\r\nid: 7\nretry: 5\ndata: {"x": "\xc3\xa4"}\n\ndata\n\n\nevent: lost\n\n'
EVENTS = [SseEvent("1\n2", "a"), SseEvent('{"x": "ä"}', id="7"), SseEvent("")]


def read(pieces):
    reader = SseReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    reader.end()
    return events


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_every_split_reads_the_same(cuts):
    edges = sorted({0, len(STREAM), *cuts})
    assert read([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


def test_byte_by_byte_with_bare_carriage_returns():
    stream = b"data: 1\r\rdata: 2\r\n\r\ndata: 3\n\n"
    assert [event.data for event in read([bytes([b]) for b in stream])] == ["1", "2", "3"]


LINES = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))


@given(st.lists(st.tuples(st.lists(LINES, min_size=1, max_size=3), st.sampled_from(["", "delta"])), max_size=5))
def test_what_is_written_is_read(events):
    wanted = [SseEvent("\n".join(lines), name) for lines, name in events]
    assert read([b"".join(rewrite_event(event) for event in wanted)]) == wanted


def test_one_line_is_written_plainly():
    assert write_event(b"{}", "ping") == b"event: ping\ndata: {}\n\n"


@pytest.mark.parametrize("stream", [b"data: x", b"data: x\n", b"event", b"data: 1\n\ndata: 2\n"])
def test_an_end_within_an_event_is_an_error(stream):
    reader = SseReader()
    reader.feed(stream)
    with pytest.raises(SseError):
        reader.end()


@pytest.mark.parametrize("piece", [b"x" * 60, b"data: x\n" * 60, b": comment\n" * 60])
def test_an_event_has_a_limit(piece):
    reader = SseReader(limit=400)
    with pytest.raises(SseError):
        for _ in range(50):
            reader.feed(piece)
    with pytest.raises(SseError):
        reader.feed(b"data: good\n\n")


@given(st.binary())
def test_any_bytes_are_events_or_an_error(data):
    reader = SseReader(limit=200)
    try:
        for event in reader.feed(data):
            assert isinstance(event.data, str)
        reader.end()
    except SseError:
        pass
