"""What the grants of a cell have been used for so far, over all its flows. The arithmetic is ``rules.budgets``."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from vallum.core.clock import mono_ns
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell
from vallum.gateway.http1 import RefusedError
from vallum.rules.budgets import BudgetState, Usage, charge
from vallum.rules.grants import Rule


class Purse:
    """The budgets of one cell (an episode). States are kept by the id of their rule, also over a change of rules."""

    def __init__(self) -> None:
        self._states: dict[str, BudgetState] = {}

    def spend(self, rule: Rule | None, usage: Usage) -> Decision | None:
        """Use so much of a grant. None: it may be, and is counted; else the denial, and nothing was counted."""
        if rule is None or rule.budget is None:
            return None
        state = self._states.get(rule.id, BudgetState())
        state, decision = charge(rule.budget, state, usage, mono_ns(), grant=rule.id)
        if decision.verdict != "allow":
            return decision
        self._states[rule.id] = state
        return None


_purses: WeakKeyDictionary[GatewayCell, Purse] = WeakKeyDictionary()


def purse_of(cell: GatewayCell) -> Purse:
    """The purse of a cell."""
    purse = _purses.get(cell)
    if purse is None:
        purse = _purses[cell] = Purse()
    return purse


class FlowMeter:
    """Counts a relayed flow against its grant. A :class:`~vallum.gateway.relay.Meter`."""

    def __init__(self, purse: Purse, rule: Rule) -> None:
        self._purse = purse
        self._rule = rule

    def spend(self, *, bytes_out: int = 0, bytes_in: int = 0) -> None:
        """As :meth:`Meter.spend`."""
        denial = self._purse.spend(self._rule, Usage(bytes_out=bytes_out, bytes_in=bytes_in))
        if denial is not None:
            raise RefusedError(denial)
