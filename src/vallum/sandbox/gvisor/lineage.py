"""Which step a process of a gVisor cell belongs to: by who made whom, as the guest's kernel reports each clone. Pure.

True parents, at the time of the clone, so a double fork, ``setsid`` or CLONE_PARENT changes nothing. What PID 1 starts
is charged to the step that the node asked it for. Process ids are the cell's own.

Covered: every process whose clone was reported. Not covered: a kernel that its guest has broken; clones that were lost
(the cell then says that it is not sure, and a step is killed with its cell).
"""

from __future__ import annotations

from dataclasses import dataclass, field

INIT = 1
CONFIDENCE = 0.9
"""Facts of a kernel that is not ours, but that the guest would have to break first."""


@dataclass(slots=True)
class Task:
    """A living process."""

    pid: int
    parent: int
    step: int | None
    exe: str = ""
    argv: list[str] = field(default_factory=list)
    uid: int | None = None


class Lineage:
    """The living processes of one cell."""

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}

    def begin(self, pid: int, step: int) -> None:
        """PID 1 has forked ``pid`` for a command of ``step``. May be known before or after its clone is reported."""
        task = self._tasks.get(pid)
        if task is None or task.parent != INIT:
            task = self._tasks[pid] = Task(pid, INIT, step)
        task.step = step

    def clone(self, pid: int, child: int) -> None:
        """Process ``pid`` made ``child`` (itself again: a thread)."""
        if child in (pid, INIT):
            return
        known = self._tasks.get(child)
        if pid == INIT:
            if known is None or known.parent != INIT:
                self._tasks[child] = Task(child, INIT, None)
            return
        parent = self._tasks.get(pid)
        self._tasks[child] = Task(child, pid, parent.step if parent else None)

    def end(self, pid: int) -> None:
        """A process has ended."""
        self._tasks.pop(pid, None)

    def move(self, pid: int, step: int) -> bool:
        """Charge one living process to another step from now on; False when it is gone."""
        task = self._tasks.get(pid)
        if task is not None:
            task.step = step
        return task is not None

    def get(self, pid: int) -> Task | None:
        """A living process."""
        return self._tasks.get(pid)

    def pids(self, step: int | None = None) -> list[int]:
        """Living processes of a step; or of every step, and those whose step is not known. Not PID 1's own helpers."""
        if step is not None:
            return [pid for pid, task in self._tasks.items() if task.step == step]
        return [pid for pid, task in self._tasks.items() if task.step is not None or task.parent != INIT]

    def step_of(self, pid: int) -> tuple[int | None, str, float]:
        """(step, method, confidence)."""
        task = self._tasks.get(pid)
        if task is None or task.step is None:
            return None, "none", 0.0
        return task.step, "lineage", CONFIDENCE
