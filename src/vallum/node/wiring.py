"""Which isolation levels this node offers, and what each is built of."""

from __future__ import annotations

import logging
from hashlib import sha256

from vallum.client.places import Places
from vallum.core.errors import SandboxError
from vallum.sandbox.base import Backend
from vallum.sandbox.cgroup.base import Driver
from vallum.sandbox.cgroup.detect import find_driver
from vallum.sandbox.gvisor.backend import GvisorBackend
from vallum.sandbox.ns.backend import NsBackend
from vallum.sandbox.uidrange import UidRanges

log = logging.getLogger(__name__)


def make_ranges() -> UidRanges | None:
    """The machine's ranges of ids, None for somebody who may not hand them out."""
    try:
        return UidRanges()
    except SandboxError as error:
        log.info("no ranges of host ids: %s", error)
        return None


def make_driver(places: Places) -> Driver | None:
    """The cgroup driver of this home; its groups carry a name that no other home's have."""
    return find_driver(f"vallum.{sha256(str(places.state).encode()).hexdigest()[:8]}")


def make_backends(places: Places, driver: Driver | None) -> dict[str, Backend]:
    """Level -> backend. All share the machine's ranges of ids and the cgroup driver."""
    ranges = make_ranges()
    return {
        "ns": NsBackend(places.cells, uids=ranges, driver=driver),
        "gvisor": GvisorBackend(places.cells.with_name("cells.gvisor"), uids=ranges, driver=driver),
    }
