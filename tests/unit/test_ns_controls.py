"""Which controls stop a node, which only lower what it promises, and how doctor sums up."""

import pytest

from vallum.arena.attacks.base import Outcome
from vallum.arena.attacks.outside import compare
from vallum.cli.doctor import judge
from vallum.core.errors import ControlMissing
from vallum.sandbox.base import Doors
from vallum.sandbox.ns.controls import ESSENTIAL, check_essential, describe
from vallum.sandbox.ns.wire import count_inodes

DOORS = Doors(tcp=[], dns=[], packets=None, diag=None)


def test_all_that_is_essential_held():
    check_essential(0)


@pytest.mark.parametrize("bit", range(len(ESSENTIAL)))
def test_each_essential_control_stops(bit):
    name, what, remedy = ESSENTIAL[bit]
    with pytest.raises(ControlMissing) as caught:
        check_essential(1 << bit)
    assert all(part in str(caught.value) for part in (name, what, remedy))


def test_several_and_unknown_bits_stop_too():
    with pytest.raises(ControlMissing, match=r"cell\.capabilities.*cell\.proc"):
        check_essential(0b1001)
    with pytest.raises(ControlMissing, match="could not be tried"):
        check_essential(1 << 7)


@pytest.mark.parametrize(
    ("abi", "state"), [(0, "degraded"), (2, "degraded"), (5, "degraded"), (6, "enforced"), (9, "enforced")]
)
def test_landlock_by_abi(abi, state):
    tiers = describe(has_range=True, why_not="", doors=DOORS, landlock=abi)
    assert tiers["cell.landlock"].partition(":")[0] == state
    assert tiers["cell.users"] == "enforced"
    assert tiers["net.packets"].startswith("degraded")
    assert {name for name, _, _ in ESSENTIAL} <= tiers.keys()


def outcome(held):
    return Outcome(family="f", name="n", actor="agent", held=held)


@pytest.mark.parametrize(
    ("controls", "held", "worst"),
    [
        ([("enforced", True)], True, "enforced"),
        ([("enforced", True), ("degraded", False)], True, "degraded"),
        ([("missing", False)], True, "degraded"),
        ([("missing", True)], True, "missing"),
        ([("enforced", True)], False, "missing"),
    ],
)
def test_doctor_s_judgement(controls, held, worst):
    rows = [{"control": "c", "state": state, "essential": essential} for state, essential in controls]
    assert judge(rows, [outcome(True), outcome(held)]) == worst


def test_what_changed_outside():
    assert compare({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    (changed,) = compare({"a": "1", "b": "2"}, {"a": "1", "b": "3"})
    assert changed == "b: was '2', is '3'"
    assert len(compare({"a": "1"}, {"b": "1"})) == 2


def test_files_of_a_quota():
    assert count_inodes(1 << 20) == 4096
    assert count_inodes(1 << 30) == 131072
    assert count_inodes(1 << 42) == 1_000_000
