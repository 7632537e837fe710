"""Percentiles are samples that occurred; a missing peer is told, not left out."""

from hypothesis import given
from hypothesis import strategies as st

from vallum.arena.figures import OURS, missing, ratio, summarise


@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=300))
def test_percentiles_are_ordered_samples(samples):
    figure = summarise("x", OURS, "ms", samples)
    assert {figure.p50, figure.p95, figure.p99} <= set(samples)
    assert figure.p50 <= figure.p95 <= figure.p99 <= max(samples)
    assert figure.repetitions == len(samples)
    assert sum(sample <= figure.p95 for sample in samples) >= 0.95 * len(samples)


def test_nearest_rank():
    figure = summarise("x", OURS, "ms", [float(n) for n in range(1, 101)])
    assert (figure.p50, figure.p95, figure.p99) == (50.0, 95.0, 99.0)


def test_of_a_rate_the_slow_end_is_told():
    figure = summarise("x", OURS, "MB/s", [float(n) for n in range(1, 101)])
    assert (figure.p50, figure.p95, figure.p99) == (50.0, 6.0, 2.0)


def test_ratios_are_to_ours_for_the_same_thing():
    ours, theirs = summarise("x", OURS, "ms", [2.0]), summarise("x", "peer", "ms", [5.0])
    assert ratio(theirs, [ours, theirs]) == 2.5
    assert ratio(theirs, [theirs]) is None
    assert ratio(summarise("y", "peer", "ms", [5.0]), [ours]) is None
    assert ratio(missing("x", "peer", "ms", "not installed: apt-get install peer"), [ours]) is None
