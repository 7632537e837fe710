"""Snapshots of live cells: taken, listed, deleted, and what changed between two moments of a cell's files.

Only files are kept. A cell's processes go on, or are ended, as the caller chooses; their memory is in no snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vallum.client import wire
from vallum.core import clock
from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.events import FileChanged, FilesCompared, SnapshotMade
from vallum.core.scope import BY_NODE, Attribution
from vallum.node.live import LiveCell
from vallum.sandbox.base import Backend, Image, Processes, Sealing
from vallum.sandbox.images.syncfs_priv import sync_file_system
from vallum.sandbox.snapshots.changes import Change, compare, read_listing
from vallum.sandbox.snapshots.store import Manifest, SnapshotStore, Terms, digest_of, must_merge, strip_sealed

log = logging.getLogger(__name__)

MAX_TOLD = 1000
"""Changes of one comparison that are recorded one by one; all are counted."""


@dataclass
class Point:
    """A moment of a cell's files that later ones can be compared with."""

    step: int | None
    """The last step before it."""
    directory: Path
    """Holds the listings."""
    snapshot: str | None = None


@dataclass
class Ground:
    """What a live cell stands on."""

    level: str
    image: Image
    terms: Terms
    origin: Manifest | None
    points: list[Point] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    places: dict[int, str] = field(default_factory=dict)
    """Number of a writable layer -> where it is in the guest."""

    @classmethod
    def of(cls, request: wire.CreateSandbox, image: Image, origin: Manifest | None) -> Ground:
        """The ground of a cell to be."""
        terms = Terms(
            containment=request.containment, allow=request.allow, rules=request.rules, rules_name=request.rules_name,
            limits=request.limits, root=request.root,
        )  # fmt: skip
        return cls(level=request.level, image=image, terms=terms, origin=origin)


