"""Every request of a connection is judged, and only what parsed in one way goes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.verdict import Decision
from vallum.gateway.http1 import Http1Watch, RefusedError


def watch() -> Http1Watch:
    def judge(host: str | None) -> Decision:
        return Decision(verdict="allow" if host == "a.example" else "deny", rule="host-mismatch", reason=str(host))

    return Http1Watch(judge, {"a.example", "203.0.113.1"})


def get(host: str = "a.example", path: str = "/", extra: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode()


def drip(data: bytes, piece: int) -> bytes:
    w = watch()
    return b"".join(w.feed(data[at : at + piece]) for at in range(0, len(data), piece))


CHUNKED = b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"
LENGTH = b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello"


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_kept_alive_requests_pass_in_any_pieces(piece: int) -> None:
    assert drip(get() + LENGTH + get(path="/2") + LENGTH, piece) == get() + LENGTH + get(path="/2") + LENGTH
    assert drip(CHUNKED + get(), piece).endswith(b"0\r\nX-T: 1\r\n\r\n" + get())


@pytest.mark.parametrize(
    "bad",
    [
        get("evil.example"),
        b"GET http://evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
        b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: a.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding : chunked\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.example\r\nX: " + b"a" * 70_000,
        b"SSH-2.0-x\r\n\r\n",
    ],
)
@pytest.mark.parametrize("before", [b"", get(), LENGTH, CHUNKED])
def test_refused_first_or_later(bad: bytes, before: bytes) -> None:
    w = watch()
    if before:
        assert w.feed(before)
    with pytest.raises(RefusedError):
        w.feed(bad)
    # In one batch, nothing of it goes out.
    with pytest.raises(RefusedError):
        watch().feed(before + bad)


def test_a_server_granted_by_address_is_no_proxy() -> None:
    w = Http1Watch(lambda _: Decision(verdict="allow", rule="allow:203.0.113.1", reason=""), {"203.0.113.1"})
    assert w.feed(get("any.example")) == get("any.example")
    direct = b"GET http://203.0.113.1/ HTTP/1.1\r\nHost: 203.0.113.1\r\n\r\n"
    assert w.feed(direct) == direct
    with pytest.raises(RefusedError):
        w.feed(b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")


def test_a_smuggled_request_is_judged_like_any_other() -> None:
    hidden = b"0\r\n\r\n" + get("evil.example")
    with pytest.raises(RefusedError):
        watch().feed(b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n" + hidden)
    # As a body it is a body: its length was given, and the server is told the same length.
    body = b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden
    assert watch().feed(body) == body
    # Odd line ends and folded lines leave as one plain form.
    assert watch().feed(b"GET / HTTP/1.1\nHost: a.example\nX: a\n  b\n\n") == get(extra="X: a b\r\n")


WS = "Connection: Upgrade\r\nUpgrade: websocket\r\n"


def test_websocket_first_then_opaque() -> None:
    w = watch()
    assert w.feed(get(extra=WS) + b"early") == get(extra=WS)
    assert w.feed(b" more") == b""
    assert w.feed_response(b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 10") == b""
    assert w.feed_response(b"1 Switching Protocols\r\n") == b"early more"
    assert w.feed(b"\x81\x05hello") == b"\x81\x05hello"


def test_websocket_refused_by_the_server_stays_http() -> None:
    w = watch()
    w.feed(get(extra=WS) + get("evil.example"))
    with pytest.raises(RefusedError):
        w.feed_response(b"HTTP/1.1 200 OK\r\n")
    held = watch()
    held.feed(get(extra=WS))
    with pytest.raises(RefusedError):
        held.feed(b"x" * 70_000)


@pytest.mark.parametrize(
    "extra", ["Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n", WS]
)
def test_other_upgrades_are_taken_away(extra: str) -> None:
    w = watch()
    assert w.feed(get())
    assert w.feed(get(extra=extra + "X: 1\r\n")) == get(extra="X: 1\r\n")
    assert w.feed(get()) == get()


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_garbage_is_refused_or_held_never_a_crash(pieces: list[bytes]) -> None:
    w = watch()
    try:
        for piece in pieces:
            assert w.feed(piece) == b""
    except RefusedError:
        pass
