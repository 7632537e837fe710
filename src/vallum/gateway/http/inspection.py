"""Flows whose requests have to be read: who reads them, and who answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vallum.core.verdict import Decision
from vallum.gateway.http1 import RefusedError
from vallum.gateway.sniff import Sniffed

if TYPE_CHECKING:
    from vallum.gateway.flow import GatewayFlow


async def inspect(flow: GatewayFlow, sniffed: Sniffed, head: bytes) -> None:
    """Serve the rest of an admitted flow request by request; ``head`` are its first bytes, none of which has left.

    Counts what goes outside and comes back in ``flow.counters``. The flow's ``opened`` is recorded before, its ``closed``
    after. Cancelled when the rules change against the flow.

    Raises:
        RefusedError: the flow must be cut; it is recorded as denied.
        OSError: one side broke off.
    """
    reason = f"a rule needs to see the requests of this {sniffed.protocol}, and this gateway cannot read them"
    raise RefusedError(Decision(verdict="deny", rule="not-inspectable", reason=reason))
