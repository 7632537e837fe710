"""What the gateway's HTTP part looks for and takes out: canaries, frames, secrets, refusals. Pure."""

from __future__ import annotations

import base64
import gzip
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.core.verdict import Decision
from vallum.gateway.http.canaries import BodyScanner, CanaryGuard, CanaryScanner, FoundError, forms_of, scan_head
from vallum.gateway.http.exchange import RequestHead
from vallum.gateway.http.git import find_service, packet, write_error
from vallum.gateway.http.redaction import Masker, redact_target
from vallum.gateway.http.refusal import render
from vallum.gateway.http.websocket import FrameError, FrameFilter, accept_of, apply_mask, check_key
from vallum.gateway.http1 import RefusedError
from vallum.gateway.kit import Canary
from vallum.gateway.relay import OpenGuard

VALUE = b"sk-canary-0123456789abcdef"
CANARY = Canary(name="planted", value=VALUE)
WRITINGS = {
    "plain": lambda raw: raw,
    "base64": base64.b64encode,
    "base64 for URLs": base64.urlsafe_b64encode,
    "base64 in lines": base64.encodebytes,
    "hexadecimal": lambda raw: raw.hex().encode(),
    "HEXADECIMAL": lambda raw: raw.hex().upper().encode(),
    "percent": lambda raw: "".join(f"%{byte:02x}" for byte in raw).encode(),
    "every second byte in percent": lambda raw: b"".join(
        bytes([byte]) if n % 2 else b"%%%02X" % byte for n, byte in enumerate(raw)
    ),
    "UTF-16": lambda raw: raw.decode("latin-1").encode("utf-16-le"),
    "gzip": gzip.compress,
    "two members of gzip": lambda raw: gzip.compress(b"first") + gzip.compress(raw),
    "zlib": zlib.compress,
}


def feed_all(scanner, data: bytes, step: int) -> bytes:
    out = b"".join(scanner.feed(data[at : at + step]) for at in range(0, len(data), step))
    return out + scanner.finish()


@pytest.mark.parametrize("step", [1, 3, 64, 10_000])
@pytest.mark.parametrize("writing", WRITINGS)
def test_a_canary_is_found_and_what_is_not_one_passes_unchanged(writing: str, step: int) -> None:
    for before in range(4):
        data = WRITINGS[writing](b"B" * before + VALUE + b" tail")
        with pytest.raises(FoundError) as found:
            feed_all(BodyScanner([CANARY]), data, step)
        assert found.value.decision.rule == "canary"
        assert "planted" in found.value.decision.reason and VALUE.decode() not in found.value.decision.reason
        harmless = WRITINGS[writing](b"B" * before + VALUE[:-1] + b"! tail")
        assert feed_all(BodyScanner([CANARY]), harmless, step) == harmless


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(0, len(VALUE)))
@settings(deadline=None)
def test_not_more_than_a_few_bytes_of_a_canary_leave_before_it_is_found(pieces: list[bytes], cut: int) -> None:
    scanner, out = CanaryScanner([CANARY]), b""
    try:
        for piece in [*pieces, VALUE[:cut], VALUE[cut:], b"end"]:
            out += scanner.feed(piece)
    except FoundError:
        pass
    else:
        pytest.fail("it was not found")
    assert VALUE[:5] not in out[len(b"".join(pieces)) - 4 if pieces else 0 :] or VALUE[:5] in b"".join(pieces)


@given(st.lists(st.binary(max_size=200), max_size=10))
@settings(deadline=None)
def test_nothing_is_lost_or_changed(pieces: list[bytes]) -> None:
    for scanner in (BodyScanner([CANARY]), BodyScanner(())):
        assert b"".join(map(scanner.feed, pieces)) + scanner.finish() == b"".join(pieces)


def test_a_bomb_is_refused() -> None:
    with pytest.raises(FoundError, match="inflates"):
        feed_all(BodyScanner([CANARY]), zlib.compress(bytes(100_000_000), 9), 65536)


def test_heads_and_relayed_flows() -> None:
    scan_head([CANARY], [b"/a?b=c", b"x: y"])
    with pytest.raises(FoundError):
        scan_head([CANARY], [b"/a?b=" + VALUE])
    guard = CanaryGuard(OpenGuard(), [CANARY])
    assert guard.feed(b"hello") == b"hello"
    assert guard.feed(b"x" + VALUE[:12]) == b"x"
    with pytest.raises(RefusedError):
        guard.feed(VALUE[12:])


def test_masking_keeps_the_length_over_pieces() -> None:
    for writing in (VALUE, base64.b64encode(b"xx" + VALUE)[4:30], VALUE.hex().encode()):
        for step in (1, 5, 100):
            data = b"head " + writing + b" tail"
            masked = feed_all(Masker([VALUE]), data, step)
            assert len(masked) == len(data)
            assert masked.startswith(b"head ") and masked.endswith(b" tail")
            assert not any(form in masked for form in forms_of(VALUE))


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/a/b?c=d", "/a/b?c=d"),
        ("/a?token=x&b=1", "/a?token=REDACTED&b=1"),
        ("/a?X-Amz-Signature=x;api_key=y", "/a?X-Amz-Signature=REDACTED;api_key=REDACTED"),
        (f"/{VALUE.decode()}/x", "/REDACTED/x"),
        ("/a\x1b[2J", "/a\\x1b[2J"),
    ],
)
def test_targets_are_recorded_without_secrets(target: str, shown: str) -> None:
    assert redact_target(target, [VALUE]) == shown
    assert len(redact_target("/" + "a" * 9000, [VALUE])) <= 2000


