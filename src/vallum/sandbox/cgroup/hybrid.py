"""The driver for hybrid machines: steps in the v2 hierarchy, quotas on the v1 controllers that v2 lacks here."""

from __future__ import annotations

from vallum.core.limits import Limits
from vallum.sandbox.cgroup.quota1 import CellQuotas1, Quotas1
from vallum.sandbox.cgroup.v2 import V2Driver


class HybridDriver(V2Driver):
    """Like :class:`V2Driver`, with a v1 group a controller beside it."""

    name = "hybrid"

    def __init__(self, path: str, cgroup: str, controllers: frozenset[str], quotas: Quotas1) -> None:
        """``controllers`` are those of v2; ``quotas`` has the others, as far as they are here."""
        super().__init__(path, cgroup, controllers)
        self._quotas1 = quotas

    def sweep(self) -> int:
        """See the contract. v2 first: its kill is atomic, so nothing is left to outrun the v1 sweep."""
        return super().sweep() + self._quotas1.sweep()

    def close(self) -> None:
        """See the contract."""
        super().close()
        self._quotas1.close()

    def _quota_names(self) -> frozenset[str]:
        return self._controllers | self._quotas1.prefixes.keys()

    def _make_quotas(self, cell: str, limits: Limits) -> CellQuotas1 | None:
        return self._quotas1.make(cell, limits)
