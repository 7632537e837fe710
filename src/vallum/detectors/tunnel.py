"""Tunnels and ways back in: ssh's forwards, SSH where it should not be, tunnelling programs and services.

Covered: -R -L -D -w -W in clusters and as ``-o`` options, before and behind the destination; ssh under another name (by
its first bytes); the usual tunnelling programs and services by name; SOCKS.
Not covered: forwards in a configuration file; ``ssh -O forward`` is seen, a multiplexing master's own protocol is not;
tunnels inside a granted TLS connection.
"""

from __future__ import annotations

from vallum.core.events import DnsQuery, Flow, ProcessStarted, Record
from vallum.core.text import show
from vallum.detectors import commandline, hosts
from vallum.detectors.base import FindingDraft, draft, name_process, name_target, outcome
from vallum.detectors.catalog import Rule, load

_SSH_NAMES = frozenset({"ssh", "slogin", "autossh", "dbclient", "plink"})
_SSH_PORT = 22
_FORWARDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tunnel.ssh-reverse", "R", ("remoteforward",)),
    ("tunnel.ssh-dynamic", "D", ("dynamicforward",)),
    ("tunnel.ssh-device", "w", ("tunnel", "tunneldevice")),
    ("tunnel.ssh-local", "L", ("localforward",)),
    ("tunnel.ssh-relay", "W", ("proxycommand",)),
)


class TunnelDetector:
    """See the module. Keeps no state: every record stands for itself."""

    name = "tunnel"

    def __init__(self) -> None:
        self._rules = load("tunnel")
        self._clients = self._rules["tunnel.ssh-other-program"].words("clients")
        self._program = self._rules["tunnel.program"]
        self._names = self._program.words("names")
        self._harmless = self._program.words("harmless")
        self._service = self._rules["tunnel.service"]
        self._domains = self._service.words("domains")

    def observe(self, record: Record) -> list[FindingDraft]:
        """Drafts of this record alone."""
        event = record.event
        if isinstance(event, ProcessStarted):
            return self._see_process(record.id, event)
        if isinstance(event, Flow):
            return self._see_flow(record.id, event)
        if isinstance(event, DnsQuery) and hosts.matching_domain(event.qname, self._domains):
            what = f"{name_process(event.process)} asked for {show(event.qname, 80)}; {event.verdict} by {show(event.rule, 60)}"
            return [draft(self._service, event, what, [record.id], severity=self._service.severity_of(event.verdict))]
        return []

    def _see_process(self, number: int, event: ProcessStarted) -> list[FindingDraft]:
        process = event.process
        called = commandline.names(process)
        if _SSH_NAMES.intersection(called):
            call = commandline.parse_ssh(process.argv)
            shown = show(" ".join(process.argv), 160)
            return [
                draft(self._rules[rule], event, f"{name_process(process)}: {shown}", [number])
                for rule, flag, keywords in _FORWARDS
                if call.asks(flag, *keywords)
            ]
        named = self._names.intersection(called)
        is_tunnel = bool(named) or ("code" in called and process.argv[1:2] == ["tunnel"])
        asked = [each.lower() for each in process.argv[1:]]
        if is_tunnel and not (asked and all(each in self._harmless for each in asked)):
            what = f"{name_process(process)} is a tunnelling program: {show(' '.join(process.argv), 160)}"
            return [draft(self._program, event, what, [number])]
        return []

    def _see_flow(self, number: int, event: Flow) -> list[FindingDraft]:
        told = f"{name_process(event.process)} to {name_target(event)}; {outcome(event)}"
        found = []
        if event.dst_host is not None and hosts.matching_domain(event.dst_host, self._domains):
            severity = self._service.severity_of(event.verdict)
            found.append(
                draft(self._service, event, f"a tunnelling service dialled by {told}", [number], severity=severity)
            )
        if event.protocol == "socks":
            rule = self._rules["tunnel.socks"]
            severity = rule.severity_of(event.verdict)
            found.append(draft(rule, event, f"SOCKS spoken by {told}", [number], severity=severity))
        if event.protocol == "ssh" and event.verdict != "allow":
            found += self._see_ssh(number, event, told)
        return found

    def _see_ssh(self, number: int, event: Flow, told: str) -> list[FindingDraft]:
        """Refused SSH. What was granted for SSH is the operator's choice and no finding."""
        rule: Rule
        if event.dst_port != _SSH_PORT:
            rule = self._rules["tunnel.ssh-elsewhere"]
            return [draft(rule, event, f"SSH spoken by {told}", [number])]
        if event.process is not None and not self._clients.intersection(commandline.names(event.process)):
            rule = self._rules["tunnel.ssh-other-program"]
            return [draft(rule, event, f"SSH spoken by {told}", [number])]
        return []
