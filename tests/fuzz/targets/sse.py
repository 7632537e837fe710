"""Coverage-guided fuzzing of the reader of server-sent events."""

from vallum.gateway.model.sse import SseError, SseReader, rewrite_event

SEEDS = (b"\x10event: a\r\nid: 1\r\ndata: b\r\ndata: c\r\n\r\n: x\n\ndata\n\n", b"\x03data: [DONE]\n\n")


def fuzz(data: bytes) -> None:
    """Whole and cut in two it reads the same; what is written again reads the same."""
    cut = data[0] if data else 0
    readers = SseReader(limit=4096), SseReader(limit=4096)
    results = []
    for reader, pieces in zip(readers, ([data], [data[:cut], data[cut:]]), strict=True):
        events = []
        try:
            for piece in pieces:
                events += reader.feed(piece)
            reader.end()
        except SseError:
            events = None
        results.append(events)
    assert results[0] == results[1] or None in results
    if results[0]:
        again = SseReader()
        assert again.feed(b"".join(rewrite_event(event) for event in results[0])) == results[0]
