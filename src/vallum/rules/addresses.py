"""Addresses that no broad grant opens: private, local, metadata, the host's own.

Covered: every notation that ends at such an address: IPv4-mapped and -compatible IPv6, 6to4, NAT64, Teredo and
ISATAP are unwrapped first. Not covered: a NAT64 prefix of the network's own (RFC 6052 allows any); grant no
IPv6 range that holds one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Guard:
    """A class of addresses with a built-in denial."""

    rule: str
    """Id of the rule, as decisions name it."""
    what: str
    """Readable."""
    networks: tuple[Network, ...]
    single: bool = False
    """Only a grant of the one address opens it; a range never does."""


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


METADATA = Guard(
    "metadata",
    "a cloud metadata service",
    _networks(
        "169.254.169.254",  # AWS, GCP, Azure, OpenStack, DigitalOcean...
        "169.254.169.253",  # AWS resolver
        "169.254.170.2",  # AWS ECS credentials
        "169.254.170.23",  # AWS EKS pod identity
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure WireServer
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",
        "fd00:ec2::253",
        "fd00:ec2::23",
        "fd20:ce::254",  # GCP
    ),
    single=True,
)
OWN = Guard("own-address", "an address of the host itself", (), single=True)
RANGES = (
    Guard("loopback", "loopback", _networks("127.0.0.0/8", "::1")),
    Guard("unspecified", "the unspecified network", _networks("0.0.0.0/8", "::")),
    Guard("link-local", "link-local", _networks("169.254.0.0/16", "fe80::/10")),
    Guard(
        "private-range",
        "a private range",
        _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10"),
    ),
    Guard("multicast", "multicast", _networks("224.0.0.0/4", "ff00::/8")),
    Guard("reserved", "reserved or broadcast", _networks("240.0.0.0/4")),
)

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


@lru_cache(maxsize=4096)
def canonical(text: str) -> Address:
    """The address meant: scope ids dropped, IPv4-mapped IPv6 turned into IPv4.

    Raises:
        ValueError: not an address.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def forms(address: Address) -> tuple[Address, ...]:
    """The address and every IPv4 address that it carries inside."""
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    inner: list[Address] = [address]
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        inner.append(address.ipv4_mapped)
    if address.sixtofour is not None:
        inner.append(address.sixtofour)
    if address.teredo is not None:
        inner.extend(address.teredo)
    if address in _NAT64 or address in _NAT64_LOCAL:
        inner.append(low)
    if address in _COMPATIBLE and int(address) > 1:
        inner.append(low)
    if (int(address) >> 32) & 0xFDFFFFFF == 0x00005EFE:  # ISATAP, either value of the u bit
        inner.append(low)
    return tuple(inner)


def guards_of(address: Address, *, own: bool = False) -> list[Guard]:
    """Every guard that applies, the most telling first. A grant must open all of them."""
    return list(_guards_of(address, own))


@lru_cache(maxsize=4096)
def _guards_of(address: Address, own: bool) -> tuple[Guard, ...]:
    shapes = forms(address)
    guards: list[Guard] = []
    if any(shape in network for shape in shapes for network in METADATA.networks):
        guards.append(METADATA)
    ranges = [guard for guard in RANGES if any(s in n for s in shapes for n in guard.networks)]
    if own and RANGES[0] not in ranges:  # loopback is always the host's own, and stricter
        guards.append(OWN)
    if METADATA not in guards:  # more specific than the range that it lies in
        guards += ranges
    return tuple(guards)
