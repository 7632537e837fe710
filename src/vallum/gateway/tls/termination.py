"""TLS ended at the gateway, where a rule needs to see requests: towards the guest we are the granted server.

Covered: only a name that was judged before gets a certificate, and a handshake that names another ends; TLS 1.2 and 1.3
only; no tickets, renegotiation, compression or client certificates; what is no handshake, or takes too long, ends it
with nothing forwarded. Not covered: a client that pins its server's certificate; it will not talk to us.

Source: RFC 8446, RFC 5246, RFC 7301, RFC 6066.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.kit import Authority
from vallum.gateway.stream import Stream
from vallum.gateway.tls.leaves import leaves_of
from vallum.gateway.tls.stream import TlsStream

HANDSHAKE_TIMEOUT_S = 10.0
HTTP_PROTOCOLS = ("h2", "http/1.1")

_DISTRUST = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "CERTIFICATE_EXPIRED", "UNSUPPORTED_CERTIFICATE")


class HandshakeError(Exception):
    """TLS could not be established. ``decision`` denies and says why."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.decision = Decision(verdict="deny", rule=rule, reason=reason)


async def terminate(
    below: Stream, authority: Authority, *, server_name: str, alpn: Sequence[str] = HTTP_PROTOCOLS
) -> TlsStream:
    """Shake hands with the guest as ``server_name``; :attr:`TlsStream.alpn` of the answer says what to speak.

    Args:
        below: the connection from its first byte on (``SocketStream(conn, head)``).
        server_name: the normalised name, or address, that was granted; the ClientHello's own SNI if it has one.
        alpn: what we speak, the best first. A client that offers none of it gets no ALPN.

    Raises:
        HandshakeError: with rule ``tls-handshake`` or ``sni-mismatch``. Nothing else was read or sent, and ``below`` is the caller's to close.
        GatewayError: the authority cannot be used.
    """
    context = leaves_of(authority).context(server_name, tuple(alpn))
    stream = TlsStream(below, context)
    try:
        await asyncio.wait_for(stream.shake_hands(), HANDSHAKE_TIMEOUT_S)
    except TimeoutError:
        raise HandshakeError(
            "tls-handshake", f"the TLS handshake with the guest took longer than {HANDSHAKE_TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        if getattr(error, "reason", None) == "CALLBACK_FAILED":
            reason = f"the TLS handshake names another server than {show(server_name)}, for which the flow was judged"
            raise HandshakeError("sni-mismatch", reason) from error
        raise HandshakeError("tls-handshake", _explain(error, server_name)) from error
    return stream


def _explain(error: OSError, server_name: str) -> str:
    if not isinstance(error, ssl.SSLError):
        return f"the guest broke off the TLS handshake ({error.strerror or error})"
    said = error.reason or str(error)
    if any(word in said for word in _DISTRUST):
        return (
            f"the guest does not trust the run's certificate authority, which ends TLS for {show(server_name)}: let it use "
            "the system's certificates or /etc/vallum/ca-bundle.pem"
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the guest broke off the TLS handshake (it may not trust the run's certificate authority)"
    return f"the TLS handshake with the guest failed: {said.lower().replace('_', ' ')}"
