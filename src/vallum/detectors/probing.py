"""Looking around: metadata services, and fan-out over hosts, ports and names.

Counts are of *different* targets, so that a client that tries again and again does not look like a scan, and only of those
dialled by address, so that names of ordinary downloads do not either.

Covered: TCP, UDP and ICMP; a scan in one step (within a minute) and a slow one over the steps of an episode; IPv4 written
as IPv6; names guessed under one domain, also by PTR.
Not covered: looking at a handful of hosts; hosts of the cell's own loopback, where nothing but the guest lives.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from vallum.core.events import DnsQuery, EpisodeEnded, Event, Flow, PacketDropped, Record
from vallum.core.text import show
from vallum.core.verdict import Severity
from vallum.detectors import hosts
from vallum.detectors.base import FindingDraft, Recent, draft, name_process, name_target, outcome
from vallum.detectors.catalog import Rule, load

_NS = 1_000_000_000
_EPISODES = 256
_GROUPS = 512
_TARGETS = 512
_CHATTER = {("udp", 443), ("udp", 123)}
"""Packets that clients send by themselves and then do without: QUIC and NTP."""

_Episode = tuple[str, str | None]


@dataclass(slots=True)
class _Group:
    """Different targets of one kind: target -> (when last, first record)."""

    targets: Recent[Hashable, tuple[int, int]] = field(default_factory=lambda: Recent(_TARGETS))

    def add(self, target: Hashable, now_ns: int, number: int, window_ns: int | None) -> int:
        """How many different targets there were within the window, 0 when this one was counted already."""
        before = self.targets.get(target)
        self.targets.put(target, (now_ns, before[1] if before else number))
        if window_ns is not None:
            while self.targets:
                oldest = next(iter(self.targets))
                if now_ns - self.targets[oldest][0] <= window_ns:
                    break
                del self.targets[oldest]
        return len(self.targets) if before is None else 0

    def evidence(self) -> list[int]:
        """Records that support the count."""
        return sorted(first for _, first in self.targets.values())


class ProbingDetector:
    """See the module."""

    name = "probing"

    def __init__(self) -> None:
        rules = load("probing")
        self._metadata = rules["probing.metadata"]
        self._hosts = rules["probing.hosts"]
        self._ports = rules["probing.ports"]
        self._slow = rules["probing.slow"]
        self._names = rules["probing.names"]
        self._addresses = frozenset(hosts.plain_address(each) for each in self._metadata.words("addresses"))
        self._domains = self._metadata.words("domains")
        self._episodes: Recent[_Episode, Recent[Hashable, _Group]] = Recent(_EPISODES)

    def observe(self, record: Record) -> list[FindingDraft]:
        """Drafts that this record completes."""
        event = record.event
        if isinstance(event, Flow) and event.state != "closed":
            return self._see_flow(record.id, event)
        if isinstance(event, PacketDropped):
            return self._see_packet(record.id, event)
        if isinstance(event, DnsQuery):
            return self._see_query(record.id, event)
        if isinstance(event, EpisodeEnded):
            self._episodes.pop((event.scope.run, event.scope.episode), None)
        return []

    def _see_flow(self, number: int, event: Flow) -> list[FindingDraft]:
        address = hosts.plain_address(event.dst_ip)
        is_refused = event.verdict != "allow"
        found = []
        if address in self._addresses or (event.dst_host and hosts.matching_domain(event.dst_host, self._domains)):
            what = f"{name_process(event.process)} to {name_target(event)}; {outcome(event)}"
            severity = self._metadata.severity_of(event.verdict)
            found.append(
                draft(self._metadata, event, what, [number], key=self._metadata_key(address), severity=severity)
            )
        elif event.dst_host is None:
            found += self._fan_out(number, event, "tcp", address, event.dst_port, is_refused=is_refused)
        return found

    def _see_packet(self, number: int, event: PacketDropped) -> list[FindingDraft]:
        address = hosts.plain_address(event.dst_ip)
        if address in self._addresses:
            what = f"a {event.protocol} packet to {address}; it died in the cell"
            return [draft(self._metadata, event, what, [number], key=self._metadata_key(address))]
        is_chatter = (event.protocol, event.dst_port) in _CHATTER and not hosts.is_private(address)
        if hosts.is_multicast(address) or is_chatter:
            return []
        return self._fan_out(number, event, event.protocol, address, event.dst_port, is_refused=True)

    def _see_query(self, number: int, event: DnsQuery) -> list[FindingDraft]:
        if hosts.matching_domain(event.qname, self._domains):
            what = f"{name_process(event.process)} asked for {show(event.qname, 80)}; {event.verdict} by {show(event.rule, 60)}"
            severity = self._metadata.severity_of(event.verdict)
            return [draft(self._metadata, event, what, [number], key="name", severity=severity)]
        if event.verdict == "allow":
            return []
        above = hosts.parent(event.qname)
        count, group_seen = self._count(
            event, (self._names.id, event.scope.step, above), hosts.normal(event.qname), number, self._names
        )
        reached = _reached(self._names, "refused", count)
        if reached is None:
            return []
        what = f"{count} different names under {show(above, 80)} within a minute; all refused"
        return [draft(self._names, event, what, group_seen.evidence(), severity=reached)]

    def _fan_out(
        self,
        number: int,
        event: Flow | PacketDropped,
        protocol: str,
        address: str,
        port: int | None,
        *,
        is_refused: bool,
    ) -> list[FindingDraft]:
        kind = "refused" if is_refused else "any"
        step = event.scope.step
        said = "all refused" if is_refused else "allowed"
        found = []
        # Hosts are counted over all ports: one port a host, or ports in random order, are scans, too.
        for rule, group, target, told in (
            (self._hosts, None, address, "addresses"),
            (self._ports, (protocol, address), port, f"{protocol} ports of {address}"),
        ):
            count, group_seen = self._count(event, (rule.id, kind, step, group), target, number, rule)
            if (severity := _reached(rule, kind, count)) is not None:
                what = f"{count} different {told} within a minute; {said}"
                found.append(draft(rule, event, what, group_seen.evidence(), severity=severity))
        episode = self._groups_of(event)
        scanned = (self._slow.id, "scanned", step)
        if found:
            episode.put(scanned, _Group())
        # What a fast scan dialled was said already: only the rest adds up to a slow one.
        if is_refused and hosts.is_private(address) and scanned not in episode:
            count, group_seen = self._count(event, (self._slow.id,), (protocol, address, port), number, self._slow)
            if (severity := _reached(self._slow, kind, count)) is not None:
                what = f"{count} different private targets over the episode; all refused"
                found.append(draft(self._slow, event, what, group_seen.evidence(), severity=severity))
        return found

    def _count(
        self, event: Flow | PacketDropped | DnsQuery, group: Hashable, target: Hashable, number: int, rule: Rule
    ) -> tuple[int, _Group]:
        groups = self._groups_of(event)
        kept = groups.put(group, groups.get(group) or _Group())
        window = next(iter(rule.numbers("window_s")), None)
        return kept.add(target, event.mono_ns, number, window * _NS if window else None), kept

    def _groups_of(self, event: Event) -> Recent[Hashable, _Group]:
        episode = (event.scope.run, event.scope.episode)
        groups = self._episodes.get(episode)
        return groups if groups is not None else self._episodes.put(episode, Recent(_GROUPS))

    def _metadata_key(self, address: str) -> str:
        return address if address in self._addresses else "name"


def _reached(rule: Rule, kind: str, count: int) -> Severity | None:
    """Severity when ``count`` has just come to a threshold: the rule's at the first, ``high`` at the second.

    Counts rise one at a time, so no threshold is passed unseen, and a flood beyond them costs nothing.
    """
    first, second = sorted(rule.numbers(kind))
    return rule.severity if count == first else "high" if count == second else None