class Snapshots:
    """The snapshots of the node's home and the grounds of its live cells."""

    def __init__(self, directory: Path, backends: Mapping[str, Backend]) -> None:
        self._directory = directory
        self._backends = backends
        self.store = SnapshotStore(directory)
        self._grounds: dict[str, Ground] = {}
        self._unsynced: set[str] = set()
        self._syncing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is there and remove what a crash left half-made.

        Raises:
            SandboxError: it cannot be read, or a leftover cannot be deleted.
        """
        leftovers = self.store.open()
        if leftovers:
            log.info("removing %d half-made snapshots", len(leftovers))
            await next(iter(self._backends.values())).discard(leftovers)
        self._sync_soon(self.store.unsynced())

    def stop(self) -> None:
        """Nothing more is written."""
        if self._syncing is not None:
            self._syncing.cancel()

    # ------------------------------------------------------------------ live cells

    def stand(self, sandbox: str, ground: Ground) -> None:
        """A cell is about to be built on this; what it lies on must stay."""
        self._grounds[sandbox] = ground
        if ground.origin is not None:
            self.store.use(sandbox, ground.origin)

    def leave(self, sandbox: str) -> None:
        """The cell has ended, or never was."""
        ground = self._grounds.pop(sandbox, None)
        self.store.release(sandbox)
        if ground is not None and ground.points:
            for point in ground.points:
                _remove_flat(point.directory)
            _remove_flat(self._points_of(sandbox))

    def make_image(self, manifest: Manifest, *, rootless: bool) -> Image:
        """What a fork is built on.

        Raises:
            SandboxError: its image is gone, or the snapshot's files are of other users than this node's cells have.
        """
        if manifest.rootless != rootless:
            had = "one user" if manifest.rootless else "users of their own"
            raise SandboxError(
                f"snapshot {manifest.id} cannot be forked: it is of a node whose cells have {had}; fork it as the user who made it"
            )
        return self.store.make_image(manifest)

    # ------------------------------------------------------------------ taking

    async def take(self, live: LiveCell, processes: Processes) -> Manifest:
        """Seal the cell's files as they are now, and record it with what changed since the last time.

        Raises:
            CellGone, SandboxError: it could not be done; nothing half-made is left, and the cell goes on.
            RecordError: it could not be recorded, so it is not kept.
        """
        ground = self._grounds[live.id]
        async with ground.lock:
            last_step = max(live.steps, default=None)
            chain = ground.origin.chain if ground.origin is not None else []
            merge = must_merge(ground.image, len(chain))
            draft = self.store.draft()
            try:
                sealing = await live.cell.seal(draft, processes=processes, merge=merge)
                manifest = self._describe(live, ground, sealing, [] if merge else chain, processes, last_step)
                self.store.commit(draft, manifest)
            except BaseException:
                await asyncio.shield(self._discard(ground.level, draft))
                raise
            try:
                self._record(live, manifest, sealing)
                previous = ground.points[-1] if ground.points else None
                point = self._keep_point(live.id, ground, manifest, last_step)
            except BaseException:
                await asyncio.shield(self._discard(ground.level, self.store.remove(manifest.id)))
                raise
            self._sync_soon([manifest.id])
            try:
                await self._tell_changes(live, ground, previous, point)
            except SandboxError:
                if not live.is_closing:
                    raise
                log.info("cell %s ended before it was told what had changed in it", live.id)
        return manifest

    def _describe(
        self, live: LiveCell, ground: Ground, sealing: Sealing, chain: list[str], processes: str, step: int | None
    ) -> Manifest:
        image = strip_sealed(ground.image)
        below = ground.origin.digest if ground.origin is not None and chain else ""
        name = f"s{secrets.token_hex(6)}"
        return Manifest(
            id=name, created_ns=clock.wall_ns(), boot=self.store.boot, level=ground.level, rootless=live.cell.rootless,
            run=live.book.run, episode=live.episode, step=step, sandbox=live.id,
            parent=ground.origin.id if ground.origin is not None else None,
            image=image, layers=sealing.layers, chain=[name, *chain],
            digest=digest_of(image, below, sealing.layers), terms=ground.terms, processes=processes, alive=sealing.alive,
        )  # fmt: skip

    def _record(self, live: LiveCell, manifest: Manifest, sealing: Sealing) -> None:
        live.emit(
            SnapshotMade(
                t_ns=clock.wall_ns(), mono_ns=clock.mono_ns(), scope=live.scope(manifest.step), attribution=BY_NODE,
                snapshot=manifest.id, digest=manifest.digest, parent=manifest.parent,
                layers={layer.at: layer.digest for layer in manifest.layers},
                entries=sum(layer.entries for layer in manifest.layers), bytes=sum(layer.bytes for layer in manifest.layers),
                processes=manifest.processes, alive=manifest.alive, stopped_ns=sealing.stopped_ns,
            )
        )  # fmt: skip

    async def _discard(self, level: str, path: Path) -> None:
        try:
            await self._backends[level].discard([path])
        except SandboxError as error:
            log.error("%s is left and will be removed at the next start: %s", path, error)

    async def delete(self, snapshot: str) -> None:
        """Delete a snapshot.

        Raises:
            InvalidInput: there is none of that id, or something needs it.
        """
        level = self.store.get(snapshot).level
        doomed = self.store.remove(snapshot)
        await self._backends.get(level, next(iter(self._backends.values()))).discard([doomed])

    # ------------------------------------------------------------------ comparing

    async def compare(self, live: LiveCell, since: int | str | None) -> wire.FilesChanged:
        """What changed in the cell's files since a step, a snapshot, or (None) since the cell began; recorded, too.

        Raises:
            InvalidInput: nothing was kept at that moment.
        """
        ground = self._grounds[live.id]
        async with ground.lock:
            old = self._find_point(live, ground, since)
            directory = self._points_of(live.id) / str(len(ground.points))
            directory.mkdir(mode=0o700, parents=True)
            point = Point(max(live.steps, default=None), directory)
            ground.points.append(point)
            try:
                sealing = await live.cell.seal(directory, copy=False)
            except BaseException:
                ground.points.remove(point)
                _remove_flat(directory)
                raise
            ground.places = {layer.number: layer.at for layer in sealing.layers}
            return await self._tell_changes(live, ground, old, point)

    def _find_point(self, live: LiveCell, ground: Ground, since: int | str | None) -> Point | None:
        if since is None or (ground.origin is not None and since == ground.origin.id):
            return None
        for point in reversed(ground.points):
            if since in (point.step, point.snapshot) and since is not None:
                return point
        if isinstance(since, int):
            raise InvalidInput(
                f"the files of cell {live.id} were not kept at the end of step {since}: call snapshot() or diff() there"
            )
        raise InvalidInput(
            f"snapshot {since!r} is none of cell {live.id}: give one of its own, or the one it was forked from"
        )

    def _keep_point(self, sandbox: str, ground: Ground, manifest: Manifest, step: int | None) -> Point:
        """The snapshot's listings, kept for as long as the cell lives even if the snapshot is deleted."""
        directory = self._points_of(sandbox) / str(len(ground.points))
        try:
            directory.mkdir(mode=0o700, parents=True)
            for layer in manifest.layers:
                os.link(self.store.listing(manifest, layer.number), directory / f"{layer.number}.list")
        except OSError as error:
            raise SandboxError(f"the listings of a snapshot cannot be kept: {error.strerror}") from error
        ground.places = {layer.number: layer.at for layer in manifest.layers}
        point = Point(step, directory, manifest.id)
        ground.points.append(point)
        return point

    def _points_of(self, sandbox: str) -> Path:
        return self._directory / f".cell-{sandbox}"

    async def _tell_changes(self, live: LiveCell, ground: Ground, old: Point | None, new: Point) -> wire.FilesChanged:
        """Compare in a thread (a guest may have made millions of files), then record what was found."""
        counts, told = await asyncio.to_thread(_count, _changes(dict(ground.places), old, new))
        first = 0 if old is None or old.step is None else old.step + 1
        last = new.step if new.step is not None and new.step >= first else None
        steps = (first, last) if last is not None else (None, None)
        only = last if last is not None and first == last else None
        # What an earlier step left running can change files in a later one: the range is known, the hand is not.
        attribution = Attribution(method="control", confidence=0.9 if only is not None else 0.5)
        for change in told:
            live.emit(
                FileChanged(
                    t_ns=clock.wall_ns(), mono_ns=clock.mono_ns(), scope=live.scope(only), attribution=attribution,
                    path=change.path, change=change.change, type=change.type, bytes=change.bytes, mode=change.mode,
                    uid=change.uid, sha256=change.sha256, replaced=change.replaced, first_step=steps[0], last_step=steps[1],
                )
            )  # fmt: skip
        live.emit(
            FilesCompared(
                t_ns=clock.wall_ns(), mono_ns=clock.mono_ns(), scope=live.scope(only), attribution=BY_NODE,
                snapshot=new.snapshot, since=old.snapshot if old is not None else None,
                first_step=steps[0], last_step=steps[1], **counts, left_out=sum(counts.values()) - len(told),
            )
        )  # fmt: skip
        return wire.FilesChanged(
            changes=[
                wire.FileChange(
                    path=one.path, change=one.change, type=one.type, bytes=one.bytes, mode=one.mode, uid=one.uid,
                    sha256=one.sha256, replaced=one.replaced,
                )
                for one in told
            ],
            first_step=steps[0], last_step=steps[1], left_out=sum(counts.values()) - len(told), **counts,
        )  # fmt: skip

    # ------------------------------------------------------------------ durability

    def _sync_soon(self, names: list[str]) -> None:
        self._unsynced.update(names)
        if self._unsynced and (self._syncing is None or self._syncing.done()):
            self._syncing = asyncio.ensure_future(self._sync())

    async def _sync(self) -> None:
        """One sync for however many came meanwhile: it is of the whole file system."""
        while self._unsynced:
            names, self._unsynced = self._unsynced, set()
            try:
                await asyncio.to_thread(_sync_directory, self._directory)
                self.store.mark_synced(names)
            except OSError as error:
                log.error("snapshots %s may not survive a loss of power: %s", ", ".join(sorted(names)), error.strerror)


