"""Certificates for granted names, signed by the run's authority when a guest asks for one, and kept.

Covered: the keys of authority and leaves are in this process's memory only (the TLS library reads from files, so a
memory file without a name is one for the moment of loading). A context forgets its sessions, so that no guest can
fill this process with them.
"""

from __future__ import annotations

import datetime
import os
import ssl
import weakref
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vallum.core.errors import GatewayError
from vallum.gateway.kit import Authority

MAX_LEAVES = 256
"""Names of one authority whose certificates are kept; the one that was not used for longest goes first."""
MAX_USES = 256
"""Handshakes after which a context is made anew: TLS 1.2 keeps sessions in it."""


class Leaves:
    """The certificates of one authority. Not safe for threads."""

    def __init__(self, authority: Authority) -> None:
        """Raises GatewayError: the authority cannot be used."""
        try:
            self._root = x509.load_pem_x509_certificate(authority.certificate_pem)
            key = serialization.load_pem_private_key(authority.key_pem, password=None)
        except (ValueError, TypeError) as error:
            raise GatewayError(f"the run's certificate authority cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise GatewayError("the run's certificate authority has a key of another kind than EC")
        self._key = key
        self._contexts: OrderedDict[tuple[str, tuple[str, ...]], tuple[ssl.SSLContext, int]] = OrderedDict()

    def context(self, name: str, alpn: tuple[str, ...]) -> ssl.SSLContext:
        """A server's context with a certificate for ``name`` (or an address), choosing among ``alpn`` in that order."""
        key = (name, alpn)
        context, uses = self._contexts.pop(key, (None, 0))
        if context is None or uses >= MAX_USES:
            context, uses = self._make_context(name, alpn), 0
        self._contexts[key] = (context, uses + 1)
        while len(self._contexts) > MAX_LEAVES:
            self._contexts.popitem(last=False)
        return context

    def _make_context(self, name: str, alpn: tuple[str, ...]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # what a guest cut off is not worth a failure
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_NONE
        if alpn:
            context.set_alpn_protocols(list(alpn))
        context.sni_callback = _accept_only(name)
        _load(context, self._sign(name))
        return context

    def _sign(self, name: str) -> bytes:
        """PEM of a new key and its certificate for ``name``."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            alternative: x509.GeneralName = x509.IPAddress(ip_address(name))
        except ValueError:
            alternative = x509.DNSName(name)
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Vallum")]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(self._root.not_valid_before_utc, now))
            .not_valid_after(self._root.not_valid_after_utc)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_SIGNS_HANDSHAKES, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


_SIGNS_HANDSHAKES = x509.KeyUsage(
    digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
)  # fmt: skip

_known: weakref.WeakKeyDictionary[Authority, Leaves] = weakref.WeakKeyDictionary()


def leaves_of(authority: Authority) -> Leaves:
    """The leaves of an authority: the same for as long as somebody holds the authority.

    Raises:
        GatewayError: it cannot be used.
    """
    leaves = _known.get(authority)
    if leaves is None:
        leaves = _known[authority] = Leaves(authority)
    return leaves


def _accept_only(name: str) -> Callable[[ssl.SSLObject, str, ssl.SSLContext], int | None]:
    """Ends a handshake whose server name is another one than was judged, in whichever ClientHello it comes."""

    def check(_: ssl.SSLObject, sent: str | None, __: ssl.SSLContext) -> int | None:
        is_it = sent is None or sent.lower().rstrip(".") == name
        return None if is_it else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    return check


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.ftruncate(fd, 0)
        os.close(fd)
