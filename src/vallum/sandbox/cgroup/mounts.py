"""Which cgroup hierarchies this machine has mounted, and where. Pure: text in, facts out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

CONTROLLERS = frozenset({"cpu", "cpuacct", "memory", "pids", "freezer"})
"""The v1 controllers used here."""

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mounted hierarchy."""

    point: str
    """Where it is mounted."""
    root: str
    """Which cgroup of the hierarchy is seen there, as ``/proc/PID/cgroup`` would name it."""

    def path_of(self, cgroup: str) -> str | None:
        """The directory of a cgroup named as in ``/proc/PID/cgroup``; None when this mount does not show it."""
        if self.root == "/":
            return self.point if cgroup == "/" else self.point + cgroup
        if cgroup == self.root:
            return self.point
        return self.point + cgroup[len(self.root) :] if cgroup.startswith(self.root + "/") else None

    def name_of(self, path: str) -> str:
        """The inverse of :meth:`path_of`, for a directory below :attr:`point`."""
        rest = path[len(self.point) :]
        return (self.root if self.root != "/" else "") + rest or "/"


@dataclass(frozen=True)
class Hierarchies:
    """Every hierarchy that is mounted writable."""

    unified: Mount | None = None
    v1: dict[str, Mount] = field(default_factory=dict)
    """Controller -> mount."""


def parse_mountinfo(text: str) -> Hierarchies:
    """Find the cgroup mounts in ``/proc/PID/mountinfo`` (proc(5)). Read-only mounts and later duplicates are left out."""
    unified: Mount | None = None
    v1: dict[str, Mount] = {}
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(tail) < 3:
            continue
        options = set(fields[5].split(",")) | set(tail[2].split(","))
        if "ro" in options:
            continue
        root, point = _unescape(fields[3]), _unescape(fields[4])
        if tail[0] == "cgroup2":
            unified = unified or Mount(point=point, root=root)
        elif tail[0] == "cgroup":
            for controller in CONTROLLERS & options:
                v1.setdefault(controller, Mount(point=point, root=root))
    return Hierarchies(unified=unified, v1=v1)


def parse_membership(text: str, controller: str = "") -> str | None:
    """The cgroup that ``/proc/PID/cgroup`` names for a v1 controller, or for v2 when ``controller`` is empty.

    None when there is no such line. A removed cgroup keeps its name, without the ``(deleted)`` mark.
    """
    if not controller:
        # Names of cgroups have no newline, so this begins a line.
        _, found, rest = ("\n" + text).rpartition("\n0::")
        return rest.partition("\n")[0].removesuffix(" (deleted)") if found else None
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and controller in parts[1].split(","):
            return parts[2].removesuffix(" (deleted)")
    return None


def _unescape(text: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes as octal escapes."""
    return _OCTAL.sub(lambda m: chr(int(m.group(1), 8)), text)
