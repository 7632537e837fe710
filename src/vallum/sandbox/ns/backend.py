"""The ``ns`` level: namespaces, an overlay, seccomp, cgroups. The kernel is shared with the guest.

The parts that need privilege are in one small C program (native/): a launcher, started once, which builds each cell
in a fork of itself. With a range of ids a cell has users 0 to 65534 of its own; without (an ordinary user's node) it
has one. Which of the two is decided by attempting, never by asking who we are.

Covered: see native/cell.c, mounts.c, net.c, seccomp.c, each with its own list.
Not covered: bugs of the shared kernel. A cell without a quota on disk shares the file system of the cells; one with a
quota keeps its layer in its own memory and cannot be sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from vallum.core.errors import ControlMissing, InvalidInput, SandboxError
from vallum.core.limits import MIB, Limits
from vallum.sandbox.base import MIN_UID_RANGE, Cell, CellSpec, Doors, Image, Layer, Owner, SealedLayer
from vallum.sandbox.cgroup.base import CellGroup, Driver
from vallum.sandbox.ns import wire
from vallum.sandbox.ns.cell import NsCell
from vallum.sandbox.ns.channel import Channel, close_all, make_payload
from vallum.sandbox.ns.controls import check_essential, describe
from vallum.sandbox.ns.explain import explain_build, explain_seal, name_of
from vallum.sandbox.ns.sealing import list_requests, read_summary
from vallum.sandbox.ns.steps import GroupSteps

BINARY = Path(__file__).resolve().parents[2] / "native" / "vallum-cell"
DOOR_PORT = 64999
"""Where TCP is redirected to inside a cell: above every ephemeral port, so no program gets it by chance."""
ROOTLESS_USER = (1000, 1000)
"""The one user (and group) of a rootless cell."""
FORK_BACKSTOP = 4096
"""Processes of a cell where no cgroup counts them and nobody gave a limit: a fork bomb must not fill the machine."""
BUILD_WITHIN_S = 15.0
AT_ONCE = 32

_CELL_ID = re.compile(r"[a-z0-9-]{1,40}")


class UidSource(Protocol):
    """Hands out ranges of 65536 host ids that no other cell has."""

    def take(self) -> int:
        """First id of a range."""
        ...

    def give_back(self, base: int) -> None:
        """The range's cell is gone, and no file of it is left."""
        ...


@dataclass
class Place:
    """What a cell has outside of its namespaces."""

    directory: Path
    ids: wire.Ids
    group: CellGroup | None = None
    base: int | None = None
    is_in_memory: bool = False
    layers: list[wire.PlacedLayer] = field(default_factory=list)


