"""The gateway as the node sees it: one process for all cells, and a new one when it dies (its cells have died with it)."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from vallum.core.errors import GatewayError
from vallum.gateway.kit import Kit
from vallum.gateway.link import GatewayLink, NodeSide
from vallum.gateway.wire import Served
from vallum.node.live import LiveCell
from vallum.rules.grants import Ruleset

log = logging.getLogger(__name__)

GATEWAY_ID = 0x7FFF_0001
"""User and group of the gateway when the node is root: one that nobody and no cell has."""


def is_mapped(number: int, uid_map: str) -> bool:
    """Whether a user namespace with this ``/proc/PID/uid_map`` has user ``number``."""
    ranges = [tuple(int(word) for word in line.split()) for line in uid_map.splitlines()]
    return any(first <= number < first + count for first, _, count in ranges)


def read_uid_map() -> str:
    """This process's own."""
    return Path("/proc/self/uid_map").read_text("ascii")


def open_cache(directory: Path, uid: int, gid: int) -> int | None:
    """The directory of package files, made for this user and nobody else; its descriptor is the caller's to close.

    What another user left there is deleted. None where it cannot be had: then nothing is kept.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.lstat().st_uid != uid:
            shutil.rmtree(directory)
            directory.mkdir(mode=0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(fd, 0o700)
            if os.geteuid() == 0:
                os.fchown(fd, uid, gid)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        log.warning("%s cannot be used (%s), so no package is kept", directory, error.strerror)
        return None
    return fd


class Door:
    """The way out of every cell."""

    def __init__(self, node: NodeSide, packages: Path | None = None) -> None:
        """``node`` answers what the gateway asks; in ``packages`` it keeps package files."""
        self._node = node
        self._packages = packages
        self._link: GatewayLink | None = None

    async def start(self, on_death: Callable[[str], None]) -> dict[str, str]:
        """Start the gateway process.

        Raises:
            GatewayError: it does not start.
        """
        has_own = os.geteuid() == 0 and is_mapped(GATEWAY_ID, read_uid_map())
        uid, gid = (GATEWAY_ID, GATEWAY_ID) if has_own else (os.geteuid(), os.getegid())
        cache = open_cache(self._packages, uid, gid) if self._packages is not None else None
        try:
            self._link = await GatewayLink.start(uid=uid, gid=gid, node=self._node, on_death=on_death, cache_fd=cache)
        finally:
            if cache is not None:
                os.close(cache)
        if not has_own:
            return {"gateway.user": "degraded: the gateway runs as you, not as a user of its own; run the node as root"}
        return {"gateway.user": "enforced"}

    @property
    def pid(self) -> int | None:
        """Process id of the gateway."""
        return self._link.pid if self._link is not None else None

    async def add(self, live: LiveCell, rules: Ruleset, kit: Kit | None = None) -> None:
        """Serve a cell's doors. They are the gateway's from now on.

        Raises:
            GatewayError: nobody serves them; the cell must not be used.
        """
        doors = live.cell.doors
        await self._running().add_cell(
            live.id, run=live.book.run, episode=live.episode, rules=rules, tcp=doors.tcp, dns=doors.dns, kit=kit
        )

    async def update(self, live: LiveCell, rules: Ruleset, kit: Kit | None = None) -> int:
        """Judge a cell by other rules (and ``kit``; None: as before) from now on. How many open flows were cut.

        Raises:
            GatewayError: the gateway has gone (and with it the doors).
        """
        return await self._running().update_rules(live.id, rules, kit)

    async def serve_request(
        self, live: LiveCell, *, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> Served:
        """Answer a request of the host by the cell's model door.

        Raises:
            GatewayError: the gateway has gone, or the door failed.
        """
        link = self._running()
        return await link.serve_request(live.id, method=method, target=target, headers=headers, body=body)

    def _running(self) -> GatewayLink:
        if self._link is None:
            raise GatewayError("the gateway is not running, so a cell would have no judge: start the node again")
        return self._link

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
