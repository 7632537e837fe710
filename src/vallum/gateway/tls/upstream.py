"""TLS towards granted servers: the certificate must be for the granted name and signed by someone we trust.

Covered: TLS 1.2 and later, chain, dates and name are verified before a byte of a request is sent. :class:`Vetting` asks
the same of servers whose TLS is only relayed: it makes a handshake of its own with the same address.
Not covered: revocation; a server that shows us another certificate than the guest (what a relayed guest accepts is up
to the guest).

Source: RFC 8446, RFC 9525 (names in certificates), RFC 5280.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vallum.core.text import show
from vallum.gateway.stream import SocketStream
from vallum.gateway.tls.stream import TlsStream
from vallum.gateway.tls.termination import HandshakeError

HANDSHAKE_TIMEOUT_S = 10.0
VETTED_FOR_S = 300.0
REFUSED_FOR_S = 5.0
MAX_VETTED = 1024
MAX_CONTEXTS = 16
SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
)
"""Where distributions keep the roots that they trust (Debian and Alpine, Fedora, BSD-like, SUSE)."""

_NAME_MISMATCH = 62
_IP_MISMATCH = 64


_contexts: OrderedDict[tuple[bytes, tuple[str, ...]], ssl.SSLContext] = OrderedDict()


async def trust_context(roots_pem: bytes, alpn: tuple[str, ...]) -> ssl.SSLContext:
    """A client's context that trusts the system's roots and ``roots_pem``; kept.

    Raises:
        ssl.SSLError, ValueError: ``roots_pem`` is not PEM.
    """
    key = (roots_pem, alpn)
    context = _contexts.get(key)
    if context is None:
        # Reading a hundred and forty roots takes some 50 ms, which would hold up every other flow.
        context = _contexts[key] = await asyncio.to_thread(_read_roots, roots_pem, alpn)
        while len(_contexts) > MAX_CONTEXTS:
            _contexts.popitem(last=False)
    return context


def _read_roots(roots_pem: bytes, alpn: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # an answer that somebody cut short must not pass for a whole one
    found = next((path for path in SYSTEM_ROOTS if Path(path).is_file()), None)
    if found is not None:
        context.load_verify_locations(cafile=found)
    else:
        context.load_default_certs()
    if roots_pem:
        context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


async def connect_tls(
    sock: socket.socket, *, server_name: str, roots_pem: bytes = b"", alpn: Sequence[str] = ("http/1.1",)
) -> TlsStream:
    """Shake hands with a granted server over a connected, non-blocking socket, and verify its certificate.

    Args:
        server_name: the granted name, which is sent as SNI and must be the certificate's; or an address.
        roots_pem: certificates trusted beside the system's.

    Raises:
        HandshakeError: rule ``certificate-mismatch`` when the certificate is for another name, else
            ``upstream-certificate``. Nothing was sent but the handshake. The socket is the caller's to close.
    """
    try:
        context = await trust_context(roots_pem, tuple(alpn))
        stream = TlsStream(SocketStream(sock), context, server_name=server_name)
        await asyncio.wait_for(stream.shake_hands(), HANDSHAKE_TIMEOUT_S)
    except ssl.SSLCertVerificationError as error:
        is_name = error.verify_code in (_NAME_MISMATCH, _IP_MISMATCH)
        raise HandshakeError(
            "certificate-mismatch" if is_name else "upstream-certificate",
            f"the certificate of {show(server_name)} cannot be accepted: {error.verify_message.rstrip('.')}",
        ) from error
    except TimeoutError:
        raise HandshakeError(
            "upstream-certificate", f"{show(server_name)} did not finish its TLS handshake in {HANDSHAKE_TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        said = (getattr(error, "reason", None) or error.strerror or str(error)).lower().replace("_", " ")
        raise HandshakeError(
            "upstream-certificate", f"{show(server_name)} showed no certificate: its TLS handshake failed ({said})"
        ) from error
    except ValueError as error:
        raise HandshakeError("upstream-certificate", f"{show(server_name)} is no name for a certificate") from error
    return stream


class Vetting:
    """Whose certificates addresses show for granted names, remembered for some minutes."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, int, bytes], tuple[float, HandshakeError | None]] = OrderedDict()
        self._asking: dict[tuple[str, str, int, bytes], asyncio.Task[HandshakeError | None]] = {}

    async def vet(self, server_name: str, ip: str, port: int, *, roots_pem: bytes = b"") -> None:
        """Return if the server at ``ip`` shows a certificate for ``server_name``. Asked once, however many wait.

        Raises:
            HandshakeError: it does not (as :func:`connect_tls`).
            OSError: it cannot be connected to.
        """
        key = (server_name, ip, port, roots_pem)
        now = asyncio.get_running_loop().time()
        until, failure = self._known.get(key, (0.0, None))
        if until <= now:
            task = self._asking.get(key)
            if task is None:
                task = self._asking[key] = asyncio.create_task(_ask(server_name, ip, port, roots_pem))
                task.add_done_callback(functools.partial(self._answered, key))
            failure = await asyncio.shield(task)
            self._known[key] = (now + (REFUSED_FOR_S if failure else VETTED_FOR_S), failure)
            self._known.move_to_end(key)
            while len(self._known) > MAX_VETTED:
                self._known.popitem(last=False)
        if failure is not None:
            raise HandshakeError(failure.decision.rule, failure.decision.reason)

    def knows(self, server_name: str, ip: str, port: int, roots_pem: bytes = b"") -> bool:
        """Whether :meth:`vet` would return without asking."""
        until, failure = self._known.get((server_name, ip, port, roots_pem), (0.0, None))
        return failure is None and until > asyncio.get_running_loop().time()

    def _answered(self, key: tuple[str, str, int, bytes], task: asyncio.Task[HandshakeError | None]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if all of them have gone, nobody needs it


async def _ask(server_name: str, ip: str, port: int, roots_pem: bytes) -> HandshakeError | None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(sock, (ip, port)), HANDSHAKE_TIMEOUT_S)
        try:
            stream = await connect_tls(sock, server_name=server_name, roots_pem=roots_pem, alpn=())
        except HandshakeError as error:
            return error
        await stream.finish()
        return None
