"""Host names and addresses, compared as DNS and IP compare them. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from functools import lru_cache

PRIVATE_NAMES = ("in-addr.arpa", "ip6.arpa")


def normal(host: str) -> str:
    """A name in lower case without the final dot."""
    return host.strip().rstrip(".").lower()


def matching_domain(host: str, domains: Collection[str]) -> str | None:
    """The one of ``domains`` that ``host`` is or lies under, at a label's border."""
    labels = normal(host).split(".")
    for start in range(max(0, len(labels) - 16), len(labels)):
        candidate = ".".join(labels[start:])
        if candidate in domains:
            return candidate
    return None


def parent(host: str) -> str:
    """Roughly the registered domain: the last two labels, three under a short second one (``co.uk``)."""
    labels = normal(host).split(".")
    keep = 3 if len(labels) > 2 and len(labels[-1]) == 2 and len(labels[-2]) <= 3 else 2
    return ".".join(labels[-keep:])


@lru_cache(maxsize=4096)
def plain_address(address: str) -> str:
    """An address in one spelling; IPv4 inside IPv6 (mapped, NAT64, 6to4) as IPv4; other text unchanged."""
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        return str(inner or parsed)
    return str(parsed)


@lru_cache(maxsize=4096)
def is_private(address: str) -> bool:
    """Whether an address belongs to no public network (RFC 1918, link-local, unique local, shared)."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not parsed.is_global and not parsed.is_multicast


@lru_cache(maxsize=4096)
def is_multicast(address: str) -> bool:
    """Whether it is a group's address or a broadcast: chatter, not probing."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_multicast or str(parsed) == "255.255.255.255"


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