class NsBackend:
    """See :class:`vallum.sandbox.base.Backend`."""

    level = "ns"

    def __init__(
        self,
        cells_dir: Path,
        *,
        uids: UidSource | None,
        driver: Driver | None,
        binary: Path = BINARY,
        port: int = DOOR_PORT,
    ) -> None:
        """Nothing is done before :meth:`start`.

        Args:
            cells_dir: where the cells' own layers are kept; ours alone (leftovers in it are deleted). A path
                without symlinks, on a file system that overlay can write to.
            uids: ranges of host ids; None for rootless cells only.
            driver: how this machine does cgroups; None: steps are told apart by lineage and there are no quotas.
            binary: the compiled ``vallum-cell``.
            port: see :data:`DOOR_PORT`.
        """
        self._cells_dir = cells_dir
        self._uids = uids
        self._driver = driver
        self._binary = binary
        self._port = port
        self._launcher: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, asyncio.Future[tuple[wire.Message, list[int]]]] = {}
        self._serial = 0
        self._cells: dict[str, NsCell] = {}
        self._places: dict[str, Place] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tiers: dict[str, str] = {}
        self._landlock = 0

    # ------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """See the contract. Builds (and ends) one empty cell to find out what can be had."""
        if self._launcher is not None:
            return
        self._start_launcher()
        try:
            if self._driver is not None:
                self._driver.sweep()
            self._cells_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._remove(
                [entry for entry in self._cells_dir.iterdir() if entry.is_dir() and not entry.is_symlink()]
            )
            await self._attempt()
        except SandboxError as error:
            await self.stop()
            raise ControlMissing(f"cells cannot be had on this machine: {error}") from error
        except BaseException:
            await self.stop()
            raise

    def _start_launcher(self) -> None:
        if not self._binary.is_file():
            raise ControlMissing(
                f"{self._binary} is missing: it is compiled when the package is built; install it again with a C compiler"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [str(self._binary), "launcher", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={}, cwd="/",
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise ControlMissing(
                f"{self._binary} cannot be run: {error.strerror}; install the package again on this machine"
            ) from error
        finally:
            theirs.close()
        self._launcher = Channel(ours, self._receive, self._lose_launcher)

    async def _attempt(self) -> None:
        """Build one cell, with a range of ids if it goes, and keep what was learnt."""
        lower = self._cells_dir / "attempt"
        lower.mkdir(mode=0o755, exist_ok=True)
        image = Image(
            ref="attempt", digest="", layers=[Layer(at="/", lowers=[str(lower)])], environ={}, user="1000", workdir="/"
        )
        spec = CellSpec(id="attempt-cell", image=image, limits=Limits(memory_bytes=None, pids=None, disk_bytes=None))
        why = "no ranges of ids are given to this node"
        try:
            cell = await self._create(spec)
        except SandboxError as error:
            if self._uids is None:
                raise
            why = str(error)
            self._uids = None
            cell = await self._create(spec)
        try:
            check_essential(await cell.try_walls())
        finally:
            await cell.close()
        self._tiers = describe(has_range=self._uids is not None, why_not=why, doors=cell.doors, landlock=self._landlock)
        self._tiers["disk.quota"] = await self._attempt_quota(spec)
        await self._remove([lower])

    async def _attempt_quota(self, spec: CellSpec) -> str:
        limits = Limits(memory_bytes=None, pids=None, disk_bytes=16 * MIB)
        try:
            cell = await self._create(msgspec.structs.replace(spec, limits=limits))
        except SandboxError as error:
            return f"missing: {error}"
        await cell.close()
        return "enforced"

    def probe(self) -> dict[str, str]:
        """See the contract; includes the cgroup driver's."""
        if self._driver is None:
            missing = "missing: no cgroup hierarchy can be written to; run as root, or have a v2 sub-tree delegated"
            groups = {f"cgroup.{name}": missing for name in ("cpu", "memory", "pids", "kill", "freeze")}
            groups["cgroup.attribution"] = (
                "degraded: steps are told apart by fork lineage; give the node a cgroup it may write to"
            )
        else:
            groups = self._driver.probe()
        return {**self._tiers, **groups}

    async def stop(self) -> None:
        """See the contract."""
        results = await asyncio.gather(*(cell.close() for cell in list(self._cells.values())), return_exceptions=True)
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None
        self._fail_waiting()
        await self._reap_launcher()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _reap_launcher(self) -> None:
        """It ends with its socket; insist after a while."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for _ in range(2000):
            if process.poll() is not None:
                return
            await asyncio.sleep(0.001)
        process.kill()
        process.wait()

    # ------------------------------------------------------------------ create

    async def create(self, spec: CellSpec) -> Cell:
        """See the contract."""
        if not _CELL_ID.fullmatch(spec.id) or spec.id in self._places:
            raise InvalidInput(f"the cell id {spec.id!r} is not usable: 1 to 40 of a-z, 0-9 and '-', and not in use")
        if spec.root == "owner" and self._uids is None:
            raise ControlMissing(
                "root of this cell cannot own files (root=owner): a rootless cell has one user; run the node as root, or leave root=plain"
            )
        if spec.limits.disk_bytes and self.level != NsBackend.level:
            raise ControlMissing(
                f"the level {self.level!r} has no quota on disk; leave out disk_bytes, or use level 'ns'"
            )
        return await self._create(spec)

    async def _create(self, spec: CellSpec) -> NsCell:
        async with self._slots:
            place = Place(self._cells_dir / spec.id, wire.Ids(inner=ROOTLESS_USER, outer=(os.geteuid(), os.getegid())))
            place.is_in_memory = bool(spec.limits.disk_bytes)
            self._places[spec.id] = place
            try:
                layers = self._prepare(spec, place)
                return await self._build(spec, place, layers)
            except BaseException:
                await asyncio.shield(self._unmake(spec.id))
                raise

    def _prepare(self, spec: CellSpec, place: Place) -> list[wire.PlacedLayer]:
        """Directories, ids and cgroups of a cell to be."""
        try:
            if self._uids is not None:
                place.base = self._uids.take()
                place.ids = wire.Ids(base=place.base, range_size=MIN_UID_RANGE)
            place.directory.mkdir(mode=0o700)
            layers = []
            for number, layer in enumerate(choose_layers(spec.image.layers, place.ids, _owner_of)):
                top = place.directory / str(number)
                if layer.writable:
                    make_upper(top, place.base, layer.lowers[0] if layer.sealed else None, layer.owner)
                layers.append(wire.PlacedLayer(layer, str(top) if layer.writable else ""))
            place.layers = layers
        except OSError as error:
            raise SandboxError(f"the cell's directory {place.directory} cannot be made: {error.strerror}") from error
        if self._driver is not None:
            place.group = self._driver.make(spec.id, self._leave_room(spec.limits, place))
            if place.base is not None:
                place.group.delegate(place.base + wire.WARDEN_UID)
        return layers

    def _leave_room(self, limits: Limits, place: Place) -> Limits:
        """One process more, for the child that waits to become the next command (not in rootless cells)."""
        if limits.pids is None or place.base is None or self.level != NsBackend.level:
            return limits
        return msgspec.structs.replace(limits, pids=limits.pids + 1)

    async def _build(self, spec: CellSpec, place: Place, layers: list[wire.PlacedLayer]) -> NsCell:
        group = place.group
        request = wire.encode_create(
            ids=place.ids, port=self._port, hostname=spec.hostname, layers=layers, root_owns=spec.root == "owner",
            disk_bytes=spec.limits.disk_bytes or 0,
            processes=(spec.limits.pids or FORK_BACKSTOP) if group is None else 0, cgroups=group.enter_paths() if group else [],
        )  # fmt: skip
        reply, fds = await self._ask(wire.L_CREATE, request)
        if reply.op != wire.L_READY:
            close_all(fds)
            raise explain_build(reply.text, reply.a)
        self._landlock = reply.b >> wire.LANDLOCK_SHIFT
        pidfd, control, doors = take_doors(fds, reply.b)
        cell = NsCell(
            spec, pid=reply.a, pidfd=pidfd, control=control, doors=doors, rootless=place.ids.is_single, clean_up=self._clean_up, seal=self._seal,
            steps=GroupSteps(group, reply.a) if group else None,
        )  # fmt: skip
        self._cells[spec.id] = cell
        # Now, because PID 1 leaves the cell's cgroup for its own then: right after the builder's moves that is cheap, but
        # a moment later the kernel would make the first command wait for a grace period of RCU (some 6 ms).
        cell.prepare()
        return cell

    async def _clean_up(self, cell: NsCell) -> None:
        self._cells.pop(cell.id, None)
        place = self._places.get(cell.id)
        if place is not None:
            place.group = None  # the cell has removed it
        await self._unmake(cell.id)

    async def _unmake(self, cell_id: str) -> None:
        place = self._places.get(cell_id)
        if place is None:
            return
        if place.group is not None:
            place.group.remove()
        await self._remove([place.directory])
        if place.base is not None and self._uids is not None:
            self._uids.give_back(place.base)
        self._places.pop(cell_id, None)

    # ------------------------------------------------------------------ sealing

    async def _seal(self, cell_id: str, directory: Path, merge: bool, copy: bool) -> list[SealedLayer]:
        """Copy the writable layers of a cell; see :meth:`vallum.sandbox.base.Cell.seal`."""
        place = self._places[cell_id]
        if place.is_in_memory:
            raise SandboxError(
                "a cell with a quota on disk keeps its files in memory and cannot be sealed; leave out disk_bytes for snapshots"
            )
        requests = list_requests(place.layers, place.ids, directory, merge=merge, copy=copy)
        # All of them to their ends, also when one fails: nobody may still write when the directory is deleted.
        answers = await asyncio.gather(
            *(self._ask(wire.L_SEAL, request.payload, within_s=None) for request in requests), return_exceptions=True
        )
        sealed: dict[str, SealedLayer] = {}
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            reply, fds = answer
            close_all(fds)
            if reply.a:
                raise explain_seal(reply.text, reply.a)
            sealed.setdefault(request.at, read_summary(request, reply.text))
        return list(sealed.values())

    async def discard(self, paths: list[Path]) -> None:
        """See the contract."""
        await self._remove(paths)

    # ------------------------------------------------------------------ the launcher

    async def _remove(self, paths: list[Path]) -> None:
        if not paths:
            return
        reply, fds = await self._ask(wire.L_REMOVE, wire.encode_remove([str(path) for path in paths]), within_s=None)
        close_all(fds)
        if reply.a:
            raise SandboxError(
                f"{reply.text} cannot be deleted: {os.strerror(reply.a)} ({name_of(reply.a)}); delete it by hand"
            )

    async def _ask(
        self, op: int, payload: bytes, *, within_s: float | None = BUILD_WITHIN_S
    ) -> tuple[wire.Message, list[int]]:
        if self._launcher is None:
            raise SandboxError("the launcher of cells is not running; start the node again")
        if not self._launcher.is_open:
            await self._reap_launcher()
            self._start_launcher()
        self._serial = self._serial % 0xFFFFFFF0 + 1
        ident = self._serial
        future: asyncio.Future[tuple[wire.Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[ident] = future
        fd = make_payload(payload)
        try:
            self._launcher.send(wire.Message(op, ident), [fd])
            async with asyncio.timeout(within_s):
                return await future
        except BrokenPipeError:
            raise SandboxError("the launcher of cells has ended, and its cells with it; try again") from None
        except TimeoutError:
            self._cancel(ident)
            raise SandboxError(
                f"the cell was not ready after {within_s:.0f} s and was given up; is a layer's file system hanging?"
            ) from None
        except asyncio.CancelledError:
            self._cancel(ident)
            raise
        finally:
            os.close(fd)
            self._waiting.pop(ident, None)

    def _cancel(self, ident: int) -> None:
        if self._launcher is not None and self._launcher.is_open:
            with contextlib.suppress(BrokenPipeError):
                self._launcher.send(wire.Message(wire.L_CANCEL, ident))

    def _receive(self, message: wire.Message, fds: list[int], _: int) -> None:
        future = self._waiting.get(message.id)
        if future is None or future.done():
            close_all(fds)  # given up meanwhile: closing its control socket ends the cell
            return
        future.set_result((message, fds))

    def _lose_launcher(self) -> None:
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxError("the launcher of cells has ended, and its cells with it; try again"))


def choose_layers(layers: list[Layer], ids: wire.Ids, owner_of: Callable[[str], int]) -> list[Layer]:
    """What can be had: without a range of ids a layer of another owner cannot be copied up, so it is read-only.

    The root stays writable: new files can be made in it whoever owns what is there. Pure but for ``owner_of``.
    """
    if not ids.is_single:
        return layers
    chosen = []
    for layer in layers:
        may_write = layer.at == "/" or all(owner_of(lower) == ids.outer[0] for lower in layer.lowers)
        writable = layer.writable and may_write
        chosen.append(msgspec.structs.replace(layer, writable=writable))
    return chosen


def _owner_of(path: str) -> int:
    return os.stat(path).st_uid  # noqa: PTH116


def make_upper(top: Path, owner: int | None, like: str | None = None, given: Owner | None = None) -> None:
    """``top/upper`` and ``top/work``, owned by the cell's root (``owner``; None: by us).

    ``top`` may be entered by anyone who can reach it: only the cell can, its parents are 0700. ``like``: a sealed layer
    whose own directory had another mode or owner, which the overlay shows as those of its root. ``given``: without such
    a layer, whose the root is in the guest.
    """
    top.mkdir()
    top.chmod(0o755)
    for name in ("upper", "work"):
        (top / name).mkdir()
        (top / name).chmod(0o755)
        if owner is not None:
            os.chown(top / name, owner, owner)
    if like is None and given is not None and owner is not None:
        os.chown(top / "upper", owner + given.guest[0], owner + given.guest[1])
    if like is not None:
        seen = os.stat(like, follow_symlinks=False)  # noqa: PTH116
        if owner is not None:
            os.chown(top / "upper", owner + seen.st_uid - wire.STORE_BASE, owner + seen.st_gid - wire.STORE_BASE)
        (top / "upper").chmod(seen.st_mode & 0o7777)


def take_doors(fds: list[int], mask: int) -> tuple[int, socket.socket, Doors]:
    """(pidfd, control socket, doors) from the descriptors of a READY message."""
    pidfd, control, *rest = fds
    found = dict(
        zip([door for door in wire.DOORS if mask & door], (socket.socket(fileno=fd) for fd in rest), strict=True)
    )
    for sock in found.values():
        sock.setblocking(False)
    doors = Doors(
        tcp=[found[door] for door in (wire.DOOR_TCP4, wire.DOOR_TCP6) if door in found],
        dns=[found[door] for door in (wire.DOOR_DNS4, wire.DOOR_DNS6) if door in found],
        packets=found.get(wire.DOOR_PACKETS),
        diag=found.get(wire.DOOR_DIAG),
    )
    return pidfd, socket.socket(fileno=control), doors
