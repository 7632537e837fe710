"""ClientHello facts: the published examples of JA4, real clients, and whatever bytes a guest may send."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vallum.gateway.sniff import Sniffer
from vallum.gateway.tls import clienthello
from vallum.gateway.tls.clienthello import ClientHello, HelloReader, MalformedError, NotTlsError
from vallum.gateway.tls.ja4 import fingerprint, is_grease


def real_hello(name: str | None = "a.example", alpn: tuple[str, ...] = ("h2", "http/1.1")) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split(","))


CIPHERS = "1301,1302,1303,c02b,c02f,c02c,c030,cca9,cca8,c013,c014,009c,009d,002f,0035"
EXTENSIONS = "001b,0000,0033,0010,4469,0017,002d,000d,0005,0023,0012,002b,ff01,000b,000a,0015"
SIGNATURES = "0403,0804,0401,0503,0805,0501,0806,0601"


def hello(**changes: object) -> ClientHello:
    fields: dict = {
        "server_name": "a.example",
        "alpn": ("h2",),
        "encrypted": False,
        "versions": numbers("0304,0303"),
        "ciphers": numbers(CIPHERS),
        "extensions": numbers(EXTENSIONS),
        "signatures": numbers(SIGNATURES),
        "first_alpn": b"h2",
    }
    return ClientHello(**{**fields, **changes})


def test_ja4_of_the_published_example() -> None:
    assert fingerprint(hello()) == "t13d1516h2_8daaf6152771_e5627efa2ab1"


def test_ja4_does_not_see_order_or_grease() -> None:
    shuffled = hello(
        ciphers=(0x4A4A, *reversed(numbers(CIPHERS))),
        extensions=(0xDADA, *reversed(numbers(EXTENSIONS)), 0x0A0A),
        versions=(0xFAFA, *numbers("0303,0304")),
    )
    assert fingerprint(shuffled) == fingerprint(hello())
    assert fingerprint(hello(signatures=numbers(SIGNATURES)[::-1])) != fingerprint(hello())


def test_ja4_without_signature_algorithms_as_published() -> None:
    assert fingerprint(hello(signatures=())).endswith("_6d807ffa2a79")


def test_ja4_of_nothing() -> None:
    bare = hello(ciphers=(0x0A0A,), extensions=(), signatures=(), versions=(), first_alpn=b"", version=0x0301)
    assert fingerprint(bare) == "t10i000000_000000000000_000000000000"


@pytest.mark.parametrize(
    ("protocol", "ends"),
    [
        (b"http/1.1", "h1"), (b"h", "hh"), (b"", "00"), (b"\xab", "ab"), (b"\xab\xcd", "ad"), (b"0\xab", "3b"),
        (b"01\xab\xcd", "3d"), (b"0\xab\xcd1", "01"),
    ],
)  # fmt: skip
def test_ja4_of_protocols_as_published(protocol: bytes, ends: str) -> None:
    assert fingerprint(hello(first_alpn=protocol)).split("_")[0][-2:] == ends


def test_grease_is_the_sixteen_numbers_of_rfc_8701() -> None:
    assert [n for n in range(65536) if is_grease(n)] == [0x0A0A + 0x1010 * i for i in range(16)]


@pytest.mark.parametrize("piece", [1, 5, 100000])
def test_a_real_client(piece: int) -> None:
    data = real_hello()
    sniffer = Sniffer()
    found = None
    for at in range(0, len(data), piece):
        found = sniffer.feed(data[at : at + piece])
    assert found is not None
    assert (found.protocol, found.server_name, found.alpn, found.refused) == (
        *("tls", "a.example", ("h2", "http/1.1"), ""),
    )
    ours = clienthello.parse(data)
    assert ours is not None
    assert 0x0304 in ours.versions
    assert found.ja4.startswith(f"t13d{len(ours.ciphers):02}{len(ours.extensions):02}h2_")
    # The same client without name and protocols: two extensions fewer, the same third part.
    other = Sniffer().feed(real_hello(None, ()))
    assert other is not None
    assert other.ja4.startswith(f"t13i{len(ours.ciphers):02}{len(ours.extensions) - 2:02}00_")
    assert other.ja4.split("_")[1:] == found.ja4.split("_")[1:]


def outcome(data: bytes, cuts: list[int]) -> object:
    reader = HelloReader()
    try:
        for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
            found = reader.read(data[:end])
            if found is not None:
                return found
    except (NotTlsError, MalformedError) as error:
        return type(error)
    return None


REAL = real_hello()


@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=8))
@example(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", [])
def test_any_bytes_end_in_an_answer_or_one_of_two_errors(data: bytes, cuts: list[int]) -> None:
    whole = outcome(data, [])
    if isinstance(whole, ClientHello):
        fingerprint(whole)
    assert outcome(data, cuts) == whole


@given(
    st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.integers(0, len(REAL)), max_size=8),
)
def test_a_real_hello_with_other_bytes_in_it(changes: list[tuple[int, int]], cuts: list[int]) -> None:
    data = bytearray(REAL)
    for at, value in changes:
        data[at] = value
    found = outcome(bytes(data), [])
    if isinstance(found, ClientHello):
        assert len(fingerprint(found).split("_")) == 3
    assert outcome(bytes(data), cuts) == found


def test_the_work_grows_with_the_bytes_only() -> None:
    # One hello in records of one byte each, fed byte by byte: sixteen thousand looks.
    message = REAL[5:]
    data = b"".join(b"\x16\x03\x01\x00\x01" + bytes([byte]) for byte in message)
    reader = HelloReader()
    found = [reader.read(data[:end]) for end in range(1, len(data) + 1)]
    assert found[-1] == clienthello.parse(REAL)
    assert set(found[:-1]) == {None}
