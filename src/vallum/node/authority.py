"""The certificate authority of a run: its key exists in the memory of node and gateway, and nowhere else."""

from __future__ import annotations

import datetime

from vallum.gateway.kit import Authority

LIFETIME = datetime.timedelta(hours=48)
_CLOCK_SKEW = datetime.timedelta(hours=1)


def make_authority(run: str, *, lifetime: datetime.timedelta = LIFETIME) -> Authority:
    """A new one: EC P-256, valid from an hour ago for ``lifetime``, good for servers' certificates only.

    It is not constrained to names: rules may be widened while a cell runs. What it may sign is decided where its
    key is, by the rules; and only cells of the run trust it.
    """
    # Loading it takes a tenth of a second, which only runs whose rules read requests should wait for.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    signs_certificates = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Vallum"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Vallum run {run}"[:64]),
        ]
    )
    start = datetime.datetime.now(datetime.UTC) - _CLOCK_SKEW
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _CLOCK_SKEW + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs_certificates, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def is_fresh(authority: Authority) -> bool:
    """Whether a cell that is made now may have it: less than half of its time is over."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(authority.certificate_pem)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return datetime.datetime.now(datetime.UTC) < start + (end - start) / 2
