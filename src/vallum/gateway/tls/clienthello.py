"""A TLS ClientHello, read strictly: anything a server might read differently than we do is malformed.

Covered: SNI, ALPN, ECH and ESNI, versions, cipher suites, extensions and signature algorithms as offered.
Not covered: what is inside an encrypted ClientHello; a second ClientHello after a HelloRetryRequest.

Source: RFC 8446 sections 4.1.2, 4.2.1, 4.2.3 and 5.1, RFC 6066 section 3, RFC 7301 section 3.1, RFC 9849 (ECH).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_RECORD = 16384
MAX_HELLO = 16384
_SNI, _SIGNATURES, _ALPN, _VERSIONS, _ESNI, _ECH = 0, 13, 16, 43, 0xFFCE, 0xFE0D


class NotTlsError(Exception):
    """These bytes are no TLS record."""


class MalformedError(Exception):
    """It is TLS, but not a ClientHello that can be read in only one way."""


@dataclass(frozen=True)
class ClientHello:
    """What the client says in clear."""

    server_name: str | None
    alpn: tuple[str, ...]
    encrypted: bool
    """ECH or ESNI is present (a browser's GREASE cannot be told from the real one)."""
    version: int = 0x0303
    """The legacy version field."""
    versions: tuple[int, ...] = ()
    """Of ``supported_versions``, in the order sent, with GREASE, as the lists below."""
    ciphers: tuple[int, ...] = ()
    extensions: tuple[int, ...] = ()
    """Their types."""
    signatures: tuple[int, ...] = ()
    """Signature schemes."""
    first_alpn: bytes = b""
    """The first protocol of :attr:`alpn`, as sent."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise MalformedError("a length runs past the end")
        self.at += count
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Reader:
        return _Reader(self.take(self.number(size)))

    def has_more(self) -> bool:
        return self.at < len(self.data)


class HelloReader:
    """Reads one ClientHello as its bytes come. What was read is not read again: however small the pieces and the
    records are, the work grows with the bytes only (a guest may drip a thousand flows byte by byte)."""

    def __init__(self) -> None:
        self._at = 0
        self._message = b""

    def read(self, data: bytes | bytearray) -> ClientHello | None:
        """The ClientHello at the start of ``data``, which is all that has come so far; None while bytes are missing.
        What follows its last record is not read.

        Raises:
            NotTlsError: not a TLS record.
            MalformedError: records that are not one whole, plain ClientHello.
        """
        while True:
            at = self._at
            header = bytes(data[at : at + 5])
            _check_header(header, first=at == 0)
            if len(header) < 5:
                return None
            end = at + 5 + int.from_bytes(header[3:5], "big")
            message = self._message + data[at + 5 : end]
            wanted = _wanted(message)
            if wanted is not None and len(message) > wanted:
                raise MalformedError("bytes follow it in its record")
            if end > len(data):
                return None
            if len(message) == wanted:
                return _read_hello(_Reader(message[4:]))
            self._at, self._message = end, message


def parse(data: bytes) -> ClientHello | None:
    """As :meth:`HelloReader.read`, of bytes that are all there."""
    return HelloReader().read(data)


def _check_header(header: bytes, *, first: bool) -> None:
    if first and (header[:1] not in {b"", b"\x16"} or header[1:2] not in {b"", b"\x03"}):
        raise NotTlsError
    if header[:1] not in {b"", b"\x16"}:
        raise MalformedError("another record comes inside it")
    if header[1:2] not in {b"", b"\x03"} or header[2:3] > b"\x04":
        raise MalformedError("a record has another version")
    if len(header) == 5 and not 1 <= int.from_bytes(header[3:5], "big") <= MAX_RECORD:
        raise MalformedError("a record has a length that is not allowed")


def _wanted(message: bytes) -> int | None:
    """Length of the whole handshake message, once it is known."""
    if message and message[0] != 1:
        raise MalformedError("the first handshake message is not a ClientHello")
    if len(message) < 4:
        return None
    wanted = 4 + int.from_bytes(message[1:4], "big")
    if wanted > MAX_HELLO:
        raise MalformedError("it is larger than 16 KiB")
    return wanted


def _read_hello(hello: _Reader) -> ClientHello:
    version = hello.number(2)
    if version >> 8 != 3:
        raise MalformedError("its version is not TLS")
    hello.take(32)
    if len(hello.vector(1).data) > 32:
        raise MalformedError("its session id is too long")
    ciphers = _read_numbers(hello.vector(2), "its cipher suites are not a list")
    if not hello.vector(1).data:
        raise MalformedError("it has no compression method")
    bodies = _read_extensions(hello)
    server_name = _read_names(bodies[_SNI]) if _SNI in bodies else None
    protocols = _read_alpn(bodies[_ALPN]) if _ALPN in bodies else []
    versions: tuple[int, ...] = ()
    if _VERSIONS in bodies:
        versions = _read_numbers(_only(bodies[_VERSIONS], 1), "its versions are not a list")
    signatures: tuple[int, ...] = ()
    if _SIGNATURES in bodies:
        signatures = _read_numbers(_only(bodies[_SIGNATURES], 2), "its signature schemes are not a list")
    return ClientHello(
        server_name,
        tuple(protocol.decode("ascii", "backslashreplace") for protocol in protocols[:32]),
        bool(bodies.keys() & {_ECH, _ESNI}),
        version=version,
        versions=versions,
        ciphers=ciphers,
        extensions=tuple(bodies),
        signatures=signatures,
        first_alpn=protocols[0] if protocols else b"",
    )


def _read_extensions(hello: _Reader) -> dict[int, _Reader]:
    bodies: dict[int, _Reader] = {}
    if not hello.has_more():
        return bodies
    extensions = hello.vector(2)
    if hello.has_more():
        raise MalformedError("bytes follow its extensions")
    while extensions.has_more():
        kind = extensions.number(2)
        if kind in bodies:
            raise MalformedError("an extension comes twice")
        bodies[kind] = extensions.vector(2)
    return bodies


def _only(body: _Reader, size: int) -> _Reader:
    """The one vector that an extension consists of."""
    inner = body.vector(size)
    if body.has_more():
        raise MalformedError("bytes follow a list in an extension")
    return inner


def _read_numbers(body: _Reader, otherwise: str) -> tuple[int, ...]:
    data = body.data
    if len(data) < 2 or len(data) % 2:
        raise MalformedError(otherwise)
    return struct.unpack(f"!{len(data) // 2}H", data)


def _read_names(body: _Reader) -> str:
    names = body.vector(2)
    if body.has_more() or names.number(1) != 0:
        raise MalformedError("its server name is not a host name")
    name = names.vector(2).data
    if names.has_more():
        raise MalformedError("it has more than one server name")
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedError("its server name is not ASCII") from None
    if not text or not text.isprintable() or " " in text:
        raise MalformedError("its server name is not a host name")
    return text


def _read_alpn(body: _Reader) -> list[bytes]:
    protocols = body.vector(2)
    found = []
    while protocols.has_more():
        found.append(protocols.vector(1).data)
    if body.has_more() or not found:
        raise MalformedError("its ALPN is not a list")
    return found
