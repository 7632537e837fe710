"""The runsc of this machine: where it is, which version, and which of its flags and platforms it has. Found by asking it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from vallum.core.errors import ControlMissing
from vallum.sandbox.gvisor.bundle import SESSION, STATE

REMEDY = "install it (Debian, Ubuntu: apt-get install runsc), or use --level ns"
_VERSION = re.compile(r"runsc version (\S+)")
_ASK_WITHIN_S = 10.0
_FIXED = ("/usr/local/bin/runsc", "/usr/bin/runsc", "/usr/local/sbin/runsc", "/usr/sbin/runsc")


@dataclass(frozen=True)
class Runsc:
    """What is needed to start it."""

    path: str
    version: str
    flags: frozenset[str]
    """Names of its global flags, without dashes."""

    def arguments(self, *, platform: str) -> list[str]:
        """Global flags of a cell: network of the namespace it is in, no cgroup of its own, no socket or pipe of the host.

        Flags that this version lacks are those whose default is the same; ``overlay2`` came when its default changed.
        """
        wanted = {
            "root": STATE,
            "platform": platform,
            "network": "host",
            "ignore-cgroups": "true",
            "overlay2": "none",
            "host-uds": "none",
            "host-fifo": "none",
            "net-raw": "false",
            "file-access": "exclusive",
            "pod-init-config": SESSION,
        }
        known = {name: value for name, value in wanted.items() if name in self.flags}
        return [self.path, *(f"--{name}={value}" for name, value in known.items())]


NEEDED = ("root", "platform", "network", "ignore-cgroups", "pod-init-config")
"""Flags without which a cell cannot be built or watched."""


def find_path(places: Sequence[str] = _FIXED, search: str | None = None) -> str | None:
    """Where runsc is: in fixed places first, then along ``search`` (None: our PATH)."""
    return next((path for path in places if os.access(path, os.X_OK)), None) or shutil.which("runsc", path=search)


def find_runsc(path: str | None) -> Runsc:
    """Ask the runsc at ``path`` (None: there is none) what it is. About 50 ms, blocking.

    Raises:
        ControlMissing: it is not installed, does not answer, or is too old to report what its guests do.
    """
    if path is None:
        raise ControlMissing(f"the level gvisor needs runsc, which is not installed; {REMEDY}")
    version = _VERSION.search(_ask(path, "--version"))
    flags = frozenset(parse_flags(_ask(path, "flags")))
    missing = [name for name in NEEDED if name not in flags]
    if version is None or missing:
        raise ControlMissing(
            f"{path} is not usable for the level gvisor: it lacks {', '.join(missing) or 'a version'};"
            " install a runsc of December 2022 or newer"
        )
    return Runsc(path=path, version=version[1], flags=flags)


def parse_flags(text: str) -> set[str]:
    """Names in the output of ``runsc flags``. Pure."""
    return set(re.findall(r"^\s+--?([A-Za-z][A-Za-z0-9_-]*)", text, re.MULTILINE))


def platforms(version: str) -> list[str]:
    """Platforms to try, the fastest that needs no virtualisation first. Pure.

    systrap came in 2023; before that ptrace is the only one that works without /dev/kvm. kvm is not tried by itself: it
    gives the guest's kernel a device of the host.
    """
    year = re.search(r"(20\d\d)", version)
    return ["systrap", "ptrace"] if year is not None and int(year[1]) >= 2023 else ["ptrace"]


def _ask(path: str, word: str) -> str:
    try:
        ran = subprocess.run(
            [path, word],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_WITHIN_S,
            env={},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ControlMissing(f"{path} cannot be run: {error}; {REMEDY}") from error
    return ran.stdout + ran.stderr
