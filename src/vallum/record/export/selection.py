"""Which episodes are fit to learn from. Pure.

An episode is kept or left out whole: its conversations share one cell, so what one of them did to it the others saw.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vallum.record.trajectory import EpisodeTrajectories


class Exclusion(msgspec.Struct, frozen=True, kw_only=True):
    """An episode that was left out."""

    run: str
    episode: str
    reasons: list[str]


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What may stay."""

    exclude_contaminated: bool = False
    """Leave out episodes with findings or refused attempts, also those that no step could be charged with."""
    min_confidence: float = 0.0
    """Leave out episodes with a step of which a fact was charged with less than this."""

    def explain(self, episode: EpisodeTrajectories) -> list[str]:
        """Why an episode is left out; empty when it stays."""
        reasons = []
        facts = episode.containment
        if self.exclude_contaminated:
            reasons += [f"denied {one.kind} {one.target} ({one.rule}), {one.count} times" for one in facts.denials]
            if facts.denied > (named := sum(one.count for one in facts.denials)):
                reasons.append(f"{facts.denied - named} further denied attempts")
            reasons += [f"finding {one.detector} ({one.severity}): {one.title}" for one in facts.findings]
        if facts.confidence < self.min_confidence:
            reasons.append(f"a fact was charged with confidence {facts.confidence:g}, below {self.min_confidence:g}")
        return reasons

    def select(self, episodes: Iterable[EpisodeTrajectories]) -> tuple[list[EpisodeTrajectories], list[Exclusion]]:
        """(what stays, what is left out and why)."""
        kept, left_out = [], []
        for episode in episodes:
            if reasons := self.explain(episode):
                left_out.append(Exclusion(run=episode.run, episode=episode.episode, reasons=reasons))
            else:
                kept.append(episode)
        return kept, left_out
