"""Which step pays: the rule, and the ways in which an agent would have another step pay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.sensors.attribution import Holder, charge


def held(*pairs: tuple[int, int | None]) -> list[Holder]:
    return [Holder(pid, step) for pid, step in pairs]


# The truth is in the comment: who made the socket, who holds it, who connected it.
CASES = [
    # an ordinary command of step 3
    ((3, [(10, 3)]), (3, "cgroup", 1.0, 10, None)),
    # a daemon of step 1 dials while step 4 is open
    ((1, [(10, 1)]), (1, "cgroup", 1.0, 10, None)),
    # attack: the shell makes a socket in step 1 and connects it in step 5: step 5 pays, and the stamp is kept
    ((1, [(10, 5)]), (5, "cgroup", 1.0, 10, 1)),
    # attack: step 5 hands its socket to a daemon of step 1, which connects: the daemon's step pays, the stamp names 5
    ((5, [(10, 1)]), (1, "cgroup", 1.0, 10, 5)),
    # parent and child of one command: the one that started first is named
    ((3, [(10, 3), (11, 3)]), (3, "cgroup", 1.0, 10, None)),
    # attack: the shell makes a socket in step 1, an innocent child of step 3 inherits it, the shell connects in step 5:
    # step 3 must not pay
    ((1, [(10, 5), (11, 3)]), (1, "socket", 0.5, 10, None)),
    # attack: a daemon of step 1 dials while the shell, now in step 5, still has its copy: step 5 must not pay
    ((1, [(10, 1), (11, 5)]), (1, "socket", 0.5, 10, None)),
    # attack: step 5 connects with a copy kept by a daemon of step 1 so that 1 looks guilty: the maker is 5
    ((5, [(10, 1), (11, 5)]), (5, "socket", 0.5, 11, None)),
    # the stamp says nothing: the earliest holder, and little confidence
    ((None, [(10, 4), (11, 2)]), (2, "cgroup", 0.3, 11, None)),
    # it closed at once
    ((4, []), (4, "socket", 0.8, None, None)),
    # the only holder is in no step (it is ending): the maker
    ((4, [(10, None)]), (4, "socket", 0.5, 10, None)),
    # a holder of no known step beside one of a known step: that one, with less confidence
    ((4, [(10, None), (11, 4)]), (4, "cgroup", 0.5, 11, None)),
    # nothing at all
    ((None, []), (None, "netns", 0.5, None, None)),
    ((None, [(10, None)]), (None, "netns", 0.5, 10, None)),
]


@pytest.mark.parametrize(("given_facts", "expected"), CASES)
def test_rule(given_facts, expected):
    stamp, holders = given_facts
    outcome = charge(stamp, held(*holders))
    said = (
        outcome.step,
        outcome.attribution.method,
        outcome.attribution.confidence,
        outcome.pid,
        outcome.socket_step,
    )
    assert said == expected


def test_lineage_keeps_its_name_and_its_doubt():
    outcome = charge(None, [Holder(10, 2, "lineage", 0.7)])
    assert (outcome.step, outcome.attribution.method, outcome.attribution.confidence) == (2, "lineage", 0.7)


def test_doubt_about_the_socket_is_doubt_about_the_charge():
    assert charge(3, held((10, 3)), is_certain=False).attribution.confidence == 0.5


STEPS = st.none() | st.integers(0, 6)


@given(STEPS, st.lists(st.tuples(st.integers(1, 99), STEPS), max_size=6), st.booleans())
def test_only_who_took_part_can_be_charged(stamp, holders, is_certain):
    outcome = charge(stamp, held(*holders), is_certain=is_certain)
    assert outcome.step in {stamp, *(step for _, step in holders)}
    if outcome.attribution.confidence == 1.0:
        assert {step for _, step in holders} == {outcome.step}
    assert outcome.pid is None or outcome.pid in {pid for pid, _ in holders}
    # A step that neither made the socket nor is the only one to hold it pays only where the kernel gave no stamp.
    if stamp is not None and len({s for _, s in holders if s is not None}) > 1:
        assert outcome.step == stamp
