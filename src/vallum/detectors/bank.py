"""All detectors over one stream of records: each finding once, and a detector that fails is a finding itself.

The node feeds it what it has just appended and appends what it gives; a replay feeds it a whole ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vallum.core.events import EpisodeEnded, Finding, Record
from vallum.core.scope import BY_NODE, Scope
from vallum.core.text import show
from vallum.core.verdict import Severity
from vallum.detectors.base import SEVERITIES, Detector, FindingDraft, Recent, clip
from vallum.detectors.mining import MiningDetector
from vallum.detectors.probing import ProbingDetector
from vallum.detectors.tunnel import TunnelDetector

DETECTOR_FAILED = "detector-failed"
_REMEMBERED = 16384
_Key = tuple[str, str | None, int | None, str, str]
"""(run, episode, step, rule, key)."""


def make_detectors() -> list[Detector]:
    """Every built-in detector, fresh."""
    return [MiningDetector(), TunnelDetector(), ProbingDetector()]


class DetectorBank:
    """Feeds every detector and says each thing once.

    A finding is given at its first evidence, and once more each time that its severity rises, then with all evidence so far.
    """

    def __init__(
        self, detectors: Sequence[Detector] | None = None, clock: Callable[[], tuple[int, int]] | None = None
    ) -> None:
        """``clock`` gives (wall, monotonic) nanoseconds for findings; without it they carry the times of the record that
        completed them, so that a replay gives the very same findings."""
        self._detectors = list(detectors) if detectors is not None else make_detectors()
        self._clock = clock
        self._said: Recent[_Key, tuple[Severity, list[int]]] = Recent(_REMEMBERED)
        self.failed: set[str] = set()
        """Names of detectors that have failed: what they would have found is not known. The node fails closed on it."""

    def observe(self, record: Record) -> list[Finding]:
        """Findings that ``record`` completes, worst first. Findings themselves are not looked at."""
        if isinstance(record.event, Finding):
            return []
        found = []
        for detector in self._detectors:
            try:
                drafts = detector.observe(record)
            except Exception as error:  # noqa: BLE001 - a judge's boundary: any failure is said, and the node denies
                finding = self._fail(detector, record, error)
                found += [finding] if finding else []
                continue
            found += [finding for each in drafts if (finding := self._say(each, record)) is not None]
        if isinstance(record.event, EpisodeEnded):
            self._forget(record.event.scope)
        return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))

    def _say(self, given: FindingDraft, record: Record) -> Finding | None:
        key = _key(given.scope, given.rule.id, given.key)
        before = self._said.get(key)
        if before is not None and SEVERITIES.index(given.severity) <= SEVERITIES.index(before[0]):
            return None
        evidence = clip(sorted({*(before[1] if before else ()), *given.evidence}))
        self._said.put(key, (given.severity, evidence))
        t_ns, mono_ns = self._clock() if self._clock else (record.event.t_ns, record.event.mono_ns)
        return Finding(
            t_ns=t_ns,
            mono_ns=mono_ns,
            scope=given.scope,
            attribution=given.attribution,
            detector=given.rule.id,
            title=given.rule.title,
            severity=given.severity,
            attack=given.rule.attack,
            summary=given.summary,
            evidence=evidence,
        )

    def _fail(self, detector: Detector, record: Record, error: Exception) -> Finding | None:
        self.failed.add(detector.name)
        key = _key(record.event.scope, DETECTOR_FAILED, detector.name)
        if key in self._said:
            return None
        self._said.put(key, ("high", [record.id]))
        t_ns, mono_ns = self._clock() if self._clock else (record.event.t_ns, record.event.mono_ns)
        return Finding(
            t_ns=t_ns,
            mono_ns=mono_ns,
            scope=record.event.scope,
            attribution=BY_NODE,
            detector=DETECTOR_FAILED,
            title="A detector failed",
            severity="high",
            attack=[],
            summary=f"{detector.name} failed on event {record.id} ({type(error).__name__}: {show(str(error), 120)});"
            " what it would have found is not known",
            evidence=[record.id],
        )

    def _forget(self, scope: Scope) -> None:
        ended = [key for key in self._said if key[:2] == (scope.run, scope.episode)]
        for key in ended:
            del self._said[key]


def _key(scope: Scope, rule: str, key: str) -> _Key:
    return (scope.run, scope.episode, scope.step, rule, key)


def run_all(records: Iterable[Record]) -> list[Finding]:
    """Findings of a whole ledger, in order: the same each time, and the same as the node gave (but for their times)."""
    bank = DetectorBank()
    return [finding for record in records for finding in bank.observe(record)]
