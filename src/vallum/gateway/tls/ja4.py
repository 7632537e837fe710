"""JA4: which TLS client this is, by what it offers. The order of what it offers does not matter, GREASE is ignored.

A fact for the record and for detectors, never a reason to let something pass: a guest can send any ClientHello.

Source: FoxIO, JA4 TLS Client Fingerprinting (technical_details/JA4.md); RFC 8701 (GREASE).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256

from vallum.gateway.tls.clienthello import ClientHello

_SNI, _ALPN = 0, 16
_VERSIONS = {0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2"}
_NOTHING = "000000000000"
Numbers = tuple[int, ...]


def fingerprint(hello: ClientHello) -> str:
    """``JA4_a_b_c`` of TLS over TCP, as ``t13d1516h2_8daaf6152771_e5627efa2ab1``."""
    versions = hello.versions or (hello.version,)
    return _fingerprint(versions, hello.ciphers, hello.extensions, hello.signatures, hello.first_alpn)


@lru_cache(maxsize=256)  # a cell's connections are those of a few programs
def _fingerprint(
    versions: Numbers, offered_ciphers: Numbers, offered_extensions: Numbers, offered_signatures: Numbers, alpn: bytes
) -> str:
    ciphers = _without_grease(offered_ciphers)
    extensions = _without_grease(offered_extensions)
    version = max(_without_grease(versions), default=0)
    head = (
        f"t{_VERSIONS.get(version, '00')}{'d' if _SNI in extensions else 'i'}"
        f"{min(len(ciphers), 99):02}{min(len(extensions), 99):02}{_ends(alpn)}"
    )
    listed = _listing(sorted(number for number in extensions if number not in (_SNI, _ALPN)))
    signatures = _listing(_without_grease(offered_signatures))
    tail = f"{listed}_{signatures}" if signatures else listed
    return f"{head}_{_short_hash(_listing(sorted(ciphers)))}_{_short_hash(tail) if listed else _NOTHING}"


def is_grease(number: int) -> bool:
    """Whether a number means nothing: it only keeps others used to numbers that they do not know."""
    return number & 0x0F0F == 0x0A0A and number >> 8 == number & 0xFF


def _without_grease(numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if not is_grease(number)]


def _listing(numbers: Iterable[int]) -> str:
    return ",".join(f"{number:04x}" for number in numbers)


def _short_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12] if text else _NOTHING


def _ends(protocol: bytes) -> str:
    """First and last character of a protocol's name; of its hexadecimal form where either is no letter or digit."""
    if not protocol:
        return "00"
    if all(bytes([byte]).isalnum() for byte in (protocol[0], protocol[-1])):
        return chr(protocol[0]) + chr(protocol[-1])
    text = protocol.hex()
    return text[0] + text[-1]
