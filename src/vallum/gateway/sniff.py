"""What the first bytes of a flow are, whatever its port says. Sans-I/O, incremental, bounded.

Feed it the guest's bytes as they come; it answers None while they could still become something that has to be
recognised, and never lets an unfinished beginning pass for ``unknown``: what stays unfinished is refused, so
sending slowly gains nothing.

Covered: SSH banner; TLS ClientHello (SNI, ALPN, ECH and ESNI noticed) over any number of records and segments;
HTTP/1 head (Host, absolute form, CONNECT), HTTP/2 preface; miner JSON-RPC (stratum, XMRig login, getblocktemplate),
also batched, escaped or pretty-printed; SOCKS 4 and 5. :class:`MinerWatch` goes on looking in what was unknown.
Not covered: protocols inside an ``unknown`` or encrypted flow; a second ClientHello after a HelloRetryRequest.

Source: RFC 4253 section 4.2, RFC 8446 section 4.1.2, RFC 6066 section 3, RFC 9112, RFC 1928; the stratum documents of
its miners.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vallum.core.events import Protocol
from vallum.gateway import minerpc
from vallum.gateway.tls import clienthello
from vallum.gateway.tls.ja4 import fingerprint
from vallum.rules.names import normalise_name

MAX_BYTES = 16 * 1024
"""Bytes looked at before the beginning is called unfinished."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""How a client begins HTTP/2 without TLS (RFC 9113 section 3.4)."""
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_MAX_METHOD = 32
_MAX_EAGER = 32
_METHOD = re.compile(_TOKEN + rb"{1,%d}" % _MAX_METHOD)
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb"{1,%d})[ \t]+(\S+)[ \t]+HTTP/(\d)\.(\d)[ \t]*\r?" % _MAX_METHOD)
_HTTP_09 = re.compile(rb"(GET|HEAD|POST|PUT|DELETE|OPTIONS|CONNECT|TRACE|PATCH|PRI)[ \t]+\S.*", re.DOTALL)
_HEAD_END = re.compile(rb"\n\r?\n")
_AUTHORITY = re.compile(rb"(?:[^@/?#]*@)?(\[[0-9A-Fa-f:.]+\]|[^:/?#\[\]@]*)(?::(\d{0,5}))?")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")


@dataclass(frozen=True)
class Sniffed:
    """What a flow turned out to be."""

    protocol: Protocol
    server_name: str | None = None
    """SNI or Host as a normalised name or address; None when there is none or it is no host name."""
    name_hidden: bool = False
    """An encrypted ClientHello is inside."""
    alpn: tuple[str, ...] = ()
    ja4: str = ""
    """Fingerprint of the ClientHello (JA4)."""
    refused: str = ""
    """Why it may not pass even where the protocol is granted: malformed, unfinished, CONNECT..."""


class Sniffer:
    """Identifies one flow."""

    def __init__(self) -> None:
        self.data = bytearray()
        """Everything fed so far (at most :data:`MAX_BYTES` and one chunk): held back until the verdict."""
        self._looked = 0
        self._hello = clienthello.HelloReader()
        self._json = minerpc.Nesting()
        self._parses = 0
        self._parsed = 0
        self._marked = False

    def feed(self, chunk: bytes) -> Sniffed | None:
        """Take bytes; the answer, or None when more are needed. Never raises."""
        self.data += chunk
        result = self._classify()
        if result is None and len(self.data) >= MAX_BYTES:
            return self.finish()
        return result

    def finish(self) -> Sniffed:
        """The answer now: no more bytes will come, or it took too long. What is unfinished is refused."""
        result = self._classify()
        if result is not None:
            return result
        if not self.data:
            return Sniffed("unknown")
        return Sniffed(self._guess(), refused="its first message was not finished (too long, too slow or cut off)")

    def _guess(self) -> Protocol:
        data = bytes(self.data)
        if data[:1] == b"\x16":
            return "tls"
        if data[:4] == b"SSH-":
            return "ssh"
        if data[:1] in b"\x04\x05":
            return "socks"
        text = data.lstrip()
        if text[:1] in (b"{", b"["):
            return "stratum" if minerpc.is_miner_text(text) else "unknown"
        return "http" if _HTTP_09.match(text) or b"HTTP/" in text[:2048] else "unknown"

    def _classify(self) -> Sniffed | None:
        data = self.data
        if not data:
            return None
        first = data[0]
        if first == 0x16:
            return _read_tls(self._hello, data)
        if first in (4, 5):
            return _read_socks(data)
        if data.startswith(b"SSH-"):
            return Sniffed("ssh")
        if b"SSH-".startswith(data):
            return None
        start = len(data) - len(data.lstrip(b" \t\r\n"))
        if start == len(data):
            return None
        if data[start] in b"{[":
            return self._read_json(start)
        if data.startswith(b"SSH-", start):
            return Sniffed("ssh", refused="bytes come before the SSH banner")
        return self._read_http(start)

    def _read_json(self, start: int) -> Sniffed | None:
        fresh = self.data[self._looked :]
        self._looked = len(self.data)
        closes = self._json.feed(fresh)
        # A value can only end with one of these. Parsing all of it for each of them in a slow drip would cost a thousand
        # times what the guest pays for sending one: it is done where the outermost value may have ended, at first
        # at every mark, and then each time it grew by a quarter.
        self._marked |= any(mark in fresh for mark in (b"}", b"]", b"\n"))
        is_due = self._parses < _MAX_EAGER or len(self.data) >= 1.25 * self._parsed
        if not (closes or (self._marked and is_due)):
            return None
        self._marked = False
        self._parses += 1
        self._parsed = len(self.data)
        found = minerpc.read_messages(bytes(self.data[start:]))
        if found is None:
            return None
        return Sniffed("stratum" if found else "unknown")

    def _read_http(self, start: int) -> Sniffed | None:
        data = self.data
        end = data.find(b"\n", start)
        if end < 0:
            method = _METHOD.match(data, start)
            if method is None:
                return Sniffed("unknown")
            after = data[method.end() : method.end() + 1]
            # No other byte may follow a method: then it can no longer become a request.
            return None if not after or after in b" \t\r" else Sniffed("unknown")
        line = bytes(data[start:end])
        request = _REQUEST_LINE.fullmatch(line)
        if request is None:
            if _HTTP_09.fullmatch(line):
                return Sniffed("http", refused="the request line is not HTTP/1")
            return Sniffed("unknown")
        if request[3] != b"1":
            return _read_preface(bytes(data))
        head_end = _HEAD_END.search(data, max(end, self._looked - 4))
        self._looked = len(data)
        if head_end is None:
            return None
        if start and bytes(data[:start]).strip(b"\r\n"):
            return Sniffed("http", refused="blanks come before the request line")
        return _read_head(request[1], request[2], bytes(data[end + 1 : head_end.end()]))


