"""Which step a process belongs to by fork ancestry, where no cgroup can be had.

Each step has a *keeper*: a child subreaper of ours inside the cell, so whatever a step's commands leave running stays
below it, by the kernel's doing. Only a persistent shell that is later charged to another step blurs this: what it
started is told apart by start time.

Covered: double forks, setsid, daemons. Not covered: a guest that kills its keeper (same user in rootless cells) is
answered by ending the cell; processes that a moved shell's old daemon starts through a fresh double fork after the
move are charged to the newer step, with a confidence that says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

CERTAIN = 0.9
"""Ancestry leads to the keeper of one step only."""
BY_START_TIME = 0.7
"""The step was chosen by when the process started."""


@dataclass(frozen=True)
class ProcessStat:
    """What ``/proc/PID/stat`` says."""

    pid: int
    ppid: int
    state: str
    start_ticks: int
    cpu_ticks: int
    """Its own and its reaped children's."""


@dataclass
class Keeper:
    """The keeper of one step."""

    step: int
    pid: int
    shells: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Moved children by pid: (start ticks, step) of each move, oldest first."""


def parse_stat(text: str) -> ProcessStat | None:
    """One line of ``/proc/PID/stat``; the name may contain anything, so fields are counted after its last parenthesis."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if len(fields) < 20 or not head.split(" ", 1)[0].isdigit():
        return None
    cpu = sum(int(value) for value in fields[11:15])
    return ProcessStat(
        pid=int(head.split(" ", 1)[0]), ppid=int(fields[1]), state=fields[0], start_ticks=int(fields[19]), cpu_ticks=cpu
    )


def read_processes() -> dict[int, ProcessStat]:
    """Every process of this machine that can be seen."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            stat = parse_stat((directory / "stat").read_text(errors="replace"))
        except OSError:
            continue
        if stat is not None:
            found[stat.pid] = stat
    return found


def now_ticks() -> int:
    """Now, in the unit of process start times."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def ancestry(processes: Mapping[int, ProcessStat], pid: int, root: int) -> list[int]:
    """``pid`` and its ancestors up to, not including, ``root``; empty when ``root`` is not one of them. Pure."""
    chain = []
    at = pid
    while at != root:
        stat = processes.get(at)
        if stat is None or at in chain:
            return []
        chain.append(at)
        at = stat.ppid
    return chain


def find_step(
    processes: Mapping[int, ProcessStat], pid: int, keepers: Mapping[int, Keeper]
) -> tuple[int, float] | None:
    """(step, confidence) of ``pid``; None when it is below no keeper, or is one. Pure."""
    chain: list[int] = []
    at = pid
    while at not in keepers:
        stat = processes.get(at)
        if stat is None or at in chain:
            return None
        chain.append(at)
        at = stat.ppid
    if not chain:
        return None
    keeper = keepers[at]
    top = chain[-1]
    if not keeper.shells:
        return keeper.step, CERTAIN
    # The nearest one that is moved about: a shell, or the runtime of an agent, which may stand below a program that started it.
    nearest = next((index for index, one in enumerate(chain) if one in keeper.shells), None)
    if nearest is not None:
        moves = keeper.shells[chain[nearest]]
        if nearest == 0:
            return moves[-1][1], CERTAIN
        decisive = chain[nearest - 1]
    else:
        moves = sorted(move for moves in keeper.shells.values() for move in moves)
        decisive = top
    start = processes[decisive].start_ticks
    step = keeper.step
    for since, moved_to in moves:
        if start >= since:
            step = moved_to
    return step, BY_START_TIME


def descendants(processes: Mapping[int, ProcessStat], root: int) -> list[int]:
    """Every process below ``root``. Pure."""
    children: dict[int, list[int]] = {}
    for stat in processes.values():
        children.setdefault(stat.ppid, []).append(stat.pid)
    found: list[int] = []
    ahead = list(children.get(root, ()))
    while ahead:
        pid = ahead.pop()
        found.append(pid)
        ahead += children.get(pid, ())
    return found
