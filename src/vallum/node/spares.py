"""Cells built before somebody asks: idle, unused, of the shape that was asked for last.

A spare is a whole cell of its own id, ids of users, layer and cgroup, in which nothing has run. Nothing of a cell that was used
ever comes back: a spare is handed out once, and ended with the cell's client like any other.

Covered: a spare that died is not handed out; one whose lower directories were replaced meanwhile is not either.
Not covered: what creating costs the machine is the same, only earlier; under sustained load there are no spares.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from dataclasses import dataclass

import msgspec

from vallum.core.errors import VallumError
from vallum.sandbox.base import Backend, Cell, CellSpec
from vallum.sandbox.ns.cell import NsCell

log = logging.getLogger(__name__)

SPARES = 2
"""How many are kept."""
QUIET_S = 0.02
"""How long after the last request they are built, so that they do not compete with the command that follows it."""


def make_cell_id() -> str:
    """An id for a cell that no other has."""
    return f"c{secrets.token_hex(5)}"


@dataclass(frozen=True)
class Shape:
    """What makes two cells alike."""

    level: str
    spec: CellSpec
    """Without its id."""
    lowers: tuple[tuple[int, int], ...]
    """Device and inode of every lower directory: a name may mean another one by now."""


def find_shape(level: str, spec: CellSpec) -> Shape | None:
    """The shape of a cell; None where cells are not built ahead: other levels, and forks of a snapshot."""
    if level != "ns" or any(layer.sealed for layer in spec.image.layers):
        return None
    try:
        found = [os.stat(lower) for layer in spec.image.layers for lower in layer.lowers]  # noqa: PTH116
    except OSError:
        return None  # building it will say why
    return Shape(level, msgspec.structs.replace(spec, id=""), tuple((each.st_dev, each.st_ino) for each in found))


class Spares:
    """The spare cells of a node. Not safe for threads."""

    def __init__(self, size: int = SPARES) -> None:
        self._size = size
        self._shape: Shape | None = None
        self._backend: Backend | None = None
        self._ready: list[NsCell] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_filling = False
        self.handed_out = 0
        """How many cells were spares."""

    async def take(self, backend: Backend, spec: CellSpec) -> Cell:
        """A cell as ``spec`` says: a spare (its id is then another), or a new one.

        Raises:
            SandboxError: it cannot be built; nothing is left behind.
        """
        shape = find_shape(backend.level, spec) if self._size else None
        if shape is None:
            return await backend.create(spec)
        is_repeated = shape == self._shape
        if not is_repeated:
            self._drop()
            self._shape, self._backend = shape, backend
        cell = self._pop() or await backend.create(spec)
        if is_repeated:  # the second time one asks, there may be a third
            self._fill_soon()
        return cell

    async def stop(self) -> None:
        """End every spare."""
        self._size = 0
        self._drop()
        while self._tasks:
            await asyncio.gather(*self._tasks)

    def _pop(self) -> Cell | None:
        while self._ready:
            cell = self._ready.pop(0)
            if not cell.gone.is_set():
                self.handed_out += 1
                return cell
            self._later(cell)
        return None

    def _drop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._shape = None
        for cell in self._ready:
            self._later(cell)
        self._ready.clear()

    def _fill_soon(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._start_filling)

    def _start_filling(self) -> None:
        self._timer = None
        if not self._is_filling:
            self._spawn(asyncio.ensure_future(self._fill()))

    async def _fill(self) -> None:
        shape, backend = self._shape, self._backend
        self._is_filling = True
        try:
            while shape is not None and backend is not None and len(self._ready) < self._size:
                cell = await backend.create(msgspec.structs.replace(shape.spec, id=make_cell_id()))
                if self._shape == shape and isinstance(cell, NsCell):
                    self._ready.append(cell)
                else:
                    await cell.close()
                    return
        except VallumError as error:
            log.warning("no spare cell: %s", error)  # whoever asks for a cell is told by its own failure
        finally:
            self._is_filling = False

    def _later(self, cell: NsCell) -> None:
        self._spawn(asyncio.ensure_future(self._close(cell)))

    @staticmethod
    async def _close(cell: NsCell) -> None:
        try:
            await cell.close()
        except VallumError as error:
            log.error("the spare cell %s could not be removed: %s", cell.id, error)

    def _spawn(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
