"""How a refusal is phrased, so that whoever asked can read it: text, JSON, or a message of git's own protocol. Pure."""

from __future__ import annotations

import re

import msgspec

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.http.exchange import Headers, RequestHead
from vallum.gateway.http.git import find_service, write_error

_JSON = re.compile(rb"application/(?:[a-z0-9.+-]*\+)?json\b", re.IGNORECASE)


def phrase(decision: Decision) -> str:
    """One readable line without the characters that drive a terminal."""
    return f"vallum: blocked by rule {show(decision.rule)}: {show(decision.reason, 400)}"


def render(head: RequestHead | None, decision: Decision, status: int) -> tuple[int, Headers, bytes]:
    """Status, headers and body of the answer to a refused request. ``head`` None: there was none that could be read.

    git's smart HTTP gets 200 with an ``ERR`` packet, which is what it prints; a client that asks for JSON (and takes
    no text) gets ``{"error": {"type": "vallum_denied", "rule": ..., "message": ...}}``.
    """
    rule = (b"x-vallum-rule", show(decision.rule).encode("ascii", "replace"))
    plain = b"text/plain; charset=utf-8"
    if head is not None:
        service = find_service(head)
        if service:
            kind = "advertisement" if head.method == "GET" else "result"
            body = write_error(phrase(decision), service, is_advertisement=head.method == "GET")
            return 200, ((b"content-type", f"application/x-{service}-{kind}".encode()), rule), body
        if _JSON.search(head.header(b"accept") or b"") or _JSON.match(head.header(b"content-type") or b""):
            error = {"type": "vallum_denied", "rule": show(decision.rule), "message": phrase(decision)}
            return status, ((b"content-type", b"application/json"), rule), msgspec.json.encode({"error": error}) + b"\n"
    return status, ((b"content-type", plain), rule), phrase(decision).encode() + b"\n"
