"""The key with which the gateway shows itself to guests as the granted SSH servers: one for a run."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vallum.gateway.kit import Authority

KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
"""Where OpenSSH clients of a guest look, whoever they are."""


def derive_host_key(authority: Authority) -> Ed25519PrivateKey:
    """The run's SSH host key, from its authority's secret: node and gateway come to the same one (HKDF, RFC 5869)."""
    kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"vallum ssh host key")
    return Ed25519PrivateKey.from_private_bytes(kdf.derive(authority.key_pem))


def write_host_key(authority: Authority) -> bytes:
    """The same in OpenSSH's PEM form. A secret."""
    key, none = derive_host_key(authority), serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, none)


def write_known_hosts(authority: Authority) -> bytes:
    """A known_hosts file that trusts the key for every name: no other SSH server is ever reached from a cell."""
    public = derive_host_key(authority).public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return b"* " + line + b"\n"
