"""Which isolation levels this node offers, and what each is built of."""

from __future__ import annotations

import logging
from hashlib import sha256

from vallum.client.places import Places
from vallum.core.errors import SandboxError
from vallum.sandbox.base import Backend
from vallum.sandbox.cgroup.base import Driver
from vallum.sandbox.cgroup.detect import find_driver
from vallum.sandbox.ns.backend import NsBackend
from vallum.sandbox.uidrange import Lease, UidRanges

log = logging.getLogger(__name__)


class Ranges:
    """Leases of host ids by their first id, as the backend asks for them (``UidSource``)."""

    def __init__(self, ranges: UidRanges) -> None:
        self._ranges = ranges
        self._leases: dict[int, Lease] = {}

    def take(self) -> int:
        """First id of a range that no other cell has."""
        lease = self._ranges.lease()
        self._leases[lease.ids.first] = lease
        return lease.ids.first

    def give_back(self, base: int) -> None:
        """The range may be leased again."""
        lease = self._leases.pop(base, None)
        if lease is not None:
            lease.release()


def make_ranges() -> Ranges | None:
    """The machine's ranges of ids, None for somebody who may not hand them out."""
    try:
        return Ranges(UidRanges())
    except SandboxError as error:
        log.info("no ranges of host ids: %s", error)
        return None


def make_driver(places: Places) -> Driver | None:
    """The cgroup driver of this home; its groups carry a name that no other home's have."""
    return find_driver(f"vallum.{sha256(str(places.state).encode()).hexdigest()[:8]}")


def make_backends(places: Places) -> dict[str, Backend]:
    """Level -> backend."""
    driver = make_driver(places)
    return {"ns": NsBackend(places.cells, uids=make_ranges(), driver=driver)}
