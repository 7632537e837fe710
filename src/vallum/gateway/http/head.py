"""Heads of HTTP/1.1 requests, read in the one way that cannot be misunderstood. Pure.

Stricter than the library that parses them: whatever two servers might read differently is refused, not mended
(RFC 9112, sections 2.2, 3, 5, 6.1 and 11.2).

Covered: bare CR or LF, control bytes, folded lines, Content-Length more than once or beside Transfer-Encoding, other
codings than chunked, more than one Host, a target that names another host than Host, unusual methods and targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import h11
import msgspec

from vallum.gateway.http.exchange import MAX_HEADERS, Headers, RequestHead
from vallum.gateway.sniff import split_authority

_LINE_ENDS = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([^\r]*?)[ \t]*\r", re.IGNORECASE)
_FOLDED = re.compile(rb"\n[ \t]")
_METHOD = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]+)([/?].*)?", re.IGNORECASE)
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")  # no fragment
_NAME = re.compile(rb":?[!#$%&'*+.^_`|~0-9a-z-]+")
_PORT = re.compile(rb":(\d{1,5})$")
_DIGITS = re.compile(rb"\d{1,18}")

HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings"),
    }
)
"""Headers that belong to one connection (RFC 9110, section 7.6.1)."""
_OURS = frozenset({b"host", b"content-length", b"expect"})


class MalformedError(Exception):
    """Not a message that can be read in only one way. Says why."""


class MisdirectedError(Exception):
    """The request names another host, or another port, than the connection was made to."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the requests of a connection go."""

    scheme: str
    port: int


def find_end(data: bytearray, start: int = 0) -> int:
    """Index after a head that begins at 0, or -1 while it is not complete. ``start``: up to here it was searched before.

    Raises:
        MalformedError: it can be told already that it will never be one.
    """
    at = max(0, start - 3)
    end = data.find(b"\r\n\r\n", at)
    # A CR at the very end may still become a line end.
    until = end + 4 if end >= 0 else len(data) - data.endswith(b"\r")
    if _LINE_ENDS.search(data, at, until):
        raise MalformedError("a line does not end with CR LF")
    return -1 if end < 0 else end + 4


def check_head(head: bytes) -> None:
    """Check the bytes of a whole head.

    Raises:
        MalformedError: they hold what could be read in more than one way.
    """
    if _LINE_ENDS.search(head):
        raise MalformedError("a line does not end with CR LF")
    if _CONTROLS.search(head):
        raise MalformedError("there are control characters in the head")
    if _FOLDED.search(head):
        raise MalformedError("a header is folded over several lines")
    lengths = _LENGTH.findall(head)
    if len(lengths) > 1 or any(_DIGITS.fullmatch(length) is None for length in lengths):
        # The parser takes a list of equal ones; a server behind may take one of them.
        raise MalformedError("Content-Length has to be one number, once")
    if head.count(b"\n") > MAX_HEADERS + 2:
        raise MalformedError(f"there are more than {MAX_HEADERS} headers")


def is_chunked(message: h11.Request | h11.Response | h11.InformationalResponse) -> bool:
    """Whether the message's body is chunked."""
    return any(name == b"transfer-encoding" for name, _ in message.headers)


def read_request(request: h11.Request, place: Place) -> RequestHead:
    """What a parsed head asks for. Its target comes out in origin form, ``CONNECT`` in authority form.

    Raises:
        MalformedError: it can be read in more than one way.
        MisdirectedError: it is for somewhere else than the connection.
    """
    headers = [(bytes(name), bytes(value)) for name, value in request.headers]
    names = [name for name, _ in headers]
    method, target = bytes(request.method), bytes(request.target)
    if request.http_version not in {b"1.0", b"1.1"}:
        raise MalformedError("the version is neither HTTP/1.0 nor HTTP/1.1")
    if _METHOD.fullmatch(method) is None:
        raise MalformedError("the method is not written in capital letters")
    length = read_length(headers)
    if b"transfer-encoding" in names and (length is not None or request.http_version == b"1.0"):
        raise MalformedError("Transfer-Encoding beside Content-Length or in HTTP/1.0 can be read in two ways")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1:
        raise MalformedError("there has to be one Host header")
    if method == b"CONNECT":
        host, port = read_authority(target, 0)
        origin = target
    else:
        host, port = read_authority(hosts[0], place.port)
        origin = read_target(target, method, host, place)
    if port != place.port and method != b"CONNECT":
        raise MisdirectedError(f"Host names port {port}, but this is a connection to port {place.port}")
    upgrades = [value.strip().lower() for name, value in headers if name == b"upgrade"]
    return RequestHead(
        method=method.decode("ascii"),
        scheme="https" if place.scheme == "https" else "http",
        host=host,
        port=port,
        target=origin.decode("ascii"),
        headers=end_to_end(headers),
        version="1.0" if request.http_version == b"1.0" else "1.1",
        length=length,
        streamed=b"transfer-encoding" in names,
        upgrade="websocket" if upgrades == [b"websocket"] and method == b"GET" else "",
    )


