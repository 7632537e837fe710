"""Watches an allowed plaintext HTTP/1 flow: every request of the connection is judged, not only the first. Sans-I/O.

Requests are parsed with h11 and written anew from what was parsed, so that no byte which two parsers could read
differently (line folding, odd line ends, Content-Length beside Transfer-Encoding) reaches the server. Responses
pass as they are.

Covered: another Host on a kept-alive connection, CONNECT, absolute targets naming another host (an open proxy), request smuggling,
upgrades (a WebSocket on the connection's first request; any other, ``h2c`` too, has its Upgrade header removed).
Not covered: what a WebSocket carries; the content of bodies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set

import h11

from vallum.core.verdict import Decision
from vallum.gateway.sniff import authority_of, split_authority

MAX_HEAD = 64 * 1024
MAX_HELD = 64 * 1024
"""Bytes kept back while it is open whether the server switches protocols."""
_BETWEEN = frozenset({h11.IDLE, h11.DONE})
_PLAIN = re.compile(
    rb"(?:GET|HEAD|OPTIONS) /[!-~]* HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}: [!-~](?:[ -~]*[!-~])?\r\n)+)\r\n"
)
_NOT_PLAIN = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"connection",
        b"upgrade",
        b"http2-settings",
        b"expect",
        b"te",
        b"trailer",
    }
)
"""What makes a request more than plain; ``host``, a second time."""
_PLAIN_CONNECTION = frozenset({b"keep-alive", b"close"})
_HOP = frozenset({b"upgrade", b"http2-settings"})


class RefusedError(Exception):
    """The flow must be cut now; nothing of the offending request was given out."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.reason)
        self.decision = decision
        self.evidence = b""
        """The guest's bytes that it was about."""


