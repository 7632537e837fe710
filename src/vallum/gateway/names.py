"""Names of one cell: looked up on the host, checked, and pinned to the addresses that the guest was told.

A flow may use a name grant only through a pin made here, so the guest's own idea of an address is never evidence.

Covered: rebinding (an answer inside private or metadata ranges is dropped), names that mean the host's loopback
(only from the host's own hosts file; the guest is given a stand-in address, since its 127.0.0.1 is its own).
Not covered: an operator of a granted name may answer any public address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vallum.core.clock import mono_ns
from vallum.core.verdict import Decision
from vallum.gateway.kit import MODEL_HOST, TOOLS_HOST, ServiceName
from vallum.gateway.own import has_route, is_own
from vallum.rules.addresses import canonical
from vallum.rules.facts import Asker, Pin
from vallum.rules.grants import Ruleset
from vallum.rules.names import normalise_name
from vallum.rules.verdicts import judge_answer

TTL_S = 60
"""What the guest is told."""
PIN_S = 600
"""How long an answer may be used after it was last given or used: clients keep addresses longer than they should."""
CACHE_S = 10
LOOKUP_TIMEOUT_S = 8.0
MAX_PINS = 4096
MAX_ADDRESSES = 16
_STAND_INS = (ipaddress.IPv4Network("198.18.0.0/16"), ipaddress.IPv6Network("100::/64"))
_STAND_IN_V4 = int(_STAND_INS[0].network_address)
_STAND_IN_V6 = int(_STAND_INS[1].network_address)
_SERVICES: dict[str, ServiceName] = {MODEL_HOST: "model", TOOLS_HOST: "tools"}
_HOSTS: dict[ServiceName, str] = {service: name for name, service in _SERVICES.items()}
_SERVICE_STAND_INS: dict[ServiceName, list[str]] = {
    "model": ["198.18.255.1", "100::ffff:1"],
    "tools": ["198.18.255.2", "100::ffff:2"],
}
_SERVICE_OF = {ip: service for service, own in _SERVICE_STAND_INS.items() for ip in own}


def find_service(name: str) -> ServiceName | None:
    """The gateway's own service of that name (normalised), if it is one."""
    return _SERVICES.get(name)


def host_of(service: ServiceName) -> str:
    """The name of one of the gateway's own services."""
    return _HOSTS[service]


def stand_ins_of(service: ServiceName) -> list[str]:
    """The addresses that a guest is told for a service; nothing outside has them."""
    return _SERVICE_STAND_INS[service]


def service_at(ip: str) -> ServiceName | None:
    """The service that a guest means by an address (canonical text)."""
    return _SERVICE_OF.get(ip)


def is_stand_in(ip: str) -> bool:
    """Whether an address (canonical text) is of those that guests are told in place of others."""
    return any(ipaddress.ip_address(ip) in network for network in _STAND_INS)


class LookupTemporarilyFailedError(Exception):
    """The host's resolver gave no answer, which is not the same as no such name."""


@dataclass
class Pinned:
    """What one address given to the guest stands for."""

    upstream: str
    """Address to connect to; another than the guest's only for a stand-in."""
    names: dict[str, Pin] = field(default_factory=dict)
    expires_ns: int = 0


@dataclass(frozen=True)
class Resolution:
    """Addresses of a granted name, as the guest may be told them."""

    exists: bool
    addresses: list[str]
    dropped: list[Decision]
    """Why answers were left out."""


def parse_hosts(text: str) -> dict[str, set[str]]:
    """Name -> addresses of a hosts file (hosts(5))."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        try:
            address = str(canonical(fields[0])) if fields else ""
        except ValueError:
            continue
        for alias in fields[1:]:
            name = normalise_name(alias)
            if name:
                found.setdefault(name, set()).add(address)
    return found


def read_hosts(path: Path = Path("/etc/hosts")) -> dict[str, set[str]]:
    """The host's own hosts file; empty when it cannot be read (then no name may mean loopback)."""
    try:
        return parse_hosts(path.read_text("utf-8", "replace"))
    except OSError:
        return {}