def read_request2(fields: Iterable[tuple[bytes, bytes]], place: Place, *, has_body: bool) -> RequestHead:
    """As :func:`read_request`, of the fields of an HTTP/2 request (RFC 9113, section 8.3).

    Raises:
        MalformedError: they can be read in more than one way.
        MisdirectedError: it is for somewhere else than the connection.
    """
    kept = [(bytes(name), bytes(value)) for name, value in fields]
    pseudo = {name: value for name, value in kept if name.startswith(b":")}
    headers = [(name, value) for name, value in kept if not name.startswith(b":")]
    if len(pseudo) + len(headers) != len(kept) or len(kept) > MAX_HEADERS:
        raise MalformedError(f"there are pseudo-headers twice, or more than {MAX_HEADERS} headers")
    for name, value in kept:
        if _CONTROLS.search(value) or b"\n" in value or b"\r" in value or _NAME.fullmatch(name) is None:
            raise MalformedError("there are characters in a header that no header may have")
    method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if method == b"CONNECT":
        raise MalformedError("CONNECT asks the server to open another way out")
    if _METHOD.fullmatch(method) is None:
        raise MalformedError("the method is not written in capital letters")
    if pseudo.get(b":scheme") != place.scheme.encode():
        raise MisdirectedError(f"the request is for another scheme than {place.scheme}")
    authorities = {value for name, value in kept if name in {b":authority", b"host"}}
    if len(authorities) != 1:
        raise MalformedError("there has to be one :authority, and no other Host")
    host, port = read_authority(authorities.pop(), place.port)
    if port != place.port:
        raise MisdirectedError(f"the request names port {port}, but this is a connection to port {place.port}")
    if not (target == b"*" and method == b"OPTIONS") and _TARGET.fullmatch(target) is None:
        raise MalformedError("the request target is not a path")
    length = read_length(headers)
    if length is None and not has_body:
        length = 0 if method in {b"POST", b"PUT", b"PATCH"} else None
    crumbs = [value for name, value in headers if name == b"cookie"]
    if len(crumbs) > 1:  # RFC 9113, section 8.2.3
        headers = [pair for pair in headers if pair[0] != b"cookie"] + [(b"cookie", b"; ".join(crumbs))]
    return RequestHead(
        method=method.decode("ascii"),
        scheme="https" if place.scheme == "https" else "http",
        host=host,
        port=port,
        target=target.decode("ascii"),
        headers=end_to_end(headers),
        version="2",
        length=length,
        streamed=has_body and length is None,
    )


def read_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The Content-Length, None when there is none.

    Raises:
        MalformedError: there are several, or it is no number.
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    if not lengths:
        return None
    if len(lengths) > 1 or _DIGITS.fullmatch(lengths[0]) is None:
        raise MalformedError("Content-Length has to be one number, once")
    return int(lengths[0])


def read_authority(raw: bytes, default_port: int) -> tuple[str, int]:
    """Host and port of an authority.

    Raises:
        MalformedError: it is none.
    """
    host = split_authority(raw)
    if host is None:
        raise MalformedError("the host that is asked for is not a host name or an address")
    port = _PORT.search(raw.strip())
    number = int(port[1]) if port is not None else default_port
    if not 1 <= number <= 65535:
        raise MalformedError("the port that is asked for is none")
    return host, number


def read_target(target: bytes, method: bytes, host: str, place: Place) -> bytes:
    """A target in origin form (RFC 9112, section 3.2); an absolute one loses its authority, which has to be Host's.

    Raises:
        MalformedError: it is none.
        MisdirectedError: it names another host.
    """
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        named, port = read_authority(absolute[2], 443 if absolute[1].lower() == b"https" else 80)
        if named != host or absolute[1].lower() != place.scheme.encode() or port != place.port:
            raise MisdirectedError("the request target names another host, which would make the server a proxy")
        target = absolute[3] or b"/"
        if target.startswith(b"?"):
            target = b"/" + target
    if _TARGET.fullmatch(target) is None:
        raise MalformedError("the request target is neither a path nor a URL of this host")
    return target


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers without those of the connection, those that Connection names, and those that are written anew."""
    kept = tuple(headers)
    named = {
        option.strip().lower() for name, value in kept if name == b"connection" for option in value.split(b",")
    } - _OURS
    return tuple((name, value) for name, value in kept if name not in HOP_BY_HOP | _OURS | named)
