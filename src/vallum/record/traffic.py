"""Attempts to communicate that are alike, as one entry: a sweep of a network is one line and not 254.

Pure and bounded: however many attempts a guest makes, and however many names it invents, an entry
keeps counts, extremes and a sample.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from vallum.core.events import DnsQuery, Flow, HttpRequest, McpCall, ModelCall, PacketDropped, Process, SshSession
from vallum.core.scope import Attribution

KEPT_TARGETS = 512
KEPT_TIMES = 400
KEPT_IDS = 20
KEPT_ENTRIES = 300
"""Of one step; what is beyond goes into one entry a rule."""

Kind = Literal["flow", "dns", "packet", "request"]


@dataclass
class Span:
    """When something lasted, in nanoseconds since the run began. ``end_ns`` is None while it does."""

    start_ns: int
    end_ns: int | None = None


@dataclass
class Traffic:
    """Attempts of one step that are alike in process, destination, protocol and rule."""

    kind: Kind
    is_denied: bool
    rule: str
    reason: str
    protocol: str
    host: str | None
    """Name that was asked for; for DNS the last two labels of it. None when addresses were dialled."""
    process: Process | None
    """Of the first attempt."""
    attribution: Attribution
    first_id: int
    count: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    late: int = 0
    """How many were made after their step had closed: by what the step left running."""
    first_bytes: str = ""
    ids: list[int] = field(default_factory=list)
    """Of the first events."""
    spans: list[Span] = field(default_factory=list)
    targets: dict[str, int] = field(default_factory=dict)
    """``address:port`` or DNS name -> attempts."""
    more_targets: int = 0
    """Attempts at targets beyond those kept."""
    socket_steps: set[int] = field(default_factory=set)
    """Steps that the socket was made in, where another step is charged."""
    pids: set[int] = field(default_factory=set)
    decisions_ns: list[int] = field(default_factory=list)

    @property
    def decision_ns(self) -> int | None:
        """Median time from the attempt to the verdict; None where it died in the kernel without one."""
        return sorted(self.decisions_ns)[len(self.decisions_ns) // 2] if self.decisions_ns else None

    @property
    def slowest_ns(self) -> int | None:
        """Longest time to the verdict."""
        return max(self.decisions_ns, default=None)

    @property
    def first_ns(self) -> int:
        """When the first one was made, since the run began."""
        return self.spans[0].start_ns

    @property
    def target(self) -> str:
        """The destination as a person would say it."""
        return describe_targets(self)

    def add(self, number: int, at_ns: int, target: str, process: Process | None, *, is_late: bool) -> Span:
        """Count one more attempt."""
        self.count += 1
        self.late += is_late
        if len(self.ids) < KEPT_IDS:
            self.ids.append(number)
        if target in self.targets or len(self.targets) < KEPT_TARGETS:
            self.targets[target] = self.targets.get(target, 0) + 1
        else:
            self.more_targets += 1
        if process is not None and len(self.pids) < KEPT_TARGETS:
            self.pids.add(process.pid)
        span = Span(at_ns)
        if len(self.spans) < KEPT_TIMES:
            self.spans.append(span)
        return span

    def add_decision(self, decision_ns: int) -> None:
        """Note how long the verdict took."""
        if len(self.decisions_ns) < KEPT_TIMES:
            self.decisions_ns.append(decision_ns)


Entries = dict[tuple[object, ...], Traffic]


def file_flow(entries: Entries, number: int, event: Flow, at_ns: int, *, is_late: bool) -> tuple[Traffic, Span]:
    """Put a decided flow where it belongs."""
    is_denied = event.state == "denied"
    key = (
        "flow",
        is_denied,
        *_who(event.process),
        event.dst_host,
        event.protocol,
        event.rule,
        event.attribution.method,
    )
    entry = _entry(
        entries,
        key,
        Traffic(
            kind="flow",
            is_denied=is_denied,
            rule=event.rule,
            reason=event.reason,
            protocol=event.protocol,
            host=event.dst_host,
            process=event.process,
            attribution=event.attribution,
            first_id=number,
        ),
    )
    span = entry.add(number, at_ns, _endpoint(event.dst_ip, event.dst_port), event.process, is_late=is_late)
    entry.add_decision(event.decision_ns)
    entry.first_bytes = entry.first_bytes or event.first_bytes
    if event.socket_step is not None and len(entry.socket_steps) < KEPT_IDS:
        entry.socket_steps.add(event.socket_step)
    return entry, span


def file_query(entries: Entries, number: int, event: DnsQuery, at_ns: int, *, is_late: bool) -> Traffic:
    """Put a DNS query where it belongs."""
    is_denied = event.verdict != "allow"
    zone = ".".join(event.qname.rstrip(".").split(".")[-2:])
    key = ("dns", is_denied, *_who(event.process), zone, event.rule, event.attribution.method)
    entry = _entry(
        entries,
        key,
        Traffic(
            kind="dns",
            is_denied=is_denied,
            rule=event.rule,
            reason=event.reason,
            protocol="dns",
            host=zone,
            process=event.process,
            attribution=event.attribution,
            first_id=number,
        ),
    )
    entry.add(number, at_ns, f"{event.qname.rstrip('.')} {event.qtype}", event.process, is_late=is_late)
    entry.add_decision(event.decision_ns)
    return entry


Refused = HttpRequest | SshSession | ModelCall | McpCall


def file_refusal(entries: Entries, number: int, event: Refused, at_ns: int, *, is_late: bool) -> Traffic:
    """Put a request that was read and refused where it belongs; its connection has an entry of its own."""
    protocol: str
    host: str | None
    if isinstance(event, HttpRequest):
        protocol, host, target = event.scheme, event.host, f"{event.method} {event.host}:{event.port}{event.path}"
    elif isinstance(event, SshSession):
        protocol, host, target = "ssh", event.host, f"{event.host}:{event.port} {event.wants} {event.command}".rstrip()
    elif isinstance(event, ModelCall):
        protocol, host, target = "model", event.upstream or None, f"model {event.model}"
    else:
        protocol, host, target = "mcp", event.server, f"{event.server} {event.tool}"
    key = ("request", protocol, host, event.rule, event.attribution.method)
    entry = _entry(
        entries,
        key,
        Traffic(
            kind="request",
            is_denied=True,
            rule=event.rule,
            reason=event.reason,
            protocol=protocol,
            host=host,
            process=None,
            attribution=event.attribution,
            first_id=number,
        ),
    )
    entry.add(number, at_ns, target, None, is_late=is_late)
    return entry


def file_packet(entries: Entries, number: int, event: PacketDropped, at_ns: int, *, is_late: bool) -> Traffic:
    """Put a dropped packet where it belongs."""
    key = ("packet", event.protocol, event.rule, event.attribution.method, event.dst_port)
    entry = _entry(
        entries,
        key,
        Traffic(
            kind="packet",
            is_denied=event.verdict != "allow",
            rule=event.rule,
            reason="neither TCP nor DNS: no such packet leaves a cell",
            protocol=event.protocol,
            host=None,
            process=None,
            attribution=event.attribution,
            first_id=number,
        ),
    )
    entry.add(number, at_ns, _endpoint(event.dst_ip, event.dst_port), None, is_late=is_late)
    return entry


def _entry(entries: Entries, key: tuple[object, ...], fresh: Traffic) -> Traffic:
    found = entries.get(key)
    if found is None and len(entries) >= KEPT_ENTRIES:
        key = ("more", fresh.kind, fresh.is_denied, fresh.rule)
        fresh.process, fresh.host = None, None
        found = entries.get(key)
    if found is None:
        found = entries[key] = fresh
    return found


def _who(process: Process | None) -> tuple[object, ...]:
    return (process.exe, tuple(process.argv)) if process is not None else (None, None)


def _endpoint(ip: str, port: int | None) -> str:
    if port is None:
        return ip
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def describe_targets(entry: Traffic) -> str:
    """``pool.test:3333 (198.51.100.7)``, ``254 addresses in 10.0.0.0/24, port 22`` or ``31 names under x.test``."""
    if entry.kind == "dns":
        names = list(entry.targets)
        if len(names) == 1:
            return names[0]
        more = "more than " if entry.more_targets else ""
        questions = {name.rpartition(" ")[0] for name in names}
        if len(questions) == 1:
            return f"{questions.pop()} {'/'.join(sorted({name.rpartition(' ')[2] for name in names}))}"
        return f"{more}{len(questions)} names under {entry.host}"
    endpoints = [_split_endpoint(target) for target in entry.targets]
    ips = list(dict.fromkeys(ip for ip, _ in endpoints))
    ports = list(dict.fromkeys(port for _, port in endpoints if port))
    port = f":{ports[0]}" if len(ports) == 1 else ""
    if entry.host:
        return f"{entry.host}{port}{_name_ports(ports)} ({_name_addresses(ips, entry)})"
    if len(ips) == 1:
        address = f"[{ips[0]}]" if port and ":" in ips[0] else ips[0]
        return f"{address}{port}{_name_ports(ports)}"
    single = f", port {ports[0]}" if len(ports) == 1 else ""
    return f"{_name_addresses(ips, entry)}{single}{_name_ports(ports)}"


def _split_endpoint(target: str) -> tuple[str, str]:
    if target.startswith("["):
        ip, _, port = target[1:].partition("]:")
        return ip, port
    if target.count(":") == 1:
        ip, _, port = target.partition(":")
        return ip, port
    return target, ""


def _name_ports(ports: list[str]) -> str:
    if len(ports) < 2:
        return ""
    return f", ports {', '.join(ports[:6])}{', ...' if len(ports) > 6 else ''}"


def _name_addresses(ips: list[str], entry: Traffic) -> str:
    if len(ips) == 1:
        return ips[0]
    more = "more than " if entry.more_targets else ""
    return f"{more}{len(ips)} addresses{_common_network(ips)}"


def _common_network(ips: list[str]) -> str:
    try:
        addresses = [ipaddress.ip_address(ip) for ip in ips]
    except ValueError:
        return ""
    if len({address.version for address in addresses}) > 1:
        return ""
    first, last = min(map(int, addresses)), max(map(int, addresses))
    width = addresses[0].max_prefixlen
    prefix = width - (first ^ last).bit_length()
    if prefix < (8 if width == 32 else 32):
        return ""
    base = first >> (width - prefix) << (width - prefix)
    network = ipaddress.ip_network((base, prefix)) if width == 32 else ipaddress.IPv6Network((base, prefix))
    return f" in {network}"
