"""First bytes: recognised in any pieces, never guessed from half of them, never a crash."""

from __future__ import annotations

import json
import os
import random
import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.gateway.sniff import MAX_BYTES, MinerWatch, Sniffed, Sniffer, split_authority


def client_hello(name: str | None = "a.example", alpn: list[str] | None = None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def sniff(data: bytes, piece: int | None = None) -> Sniffed:
    sniffer = Sniffer()
    size = piece or len(data) or 1
    for at in range(0, len(data), size):
        if (found := sniffer.feed(data[at : at + size])) is not None:
            return found
    return sniffer.finish()


def rpc(**message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


LOGIN = {"login": "4xyz", "pass": "x", "agent": "XMRig/6.21", "algo": ["rx/0"]}
MINERS = {
    "subscribe": rpc(id=1, method="mining.subscribe", params=[]),
    "authorize": rpc(id=2, method="mining.authorize", params=["w", "x"]),
    "configure": rpc(id=2, method="mining.configure", params=[["version-rolling"], {}]),
    "login": rpc(id=1, jsonrpc="2.0", method="login", params=LOGIN),
    "template": rpc(id=1, method="getblocktemplate", params=[{"rules": ["segwit"]}]),
    "eth": rpc(id=1, method="eth_submitLogin", params=["0xabc"]),
    "pretty": json.dumps({"id": 1, "method": "mining.subscribe", "params": []}, indent=4).encode() + b"\n",
    "batch": json.dumps([{"id": 0}, {"id": 1, "method": "mining.subscribe"}]).encode(),
    "newlines": b"\r\n\n  \t" + rpc(id=1, method="mining.subscribe"),
    "escaped": b'{"id":1,"method":"m\\u0069ning.subscribe","params":[]}\n',
    "escaped-login": b'{"method":"lo\\u0067in","params":{"lo\\u0067in":"a","pass":"x","ag\\u0065nt":"y"}}',
    "second": b'{"hello":"world"}\n' + rpc(id=1, method="mining.subscribe"),
    "nested": rpc(jsonrpc="2.0", batch=[{"method": "mining.subscribe"}]),
    "broken": b'{"id":1,"method":"mining.subscribe","params":[],}\n',
}
BENIGN_JSON = {
    "login": rpc(id=1, jsonrpc="2.0", method="login", params={"login": "me", "password": "x"}),
    "lsp": rpc(jsonrpc="2.0", id=0, method="initialize", params={"processId": 1}),
    "array": b"[1, 2, 3]\n",
    "mention": rpc(text="how does mining.subscribe work"),
}


@pytest.mark.parametrize("piece", [None, 1, 7, 1448])
@pytest.mark.parametrize("data", MINERS.values(), ids=MINERS)
def test_miners(data: bytes, piece: int | None) -> None:
    found = sniff(data, piece)
    if found.protocol != "stratum":
        # In pieces, a harmless first message may have been the answer: then the watch has the rest.
        watch = MinerWatch()
        assert any(watch.feed(data[at : at + (piece or 1)]) for at in range(0, len(data), piece or 1))
        assert data == MINERS["second"]


@pytest.mark.parametrize("data", BENIGN_JSON.values(), ids=BENIGN_JSON)
def test_json_that_is_no_miners(data: bytes) -> None:
    for piece in (None, 1):
        assert sniff(data, piece) == Sniffed("unknown")
    assert not MinerWatch().feed(data)


@pytest.mark.parametrize("piece", [None, 1, 3, 100])
@pytest.mark.parametrize(
    ("data", "protocol", "name"),
    [
        (client_hello("a.example"), "tls", "a.example"),
        (client_hello("A.Example"), "tls", "a.example"),
        (client_hello(None), "tls", None),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "ssh", None),
        (b"SSH-1.99-x\n", "ssh", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http2", None),
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "http", "a.example"),
        (b"\r\nPOST /x HTTP/1.0\r\nhOsT:A.example:8080\r\nA: b\r\n\r\nbody", "http", "a.example"),
        (b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "http", "a.example"),
        (b"BREW /pot HTTP/1.1\nHost: [2001:db8::1]:80\n\n", "http", "2001:db8::1"),
        (b"GET / HTTP/1.1\r\n\r\n", "http", None),
        (b"\x05\x01\x00", "socks", None),
        (b"\x05\x02\x00\x02", "socks", None),
        (b"\x04\x01\x00\x50\x01\x02\x03\x04user\x00", "socks", None),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "unknown", None),
        (b"EHLO me\r\n", "unknown", None),
        (b"*1\r\n$4\r\nPING\r\n", "unknown", None),
        (b"[INFO] started: all well\nnext\n", "unknown", None),
        (b"\x16\x04\x00\x01\x02rest", "unknown", None),
    ],
)
def test_protocols(data: bytes, protocol: str, name: str | None, piece: int | None) -> None:
    found = sniff(data, piece)
    assert (found.protocol, found.server_name, found.refused) == (protocol, name, "")


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", "http"),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "http"),
        (b"GET http://a.example@evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "http"),
        (b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", "http"),
        (b"GET / HTTP/1.1\r\nHost: a.example/x\r\n\r\n", "http"),
        (b"GET / HTTP/1.1\r\nHost: a.example\x00.evil\r\n\r\n", "http"),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "http"),
        (b"GET / HTTP/2.0\r\n\r\n", "http"),
        (b"GET /\r\n", "http"),
        (b" \tGET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "http"),
        (b"\nSSH-2.0-x\r\n", "ssh"),
        (b"GET / HTTP/1.1\r\nHost: a.exam", "http"),
        (b"SSH", "unknown"),
        (b"{" * 20_000, "unknown"),
        (b'{"a":' * 4000, "unknown"),
        (b'{"method": "mining.subscribe"', "stratum"),
        (client_hello()[:-1], "tls"),
        (b"GET /" + b"a" * MAX_BYTES, "http"),
    ],
)
def test_what_can_be_read_in_two_ways_or_is_unfinished_is_refused(data: bytes, protocol: str) -> None:
    for piece in (None, 1, 1448):
        found = sniff(data, piece)
        assert found.protocol == protocol
        assert found.refused


