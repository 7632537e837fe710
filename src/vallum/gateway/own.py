"""Which addresses are the host's own, asked of the kernel at the moment it matters (addresses come and go)."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _binds_anything(ip: str) -> bool:
    """``net.ipvX.ip_nonlocal_bind`` makes every address bindable."""
    path = Path("/proc/sys/net") / ("ipv6" if ":" in ip else "ipv4") / "ip_nonlocal_bind"
    try:
        return path.read_text() != "0\n"
    except OSError:
        return False


def _listed(ip: str) -> bool:
    """Whether the kernel's tables list the address. The slower way."""
    if ":" in ip:
        wanted = socket.inet_pton(socket.AF_INET6, ip).hex()
        return any(line.startswith(wanted) for line in Path("/proc/net/if_inet6").read_text().splitlines())
    lines = [line.split() for line in Path("/proc/net/fib_trie").read_text().splitlines()]
    pairs = itertools.pairwise(lines)
    return any(first[-1:] == [ip] and "LOCAL" in second for first, second in pairs)


def is_own(ip: str) -> bool:
    """Whether ``ip`` (canonical text) is local to the gateway's network namespace. True when that cannot be told."""
    try:
        with socket.socket(_family(ip), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    if not _binds_anything(ip):
        return True
    try:
        return _listed(ip)
    except OSError:
        return True


def has_route(ip: str) -> bool:
    """Whether the host has a route to ``ip``. Connecting a UDP socket sends nothing."""
    try:
        with socket.socket(_family(ip), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect((ip, 9))
    except OSError:
        return False
    return True
