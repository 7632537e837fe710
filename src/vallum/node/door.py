"""The gateway as the node sees it: one process for all cells, and a new one when it dies (its cells have died with it)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vallum.core.errors import GatewayError
from vallum.gateway.link import AttributeCall, EmitCall, GatewayLink
from vallum.node.live import LiveCell
from vallum.rules.grants import Ruleset

GATEWAY_ID = 0x7FFF_0001
"""User and group of the gateway when the node is root: one that nobody and no cell has."""


def is_mapped(number: int, uid_map: str) -> bool:
    """Whether a user namespace with this ``/proc/PID/uid_map`` has user ``number``."""
    ranges = [tuple(int(word) for word in line.split()) for line in uid_map.splitlines()]
    return any(first <= number < first + count for first, _, count in ranges)


def read_uid_map() -> str:
    """This process's own."""
    return Path("/proc/self/uid_map").read_text("ascii")


class Door:
    """The way out of every cell."""

    def __init__(self, attribute: AttributeCall, emit: EmitCall) -> None:
        self._attribute = attribute
        self._emit = emit
        self._link: GatewayLink | None = None

    async def start(self, on_death: Callable[[str], None]) -> dict[str, str]:
        """Start the gateway process.

        Raises:
            GatewayError: it does not start.
        """
        has_own = os.geteuid() == 0 and is_mapped(GATEWAY_ID, read_uid_map())
        uid, gid = (GATEWAY_ID, GATEWAY_ID) if has_own else (os.geteuid(), os.getegid())
        self._link = await GatewayLink.start(
            uid=uid, gid=gid, attribute=self._attribute, emit=self._emit, on_death=on_death
        )
        if not has_own:
            return {"gateway.user": "degraded: the gateway runs as you, not as a user of its own; run the node as root"}
        return {"gateway.user": "enforced"}

    @property
    def pid(self) -> int | None:
        """Process id of the gateway."""
        return self._link.pid if self._link is not None else None

    async def add(self, live: LiveCell, rules: Ruleset) -> None:
        """Serve a cell's doors. They are the gateway's from now on.

        Raises:
            GatewayError: nobody serves them; the cell must not be used.
        """
        if self._link is None:
            raise GatewayError("the gateway is not running, so a cell would have no judge: start the node again")
        doors = live.cell.doors
        await self._link.add_cell(
            live.id, run=live.book.run, episode=live.episode, rules=rules, tcp=doors.tcp, dns=doors.dns
        )

    async def remove(self, live: LiveCell) -> None:
        """Close a cell's doors and cut its flows; their last events have been recorded on return.

        Raises:
            GatewayError: the gateway has gone (and with it the doors).
        """
        if self._link is not None:
            await self._link.remove_cell(live.id)

    async def stop(self) -> None:
        """End the gateway."""
        if self._link is not None:
            await self._link.stop()
            self._link = None