# -- WebSocket -------------------------------------------------------------------------------------------


def frame(payload: bytes, *, opcode: int = 1, final: bool = True, masked: bool = True, mask: bytes = b"abcd") -> bytes:
    first, bit = (0x80 if final else 0) | opcode, 0x80 if masked else 0
    if len(payload) < 126:
        head = bytes((first, bit | len(payload)))
    elif len(payload) < 65536:
        head = bytes((first, bit | 126)) + struct.pack("!H", len(payload))
    else:
        head = bytes((first, bit | 127)) + struct.pack("!Q", len(payload))
    return head + (mask + apply_mask(payload, mask) if masked else payload)


def read_frames(data: bytes) -> list[tuple[int, bool, bytes]]:
    found = []
    while data:
        length, at = data[1] & 0x7F, 2
        if length > 125:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
        mask = data[at : at + 4] if data[1] & 0x80 else b""
        at += len(mask)
        found.append((data[0] & 15, bool(data[0] & 0x80), apply_mask(data[at : at + length], mask)))
        data = data[at + length :]
    return found


@given(
    st.lists(st.tuples(st.binary(max_size=70_000), st.sampled_from([1, 2, 9, 10])), max_size=4),
    st.integers(1, 5000),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_messages_pass_whatever_their_pieces(sent: list[tuple[bytes, int]], step: int, is_masked: bool) -> None:
    sent = [(payload[:125] if opcode > 8 else payload, opcode) for payload, opcode in sent]
    data = b"".join(frame(payload, opcode=opcode, masked=is_masked) for payload, opcode in sent)
    frames = FrameFilter((), masked=is_masked)
    out = b"".join(frames.feed(data[at : at + step]) for at in range(0, len(data), step))
    messages, part = [], (0, b"")
    for opcode, final, payload in read_frames(out):
        if opcode > 8:
            messages.append((payload, opcode))
            continue
        part = (opcode or part[0], part[1] + payload)
        if final:
            messages.append((part[1], part[0]))
            part = (0, b"")
    assert sorted(messages) == sorted(sent)
    assert frames.messages == sum(opcode < 8 for _, opcode in sent)


@given(st.binary(max_size=200), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_noise_is_frames_or_an_error(noise: bytes, step: int) -> None:
    frames = FrameFilter([CANARY], masked=True)
    try:
        for at in range(0, len(noise), step):
            read_frames(frames.feed(noise[at : at + step]))
    except FrameError:
        pass


def test_nothing_follows_a_close() -> None:
    frames = FrameFilter((), masked=True)
    assert len(read_frames(frames.feed(frame(b"\x03\xe8", opcode=8)))) == 1
    with pytest.raises(FrameError):
        frames.feed(frame(b"more"))


def test_a_canary_over_frames_of_one_byte() -> None:
    frames, out = FrameFilter([CANARY], masked=True), b""
    with pytest.raises(FoundError):
        for n, byte in enumerate(VALUE):
            out += frames.feed(frame(bytes([byte]), opcode=0 if n else 2, final=False))
    assert b"".join(payload for _, _, payload in read_frames(out)) in VALUE[:4]


def test_the_handshake() -> None:
    key = b"dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455
    assert accept_of(key) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    headers = ((b"sec-websocket-key", key), (b"sec-websocket-version", b"13"))
    assert check_key(head("GET", "/", *headers)) == key
    assert check_key(head("GET", "/", (b"sec-websocket-key", b"short"), headers[1])) is None


# -- git and refusals ------------------------------------------------------------------------------------


def head(method: str, target: str, *headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(
        method=method, scheme="https", host="a.test", port=443, target=target, headers=headers, version="1.1"
    )


def test_git_services_and_errors() -> None:
    assert find_service(head("GET", "/a.git/info/refs?service=git-receive-pack")) == "git-receive-pack"
    assert find_service(head("POST", "/a.git/git-upload-pack")) == "git-upload-pack"
    assert find_service(head("GET", "/a.git/info/refs?service=git-upload-pack&service=git-receive-pack")) == ""
    assert find_service(head("GET", "/a.git/HEAD")) == ""
    assert packet(b"hi") == b"0006hi"
    with pytest.raises(ValueError):
        packet(b"x" * 70_000)
    assert write_error("no", "git-receive-pack", is_advertisement=False) == b"000aERR no"


def test_refusals_are_phrased_for_who_asked() -> None:
    decision = Decision(verdict="deny", rule="default-deny", reason="no rule \x1b[31m grants it")
    status, headers, body = render(head("GET", "/"), decision, 403)
    assert (status, dict(headers)[b"x-vallum-rule"]) == (403, b"default-deny")
    assert body == b"vallum: blocked by rule default-deny: no rule \\x1b[31m grants it\n"
    status, headers, body = render(head("POST", "/", (b"accept", b"application/json")), decision, 403)
    assert dict(headers)[b"content-type"] == b"application/json" and b'"rule":"default-deny"' in body
    status, _, body = render(head("GET", "/x.git/info/refs?service=git-upload-pack"), decision, 403)
    assert status == 200 and b"ERR vallum: blocked" in body
