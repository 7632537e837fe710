"""Finding out how this machine does cgroups: by looking at its mounts, then by attempting."""

from __future__ import annotations

import os
from pathlib import Path

from vallum.core.errors import InvalidInput, SandboxError
from vallum.sandbox.cgroup import files
from vallum.sandbox.cgroup.base import Driver
from vallum.sandbox.cgroup.hybrid import HybridDriver
from vallum.sandbox.cgroup.mounts import Hierarchies, Mount, parse_membership, parse_mountinfo
from vallum.sandbox.cgroup.quota1 import NAMES, Quotas1
from vallum.sandbox.cgroup.trial import may_host
from vallum.sandbox.cgroup.v1 import V1Driver
from vallum.sandbox.cgroup.v2 import V2Driver, enable_controllers


def find_driver(
    prefix: str, *, mounts: Path = Path("/proc/self/mountinfo"), base: str | None = None, uid: int | None = None
) -> Driver | None:
    """The strongest driver that works here, or None: then steps are told apart by fork lineage.

    Args:
        prefix: our directory in each hierarchy, ``vallum.<8 hex>``, unique for one node's home. Everything
            below it belongs to the caller, who holds that home's lock (``sweep`` kills what it finds there).
        mounts: what is mounted.
        base: cgroup v2 directory delegated to the caller, instead of looking for one.
        uid: whose user slice to look for; the caller's own by default.

    Tried in this order: v2 at ``base`` if given; otherwise at the root of the mount, in the caller's own
    cgroup, in the user's systemd slice. A place counts when a group can be made there and a process moved
    into it. Quotas that v2 has no controller for come from v1 (``hybrid``). Without v2: ``v1``.

    Raises:
        InvalidInput: ``base`` is not a cgroup v2 directory that can be used.
    """
    hierarchies = parse_mountinfo(mounts.read_text(encoding="utf-8", errors="surrogateescape"))
    if hierarchies.unified is not None:
        own = parse_membership(Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape"))
        for place in list_places(hierarchies.unified, base, own, os.geteuid() if uid is None else uid):
            if may_host(place):
                is_own = own is not None and hierarchies.unified.path_of(own) == place
                return _make_unified(hierarchies, place, prefix, own=is_own)
    if base is not None:
        raise InvalidInput(
            f"{base} cannot hold cells: it must be a cgroup v2 directory in which this user may make groups and move its processes"
        )
    return _make_v1(hierarchies, prefix)


def list_places(unified: Mount, base: str | None, own: str | None, uid: int) -> list[str]:
    """v2 directories worth attempting, best first. Pure."""
    if base is not None:
        inside = base == unified.point or base.startswith(unified.point.rstrip("/") + "/")
        return [base] if inside and ".." not in base.split("/") else []
    names = ["/" if unified.root == "/" else unified.root, own, f"/user.slice/user-{uid}.slice/user@{uid}.service"]
    places = [unified.path_of(name) for name in names if name is not None]
    return list(dict.fromkeys(place for place in places if place is not None))


def _make_unified(hierarchies: Hierarchies, place: str, prefix: str, *, own: bool) -> Driver:
    assert hierarchies.unified is not None
    path = f"{place}/{prefix}"
    files.make_dir(path)
    cgroup = hierarchies.unified.name_of(path)
    controllers = enable_controllers(place, prefix, own=own)
    quotas = _find_quotas(hierarchies, prefix, frozenset(NAMES) - controllers)
    if quotas.prefixes:
        return HybridDriver(path, cgroup, controllers, quotas)
    return V2Driver(path, cgroup, controllers)


def _make_v1(hierarchies: Hierarchies, prefix: str) -> Driver | None:
    freezer = hierarchies.v1.get("freezer")
    if freezer is None or not may_host(freezer.point):
        return None
    path = f"{freezer.point}/{prefix}"
    files.make_dir(path)
    accounts = hierarchies.v1.get("cpuacct")
    cpuacct = f"{accounts.point}/{prefix}" if accounts and may_host(accounts.point) else None
    if cpuacct:
        files.make_dir(cpuacct)
    return V1Driver(path, freezer.name_of(path), cpuacct, _find_quotas(hierarchies, prefix, frozenset(NAMES)))


def _find_quotas(hierarchies: Hierarchies, prefix: str, wanted: frozenset[str]) -> Quotas1:
    prefixes: dict[str, str] = {}
    for controller in sorted(wanted):
        mount = hierarchies.v1.get(controller)
        if mount is None or not may_host(mount.point):
            continue
        path = f"{mount.point}/{prefix}"
        try:
            files.make_dir(path)
        except SandboxError:
            continue
        prefixes[controller] = path
    return Quotas1(prefixes)