class Http1Watch:
    """Between the guest's bytes and the server."""

    def __init__(self, judge_host: Callable[[str | None], Decision], destinations: Set[str]) -> None:
        """``judge_host`` decides on the (normalised) Host of each request; ``destinations`` are the names and the
        address of the server: an absolute target that names anything else asks it to be a proxy."""
        self._judge_host = judge_host
        self._destinations = destinations
        self._conn = _make_parser()
        self._chunked = False
        self._requests = 0
        self._held = b""
        self._response = b""
        self.is_waiting = False
        self.upgraded = False
        """The server agreed to a WebSocket: bytes pass unread from here on."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the guest, return those to send to the server. Refusing one request of a batch refuses all.

        Raises:
            RefusedError: a request must not pass.
        """
        if self.upgraded:
            return data
        if self.is_waiting:
            self._held += data
            if len(self._held) > MAX_HELD:
                raise _refuse("malformed", "more than 64 KiB were sent before the server agreed to the upgrade")
            return b""
        return self._parse(data)

    def feed_response(self, data: bytes) -> bytes:
        """Look at bytes of the server (which pass as they are); return guest bytes that were waiting for them.

        Raises:
            RefusedError: what had waited must not pass.
        """
        if not self.is_waiting:
            return b""
        self._response += data
        while True:
            line, end, _ = self._response.partition(b"\r\n")
            parts = line.split(None, 2)
            if not end:
                if len(self._response) > MAX_HEAD:
                    raise _refuse("malformed", "the server's answer to the upgrade is not HTTP")
                return b""
            interim = len(parts) > 1 and parts[1][:1] == b"1" and parts[1] != b"101"
            if not interim:
                break
            _, end, rest = self._response.partition(b"\r\n\r\n")
            if not end:
                return b""
            self._response = rest
        self.is_waiting = False
        self._response = b""
        held, self._held = self._held, b""
        if parts[1:2] == [b"101"] and parts[0].startswith(b"HTTP/1"):
            self.upgraded = True
            return held
        return self._parse(held)

    def finish(self) -> bytes:
        """The guest sends no more; an unfinished request stays unsent."""
        return b""

    def _parse(self, data: bytes) -> bytes:
        if self._pass_plain(data):
            return data
        out: list[bytes] = []
        try:
            if data:
                self._conn.receive_data(data)
            while self._step(out):
                pass
        except h11.RemoteProtocolError as error:
            raise _refuse("malformed", f"this is not a request that can be read in only one way ({error})") from error
        return b"".join(out)

    def _pass_plain(self, data: bytes) -> bool:
        """Whether these bytes are one whole request without a body in its plainest form, which leaves no parser a choice:
        then they pass as they are. Everything else is parsed and written anew."""
        if len(data) > MAX_HEAD or self._conn.their_state not in _BETWEEN or self._conn.trailing_data[0]:
            return False
        request = _PLAIN.fullmatch(data)
        if request is None:
            return False
        host = None
        for header in request[1].split(b"\r\n")[:-1]:
            name, _, value = header.partition(b": ")
            name = name.lower()
            if name == b"host" and host is None:
                host = split_authority(value)
            elif name in _NOT_PLAIN and not (name == b"connection" and value.lower() in _PLAIN_CONNECTION):
                return False
        if host is None:
            return False
        decision = self._judge_host(host)
        if decision.verdict != "allow":
            raise RefusedError(decision)
        self._requests += 1
        return True

    def _step(self, out: list[bytes]) -> bool:
        event = self._conn.next_event()
        if event is h11.NEED_DATA or event is h11.PAUSED:
            if event is h11.PAUSED:
                return self._next_request()
            return False
        if isinstance(event, h11.Request):
            out.append(self._admit(event))
        elif isinstance(event, h11.Data):
            data = bytes(event.data)
            if data:
                out.append(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        elif isinstance(event, h11.EndOfMessage):
            if self._chunked:
                trailers = b"".join(b"%b: %b\r\n" % pair for pair in event.headers.raw_items())
                out.append(b"0\r\n" + trailers + b"\r\n")
            return not self.is_waiting or self._hold_rest()
        else:
            return False
        return True

    def _hold_rest(self) -> bool:
        rest, _ = self._conn.trailing_data
        self._held += rest
        self._conn = _make_parser()
        return False

    def _next_request(self) -> bool:
        # A parser a request: h11 would wait for our response before the next one, but responses pass by it.
        rest, _ = self._conn.trailing_data
        self._conn = _make_parser()
        if rest:
            self._conn.receive_data(rest)
        return bool(rest)

    def _admit(self, request: h11.Request) -> bytes:
        headers = [(bytes(name), bytes(value)) for name, value in request.headers.raw_items()]
        names = [name.lower() for name, _ in headers]
        if request.method.upper() == b"CONNECT":
            raise _refuse("malformed", "CONNECT asks the server to open another way out")
        hosts = [value for (_, value), name in zip(headers, names, strict=True) if name == b"host"]
        if len(hosts) > 1:
            raise _refuse("malformed", "there is more than one Host header")
        host = split_authority(hosts[0]) if hosts else None
        authority = authority_of(request.target)
        if authority is not None and (split_authority(authority) != host or host not in self._destinations):
            raise _refuse("host-mismatch", "the request target names another host, which would make the server a proxy")
        decision = self._judge_host(host)
        if decision.verdict != "allow":
            raise RefusedError(decision)
        self._chunked = b"transfer-encoding" in names
        if self._chunked and (b"content-length" in names or request.http_version < b"1.1"):
            raise _refuse("malformed", "Transfer-Encoding beside Content-Length or in HTTP/1.0 can be read in two ways")
        headers = self._settle_upgrade(headers)
        self._requests += 1
        head = b"%b %b HTTP/%b\r\n" % (request.method, request.target, request.http_version)
        return head + b"".join(b"%b: %b\r\n" % pair for pair in headers) + b"\r\n"

    def _settle_upgrade(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Let a WebSocket be asked for first thing; take any other Upgrade away, as a proxy may (RFC 9110 7.8)."""
        wanted = [value.strip().lower() for name, value in headers if name.lower() == b"upgrade"]
        if not wanted:
            return headers
        if wanted == [b"websocket"] and self._requests == 0:
            self.is_waiting = True
            return headers
        kept = []
        for name, value in headers:
            if name.lower() in _HOP:
                continue
            if name.lower() == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _HOP)  # noqa: PLW2901
                if not value:
                    continue
            kept.append((name, value))
        return kept


def _make_parser() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)


def _refuse(rule: str, reason: str) -> RefusedError:
    return RefusedError(Decision(verdict="deny", rule=rule, reason=reason))
