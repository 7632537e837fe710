"""Figures of a bench: what was measured how often, its percentiles, and how peers compare. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

OURS = "vallum"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one subject. Either ``missing`` is told, or there are numbers."""

    what: str
    subject: str
    unit: str
    repetitions: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    missing: str = ""
    """Why there is no number, with what to do."""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What one bench found, side by side in one run."""

    name: str
    machine: str
    figures: list[Figure]
    notes: list[str]


def summarise(what: str, subject: str, unit: str, samples: Sequence[float]) -> Figure:
    """The figure of a list of samples (at least one).

    Percentiles are nearest-rank, so they are samples that occurred: 95 of 100 were at least as good as
    the p95. Good is low, but for a rate (a unit per second).
    """
    ordered = sorted(samples, reverse=unit.endswith("/s"))

    def rank(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]

    return Figure(
        what=what,
        subject=subject,
        unit=unit,
        repetitions=len(ordered),
        p50=statistics.median_low(ordered),
        p95=rank(0.95),
        p99=rank(0.99),
    )


def missing(what: str, subject: str, unit: str, why: str) -> Figure:
    """The figure of a peer that is not there."""
    return Figure(what=what, subject=subject, unit=unit, missing=why)


def ratio(figure: Figure, figures: Sequence[Figure]) -> float | None:
    """The median as a multiple of ours for the same thing; None where one of them is missing."""
    ours = next((other for other in figures if other.what == figure.what and other.subject == OURS), None)
    if ours is None or not ours.p50 or figure.p50 is None:
        return None
    return figure.p50 / ours.p50