def records(hello: bytes, size: int) -> bytes:
    """The ClientHello spread over records of ``size`` bytes."""
    body = hello[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"\x16\x03\x01" + struct.pack("!H", len(piece)) + piece for piece in pieces)


def test_client_hello_over_many_records_and_segments() -> None:
    hello = client_hello("a.example", ["h2", "http/1.1"])
    for size in (1, 2, 5, 50, 300):
        for piece in (1, 6, None):
            found = sniff(records(hello, size), piece)
            assert (found.protocol, found.server_name, found.alpn) == ("tls", "a.example", ("h2", "http/1.1"))


def with_extension(kind: int, body: bytes, hello: bytes | None = None) -> bytes:
    """A ClientHello with one more extension at the end."""
    raw = hello or client_hello()
    message = bytearray(raw[9:])
    at = 34
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2], "big")
    at += 1 + message[at]
    extension = struct.pack("!HH", kind, len(body)) + body
    size = int.from_bytes(message[at : at + 2], "big") + len(extension)
    message[at : at + 2] = struct.pack("!H", size)
    message += extension
    framed = b"\x01" + len(message).to_bytes(3, "big") + message
    return b"\x16\x03\x01" + struct.pack("!H", len(framed)) + framed


def test_hidden_and_doubled_server_names() -> None:
    assert sniff(with_extension(0xFE0D, b"\x00" * 40)).name_hidden
    assert sniff(with_extension(0xFFCE, b"\x00" * 40)).name_hidden
    assert not sniff(client_hello()).name_hidden
    name = b"evil.example"
    one = b"\x00" + struct.pack("!H", len(name)) + name
    assert sniff(with_extension(0, struct.pack("!H", len(one)) + one)).refused
    for names in (one + one, b"\x01" + one[1:], one[:-1], b"\x00\x00\x00"):
        assert sniff(with_extension(0, struct.pack("!H", len(names)) + names, client_hello(None))).refused
    nul = b"\x00" + struct.pack("!H", 6) + b"a\x00.com"
    assert sniff(with_extension(0, struct.pack("!H", len(nul)) + nul, client_hello(None))).refused


@given(st.binary(max_size=400), st.integers(1, 50))
def test_pieces_never_change_a_refusal_into_a_pass(data: bytes, piece: int) -> None:
    whole, dripped = sniff(data), sniff(data, piece)
    # More bytes at once may show more (a second message); what is refused or named must be so in pieces too.
    if whole.protocol in {"tls", "ssh", "http"}:
        assert dripped.protocol == whole.protocol
        assert dripped.server_name == whole.server_name


def test_mutations_never_raise_and_never_need_unbounded_data() -> None:
    rng = random.Random(7)
    seeds = [
        *MINERS.values(),
        client_hello(),
        records(client_hello(), 20),
        b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ]
    for _ in range(6000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(8)):
            kind = rng.randrange(3)
            at = rng.randrange(len(data) + 1)
            if kind == 0 and data:
                data[at - 1] = rng.randrange(256)
            elif kind == 1:
                data[at:at] = os.urandom(rng.randrange(4))
            else:
                del data[at : at + rng.randrange(4)]
        sniff(bytes(data), rng.choice([None, 1, 13]))
    for start in (b"\x16\x03\x01\x40\x00\x01\x00\x3f\x00", b"{", b"[", b"GET ", b"SSH", b" ", b"\x04\x01", b"\x05\xff"):
        sniffer = Sniffer()
        fed = 0
        while sniffer.feed(start if not fed else b" " * 512) is None:
            fed += 512
            assert fed <= MAX_BYTES + 1024, start


@pytest.mark.parametrize(
    ("raw", "host"),
    [
        (b"a.example", "a.example"),
        (b" A.example:80 ", "a.example"),
        (b"[::1]:80", "::1"),
        (b"10.0.0.1", "10.0.0.1"),
        (b"user@a.example", None),
        (b"a.example:80:80", None),
        (b"a.example, b.example", None),
        (b"\xff.example", None),
        (b"", None),
    ],
)
def test_split_authority(raw: bytes, host: str | None) -> None:
    assert split_authority(raw) == host