def settle_terms(fork: wire.ForkSandbox, origin: Manifest, run: str | None) -> wire.CreateSandbox:
    """The cell that a fork asks for: as the parent's, but for what is given. ``run``: where none is given. Pure."""
    terms = origin.terms
    is_own = fork.containment is not None
    rules, name = (fork.rules, fork.rules_name) if is_own or fork.rules is not None else (terms.rules, terms.rules_name)
    return wire.CreateSandbox(
        seq=fork.seq, image=origin.image.ref, containment=fork.containment if is_own else terms.containment,
        allow=fork.allow if is_own else [*terms.allow, *fork.allow], rules=rules, rules_name=name, mounts=[],
        limits=fork.limits or terms.limits, run=fork.run or run, episode=fork.episode, environ=fork.environ,
        user=fork.user, workdir=fork.workdir, level=origin.level, root=terms.root, command=[],
        control=fork.control or wire.Control(),
    )  # fmt: skip


def describe(manifest: Manifest) -> wire.SnapshotInfo:
    """What a client is told of a snapshot. Pure."""
    return wire.SnapshotInfo(
        id=manifest.id, run=manifest.run, episode=manifest.episode, step=manifest.step, digest=manifest.digest,
        parent=manifest.parent, created_ns=manifest.created_ns, image=manifest.image.ref,
        entries=sum(layer.entries for layer in manifest.layers), bytes=sum(layer.bytes for layer in manifest.layers),
        processes=manifest.processes, alive=manifest.alive, depth=len(manifest.chain),
    )  # fmt: skip


def _changes(places: dict[int, str], old: Point | None, new: Point) -> Iterator[Change]:
    for number, at in sorted(places.items()):
        before = read_listing(old.directory / f"{number}.list") if old is not None else None
        yield from compare(at, before, read_listing(new.directory / f"{number}.list"))


def _count(changes: Iterator[Change]) -> tuple[dict[str, int], list[Change]]:
    counts = {"added": 0, "changed": 0, "removed": 0}
    told: list[Change] = []
    for change in changes:
        counts[change.change] += 1
        if len(told) < MAX_TOLD:
            told.append(change)
    return counts, told


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file_system(fd)
    finally:
        os.close(fd)


def _remove_flat(directory: Path) -> None:
    """Remove a directory of our own listings; what cannot be removed goes at the next start."""
    with contextlib.suppress(OSError):
        for entry in directory.iterdir():
            if not entry.is_dir():
                entry.unlink()
        directory.rmdir()
