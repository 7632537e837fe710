"""A TLS ClientHello, read strictly: anything a server might read differently than we do is malformed.

Source: RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3, RFC 7301 section 3.1, RFC 9849 (ECH).
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_RECORD = 16384
MAX_HELLO = 16384
_SNI, _ALPN, _ESNI, _ECH = 0, 16, 0xFFCE, 0xFE0D


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
    if hello.number(2) >> 8 != 3:
        raise MalformedError("its version is not TLS")
    hello.take(32)
    if len(hello.vector(1).data) > 32:
        raise MalformedError("its session id is too long")
    ciphers = hello.vector(2).data
    if len(ciphers) < 2 or len(ciphers) % 2:
        raise MalformedError("its cipher suites are not a list")
    if not hello.vector(1).data:
        raise MalformedError("it has no compression method")
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    seen: set[int] = set()
    if hello.has_more():
        extensions = hello.vector(2)
        if hello.has_more():
            raise MalformedError("bytes follow its extensions")
        while extensions.has_more():
            kind = extensions.number(2)
            body = extensions.vector(2)
            if kind in seen:
                raise MalformedError("an extension comes twice")
            seen.add(kind)
            if kind == _SNI:
                server_name = _read_names(body)
            elif kind == _ALPN:
                alpn = _read_alpn(body)
    return ClientHello(server_name, alpn, bool(seen & {_ECH, _ESNI}))


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


def _read_alpn(body: _Reader) -> tuple[str, ...]:
    protocols = body.vector(2)
    found = []
    while protocols.has_more():
        found.append(protocols.vector(1).data.decode("ascii", "backslashreplace"))
    if body.has_more() or not found:
        raise MalformedError("its ALPN is not a list")
    return tuple(found[:32])
