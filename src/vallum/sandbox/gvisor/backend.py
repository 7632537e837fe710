"""The ``gvisor`` level: a namespace cell whose inhabitant is runsc, whose inhabitant is the guest.

Two kernels stand between the guest and the machine. Outside is everything that the ``ns`` level has but its seccomp
filter: own users, mounts, processes, cgroups and a network of doors. Inside of it runs runsc, with a filter of its own.

Nothing is done before the first cell is asked for: a machine without runsc has all other levels as before.

Covered: see native/runtime.c, native/guest.c, bundle.py. Not covered: quotas of single steps; snapshots; rootless nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import msgspec

from vallum.core.errors import ControlMissing, GuestFileError, SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.base import Cell, CellSpec, Doors, Image, Layer
from vallum.sandbox.cgroup.base import Driver
from vallum.sandbox.gvisor import bundle
from vallum.sandbox.gvisor.cell import GvisorCell
from vallum.sandbox.gvisor.runsc import REMEDY, Runsc, find_path, find_runsc, platforms
from vallum.sandbox.ns import wire
from vallum.sandbox.ns.backend import BINARY, NsBackend, Place, UidSource
from vallum.sandbox.ns.cell import NsCell
from vallum.sandbox.ns.channel import close_all
from vallum.sandbox.ns.explain import explain_build

START_WITHIN_S = 20.0
PRELOAD = "vallum-statx.so"
"""Beside the binary; what it is for says native/preload/statx.c."""
KERNEL_THREADS = 192
"""Threads that runsc itself may need beyond the processes of the guest: the limit ``pids`` is raised by so many."""
_DOOR_TRACE, _DOOR_LOG = 64, 128
_DOORS = (*wire.DOORS, _DOOR_TRACE, _DOOR_LOG)


class GvisorBackend(NsBackend):
    """See :class:`vallum.sandbox.base.Backend`."""

    level = "gvisor"

    def __init__(
        self, cells_dir: Path, *, uids: UidSource | None, driver: Driver | None, binary: Path = BINARY
    ) -> None:
        """As :class:`NsBackend`; ``driver`` may be shared with it."""
        super().__init__(cells_dir, uids=uids, driver=driver, binary=binary)
        self._runsc: Runsc | None = None
        self._platform = ""
        self._is_begun = False
        self._beginning = asyncio.Lock()

    async def start(self) -> None:
        """Nothing, unless a crash left layers of cells behind: those are removed."""
        if self._cells_dir.is_dir() and any(self._cells_dir.iterdir()):
            await self._open_launcher()

    def probe(self) -> dict[str, str]:
        """Whether the level can be had, by what is installed; a cell itself is attempted when the first is asked for."""
        if find_path() is None:
            return {"level.gvisor": f"missing: runsc is not installed; {REMEDY}"}
        if self._uids is None:
            return {"level.gvisor": "missing: a cell of runsc needs a range of ids; run the node as root"}
        return {"level.gvisor": "enforced"}

    async def create(self, spec: CellSpec) -> Cell:
        """See the contract.

        Raises:
            ControlMissing: runsc is not installed or does not work here, or the node has no ranges of ids.
        """
        if spec.root == "owner":
            raise ControlMissing("root of a gvisor cell cannot own files (root=owner): use root=plain, or the level ns")
        await self._begin()
        return await super().create(msgspec.structs.replace(spec, limits=leave_room(spec.limits)))

    # ------------------------------------------------------------------ the first cell

    async def _open_launcher(self) -> None:
        if self._launcher is not None:
            return
        self._start_launcher()
        self._cells_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._remove([entry for entry in self._cells_dir.iterdir() if entry.is_dir() and not entry.is_symlink()])

    async def _begin(self) -> None:
        """Find runsc and a platform that works, by attempting an empty cell with each."""
        async with self._beginning:
            if self._is_begun:
                return
            if self._uids is None:
                raise ControlMissing("the level gvisor needs a range of ids for each cell: run the node as root")
            self._runsc = await asyncio.to_thread(find_runsc, find_path())
            await self._open_launcher()
            reasons = []
            for platform in platforms(self._runsc.version):
                self._platform = platform
                try:
                    await self._attempt()
                except SandboxError as error:
                    reasons.append(f"{self._platform}: {error}")
                else:
                    self._is_begun = True
                    return
            raise ControlMissing(f"{self._runsc.path} {self._runsc.version} does not work here: {'; '.join(reasons)}")

    async def _attempt(self) -> None:
        lower = self._cells_dir / "attempt"
        lower.mkdir(mode=0o755, exist_ok=True)
        image = Image(ref="attempt", digest="", layers=[Layer(at="/", lowers=[str(lower)])], environ={}, user="1000")
        limits = Limits(memory_bytes=None, pids=None, disk_bytes=None)
        cell = await self._create(CellSpec(id="attempt-gvisor", image=image, limits=limits))
        await cell.close()
        await self._remove([lower])

    # ------------------------------------------------------------------ create

    async def _build(self, spec: CellSpec, place: Place, layers: list[wire.PlacedLayer]) -> NsCell:
        assert self._runsc is not None
        group = place.group
        program = Layer(at=bundle.GUEST_DIR, lowers=[str(self._binary.parent)], writable=False)
        argv = [*self._runsc.arguments(platform=self._platform), "run", "--bundle", bundle.BUNDLE, bundle.CONTAINER]
        request = wire.encode_create(
            ids=place.ids, port=self._port, hostname=spec.hostname, layers=[*layers, wire.PlacedLayer(program)],
            processes=0, cgroups=group.enter_paths() if group else [],
        )  # fmt: skip
        request = bundle.add_runtime(request, argv, hostname=spec.hostname, program=self._binary.name)
        reply, fds = await self._ask(wire.L_CREATE, request)
        if reply.op != wire.L_READY:
            close_all(fds)
            raise explain_build(reply.text, reply.a)
        pidfd, control, doors, trace, log_fd = take_doors(fds, reply.b)
        cell = GvisorCell(
            spec, pid=reply.a, pidfd=pidfd, control=control, doors=doors, group=group, trace=trace, log_fd=log_fd,
            clean_up=self._clean_up,
        )  # fmt: skip
        self._cells[spec.id] = cell
        try:
            await cell.until_ready(START_WITHIN_S)
            if cell.refuses_automount:
                await self._lend_preload(cell)
        except BaseException:
            await asyncio.shield(cell.close())
            raise
        return cell

    async def _lend_preload(self, cell: GvisorCell) -> None:
        """Before the first command. An image without a writable /etc goes without."""
        if (self._binary.parent / PRELOAD).is_file():
            with contextlib.suppress(GuestFileError):
                await cell.write_file("/etc/ld.so.preload", f"{bundle.GUEST_DIR}/{PRELOAD}\n".encode(), user="0")


def leave_room(limits: Limits) -> Limits:
    """The limit of processes is the cgroup's, which counts the threads of runsc as well. Pure."""
    return msgspec.structs.replace(limits, pids=limits.pids + KERNEL_THREADS) if limits.pids else limits


def take_doors(fds: list[int], mask: int) -> tuple[int, socket.socket, Doors, socket.socket, int]:
    """(pidfd, control socket, doors, listener for reports, log) from the descriptors of a READY message."""
    pidfd, control, *rest = fds
    found = dict(zip([door for door in _DOORS if mask & door], rest, strict=True))
    log_fd = found.pop(_DOOR_LOG)
    sockets = {door: socket.socket(fileno=fd) for door, fd in found.items()}
    for sock in sockets.values():
        sock.setblocking(False)
    doors = Doors(
        tcp=[sockets[door] for door in (wire.DOOR_TCP4, wire.DOOR_TCP6) if door in sockets],
        dns=[sockets[door] for door in (wire.DOOR_DNS4, wire.DOOR_DNS6) if door in sockets],
        packets=sockets.get(wire.DOOR_PACKETS),
        diag=sockets.get(wire.DOOR_DIAG),
    )
    return pidfd, socket.socket(fileno=control), doors, sockets[_DOOR_TRACE], log_fd
