"""What a detector is: a pure fold over one run's records that gives drafts of findings.

Same records, same drafts: no clock, no I/O, no randomness, bounded memory. What the guest says about itself (argv, host
names, first bytes) is a reason to look closer and is shown escaped; kernel facts and verdicts carry the finding.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

import msgspec

from vallum.core.events import Event, Flow, Process, Record
from vallum.core.scope import Attribution, Scope
from vallum.core.text import show
from vallum.core.verdict import Severity
from vallum.detectors.catalog import Rule

SEVERITIES: tuple[Severity, ...] = ("info", "low", "medium", "high", "critical")
EVIDENCE_MAX = 32


class FindingDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A claim; the bank gives it as a Finding unless the same was said before with at least this severity."""

    rule: Rule
    severity: Severity
    summary: str
    """One sentence for a person; text of the guest in it is already safe to show."""
    evidence: list[int]
    """Ids of records, oldest first, at most ``EVIDENCE_MAX``."""
    key: str
    """What is the same finding: drafts of one rule, step and key are one. From a small set, never free text of the guest,
    so that a guest cannot multiply findings."""
    scope: Scope
    attribution: Attribution


class Detector(Protocol):
    """One family of findings."""

    name: str

    def observe(self, record: Record) -> list[FindingDraft]:
        """Take the next record of a run, in order, and give what it completes. Records of several runs may alternate."""
        ...


def draft(
    rule: Rule,
    event: Event,
    summary: str,
    evidence: list[int],
    *,
    key: str = "",
    severity: Severity | None = None,
) -> FindingDraft:
    """A draft charged to whom ``event`` is charged to."""
    return FindingDraft(
        rule=rule,
        severity=severity or rule.severity,
        summary=summary,
        evidence=clip(evidence),
        key=key,
        scope=event.scope,
        attribution=event.attribution,
    )


def clip(evidence: list[int]) -> list[int]:
    """At most ``EVIDENCE_MAX`` ids: the first and the last half."""
    half = EVIDENCE_MAX // 2
    return evidence if len(evidence) <= EVIDENCE_MAX else [*evidence[:half], *evidence[-half:]]


def name_process(process: Process | None) -> str:
    """A process for a person: what it is by the kernel, and its number."""
    if process is None:
        return "a process that is not known"
    what = process.exe or (process.argv[0] if process.argv else "")
    return f"{show(what, 80)} (pid {process.pid})" if what else f"pid {process.pid}"


def name_target(flow: Flow) -> str:
    """Where a flow went, for a person."""
    host = f"{show(flow.dst_host, 80)} ({flow.dst_ip})" if flow.dst_host else flow.dst_ip
    return f"{host} port {flow.dst_port}"


def outcome(flow: Flow) -> str:
    """What became of a flow, for a person."""
    if flow.verdict == "allow":
        return f"allowed by {show(flow.rule, 60)}, {flow.bytes_out} bytes left"
    return f"refused by {show(flow.rule, 60)}, {flow.bytes_out} bytes left"


K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V], Generic[K, V]):
    """A mapping that forgets what was used longest ago beyond ``limit`` entries: bounded memory under a hostile guest."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def put(self, key: K, value: V) -> V:
        """Set, and forget the oldest beyond the limit."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self._limit:
            self.popitem(last=False)
        return value
