"""git over HTTP: which of its services a request asks for, and a refusal that git prints. Pure.

Source: gitprotocol-http(5), gitprotocol-common(5) (pkt-line), gitprotocol-pack(5) (``ERR``).
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import parse_qs

from vallum.gateway.http.exchange import RequestHead

GitService = Literal["git-upload-pack", "git-receive-pack"]
SERVICES: tuple[GitService, ...] = ("git-upload-pack", "git-receive-pack")
FLUSH = b"0000"
_MAX_PACKET = 65516


def find_service(head: RequestHead) -> GitService | Literal[""]:
    """The service of git's smart protocol that is asked for; empty for every other request."""
    path, _, query = head.target.partition("?")
    if path.endswith("/info/refs") and head.method == "GET":
        asked = parse_qs(query).get("service", [])
        return next((service for service in SERVICES if [service] == asked), "")
    if head.method == "POST":
        return next((service for service in SERVICES if path.endswith(f"/{service}")), "")
    return ""


def packet(payload: bytes) -> bytes:
    """One pkt-line.

    Raises:
        ValueError: it is longer than a pkt-line may be.
    """
    if len(payload) > _MAX_PACKET:
        raise ValueError("a pkt-line holds at most 65516 bytes")
    return b"%04x%b" % (len(payload) + 4, payload)


def write_error(message: str, service: GitService, *, is_advertisement: bool) -> bytes:
    """An answer that makes git stop with ``remote error: MESSAGE``."""
    error = packet(b"ERR " + message.encode()[:2000])
    if is_advertisement:
        return packet(b"# service=" + service.encode() + b"\n") + FLUSH + error
    return error