class HostResolver:
    """Asks the host's resolver, in few threads and each name once at a time."""

    def __init__(self, threads: int = 16) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lookup")
        self._asked: dict[str, asyncio.Future[list[str]]] = {}
        self.count = 0
        """Lookups that really left the gateway."""

    async def lookup(self, name: str) -> list[str]:
        """Addresses of a normalised name; empty when it does not exist.

        Raises:
            LookupTemporarilyFailedError: no answer in :data:`LOOKUP_TIMEOUT_S`.
        """
        future = self._asked.get(name)
        if future is None:
            self.count += 1
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._pool, _getaddrinfo, name)
            self._asked[name] = future
            future.add_done_callback(lambda _: self._asked.pop(name, None))
        try:
            return await asyncio.wait_for(asyncio.shield(future), LOOKUP_TIMEOUT_S)
        except TimeoutError:
            raise LookupTemporarilyFailedError(f"{name} was not answered in {LOOKUP_TIMEOUT_S:g} s") from None

    def close(self) -> None:
        """Start no further lookups."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(name: str) -> list[str]:
    try:
        # Bytes, and a final dot: no codec in between, and no search domain of the host added. The hosts file has been
        # asked by then (with a final dot the C library would not find the name there).
        found = socket.getaddrinfo(name.encode("ascii") + b".", None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA}:
            return []
        raise LookupTemporarilyFailedError(f"{name}: {error.strerror}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class CellNames:
    """Names and pins of one cell."""

    def __init__(self, resolver: HostResolver, hosts: Callable[[], dict[str, set[str]]] = read_hosts) -> None:
        self._resolver = resolver
        self._hosts = hosts
        self._pins: OrderedDict[str, Pinned] = OrderedDict()
        self._cache: OrderedDict[str, tuple[int, list[str]]] = OrderedDict()
        self._stand_ins: dict[str, str] = {}

    async def resolve(self, name: str, rules: Ruleset, asker: Asker | None = None) -> Resolution:
        """Look up a name that the rules have granted, and pin what may be used.

        Raises:
            LookupTemporarilyFailedError: no answer.
        """
        local = self._hosts().get(name, set())
        raw = sorted(local) if local else await self._lookup(name)
        kept: list[str] = []
        dropped: list[Decision] = []
        for text in raw[: 4 * MAX_ADDRESSES]:
            upstream = str(canonical(text))
            decision = judge_answer(rules, name, upstream, local=upstream in local, own=is_own(upstream), asker=asker)
            if decision.verdict == "allow" and is_stand_in(upstream):
                # Whoever answers for a name must not choose what another name's stand-in leads to.
                reason = f"{name} resolved to {upstream}, which the gateway uses for its own ends inside the cell"
                decision = Decision(verdict="deny", rule="reserved", reason=reason)
            if decision.verdict != "allow":
                dropped.append(decision)
            elif has_route(upstream) and len(kept) < MAX_ADDRESSES:
                # A family that the host cannot reach must not be offered: the guest's connect would seem to work.
                shown = self._shown(upstream)
                self._pin(shown, upstream, Pin(name=name, local=upstream in local))
                if shown not in kept:
                    kept.append(shown)
        return Resolution(exists=bool(raw), addresses=kept, dropped=dropped)

    def is_known(self, name: str) -> bool:
        """Whether a name is answered without asking anybody outside."""
        cached = self._cache.get(name)
        return cached is not None and cached[0] > mono_ns()

    async def _lookup(self, name: str) -> list[str]:
        if self.is_known(name):
            return self._cache[name][1]
        found = await self._resolver.lookup(name)
        self._cache[name] = (mono_ns() + CACHE_S * 10**9, found)
        if len(self._cache) > MAX_PINS:
            self._cache.popitem(last=False)
        return found

    def _shown(self, upstream: str) -> str:
        address = ipaddress.ip_address(upstream)
        if not address.is_loopback:
            return upstream
        if upstream not in self._stand_ins:
            number = len(self._stand_ins) + 1
            base = _STAND_IN_V4 if address.version == 4 else _STAND_IN_V6
            kind = ipaddress.IPv4Address if address.version == 4 else ipaddress.IPv6Address
            self._stand_ins[upstream] = str(kind(base + number))
        return self._stand_ins[upstream]

    def _pin(self, shown: str, upstream: str, pin: Pin) -> None:
        entry = self._pins.get(shown)
        if entry is None or entry.expires_ns < mono_ns():
            entry = self._pins[shown] = Pinned(upstream)
            if len(self._pins) > MAX_PINS:
                self._pins.popitem(last=False)
        if len(entry.names) < 256:
            entry.names[pin.name] = pin
        entry.expires_ns = mono_ns() + PIN_S * 10**9
        self._pins.move_to_end(shown)

    def pinned(self, ip: str) -> Pinned:
        """What an address (canonical text) stands for; without a pin, itself."""
        entry = self._pins.get(ip)
        if entry is None or entry.expires_ns < mono_ns():
            return Pinned(ip)
        entry.expires_ns = mono_ns() + PIN_S * 10**9
        return entry