def _read_preface(data: bytes) -> Sniffed | None:
    if PREFACE.startswith(data[: len(PREFACE)]):
        return Sniffed("http2") if len(data) >= len(PREFACE) else None
    return Sniffed("http", refused="this is neither HTTP/1 nor the preface of HTTP/2 (RFC 9113 section 3.4)")


def _read_tls(reader: clienthello.HelloReader, data: bytearray) -> Sniffed | None:
    try:
        hello = reader.read(data)
    except clienthello.MalformedError as error:
        return Sniffed("tls", refused=f"the ClientHello is malformed: {error}")
    except clienthello.NotTlsError:
        return Sniffed("unknown")
    if hello is None:
        return None
    return Sniffed(
        "tls",
        server_name=normalise_name(hello.server_name) if hello.server_name else None,
        name_hidden=hello.encrypted,
        alpn=hello.alpn,
        ja4=fingerprint(hello),
    )


def _read_socks(data: bytearray) -> Sniffed | None:
    if len(data) < 2:
        return None
    if data[0] == 5:
        end = 2 + data[1]
        if data[1] == 0:
            return Sniffed("unknown")
        if len(data) < end:
            return None
        # Nothing follows the offered methods, or (sent without waiting) a log-in or the request itself.
        return Sniffed("socks") if len(data) == end or data[end] in (1, 5) else Sniffed("unknown")
    if data[1] not in (1, 2) or len(data) > 1024:
        return Sniffed("unknown")
    return Sniffed("socks") if len(data) > 8 and 0 in data[8:] else None


def split_authority(raw: bytes) -> str | None:
    """The host of a Host header or an authority, normalised: a name, or an address without brackets. None: unusable."""
    match = _AUTHORITY.fullmatch(raw.strip(b" \t"))
    if match is None or b"@" in raw:
        return None
    try:
        text = match[1].decode("ascii")
    except UnicodeDecodeError:
        return None
    if text.startswith("["):
        return text[1:-1].lower()
    return normalise_name(text) or _as_ipv4(text)


def _as_ipv4(text: str) -> str | None:
    return text if re.fullmatch(r"\d{1,3}(?:\.\d{1,3}){3}", text) else None


def authority_of(target: bytes) -> bytes | None:
    """The authority of a request target in absolute form; None for the other forms."""
    match = _ABSOLUTE.match(target)
    return None if match is None else match[1]


def _read_head(method: bytes, target: bytes, head: bytes) -> Sniffed:
    if method.upper() == b"CONNECT":
        return Sniffed(
            "http", server_name=split_authority(target), refused="CONNECT asks the server to open another way out"
        )
    hosts = []
    for line in head.split(b"\n"):
        name, colon, value = line.rstrip(b"\r").partition(b":")
        if colon and name.strip().lower() == b"host":
            hosts.append(value)
    if len(hosts) > 1:
        return Sniffed("http", refused="there is more than one Host header")
    host = split_authority(hosts[0]) if hosts else None
    if hosts and host is None and hosts[0].strip():
        return Sniffed("http", refused="the Host header is not a host name")
    authority = authority_of(target)
    if authority is not None and split_authority(authority) != host:
        return Sniffed(
            "http", server_name=split_authority(authority), refused="the request target names another host than Host"
        )
    return Sniffed("http", server_name=host)


class MinerWatch:
    """Looks for miner messages in the first bytes that follow in an ``unknown`` flow, before they are forwarded."""

    LIMIT = 64 * 1024
    """Bytes looked at; a mining session says what it is in its first hundreds."""

    def __init__(self) -> None:
        self._tail = b""
        self._seen = 0

    def feed(self, chunk: bytes) -> bool:
        """Whether these bytes, with those before them, hold a miner's message. They have not been forwarded yet."""
        if self._seen >= self.LIMIT:
            return False
        self._seen += len(chunk)
        window = self._tail + chunk
        self._tail = window[-2048:]
        return minerpc.is_miner_text(window)
