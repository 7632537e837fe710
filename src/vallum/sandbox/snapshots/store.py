"""Where snapshots are kept: one directory each, complete or not there at all.

``<store>/<id>/manifest.json``, and for each writable layer ``<n>/`` (the sealed tree) and ``<n>.list`` (its listing).
A snapshot lies on others (its *chain*) until a merge makes it stand alone. One process writes here: the node of the home.

Covered: a node killed at any moment (a snapshot appears by one rename; what has no manifest is removed at the next
start); a machine that lost power (what was not yet on the disk when it booted again is removed); deleting what
something still needs. Not covered: somebody who can write to the node's own directories.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.limits import Limits
from vallum.core.text import show
from vallum.sandbox.base import GuestRoot, Image, Layer, SealedLayer

MANIFEST = "manifest.json"
SYNCED = "synced"
MAX_CHAIN = 64
"""Snapshots that lie on one another before they are merged into one."""
MAX_DIRECTORIES = 256
"""Lower directories of a cell, of all its layers, before they are merged."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell was allowed: a fork gets the same unless told otherwise."""

    containment: str | None
    """None: what the rule file says."""
    allow: list[str]
    rules: str | None
    """Text of a rule file."""
    rules_name: str
    limits: Limits
    root: GuestRoot = "plain"
    """What root of the cell may, see ``CellSpec.root``."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot."""

    id: str
    created_ns: int
    boot: str
    """Boot id of the machine when it was made."""
    level: str
    rootless: bool
    """Whether its files are of one user (the node's own) instead of the store's range of ids."""
    run: str
    episode: str
    step: int | None
    """The last step before it; None before the first."""
    sandbox: str
    parent: str | None
    """Snapshot that the cell was forked from."""
    image: Image
    """What the first cell of the chain was built on, without sealed layers."""
    layers: list[SealedLayer]
    chain: list[str]
    """Snapshots whose layers make it up, the uppermost (itself) first."""
    digest: str
    """``sha256:...`` over the image, the chain below and the listings of its own layers."""
    terms: Terms
    processes: str
    """``freeze`` or ``end``: what was done with the cell's processes. None of them is in the snapshot."""
    alive: int
    """How many there were."""


class SnapshotStore:
    """The snapshots of a home. Not safe for threads; the node has one loop."""

    def __init__(self, directory: Path) -> None:
        """Nothing is done before :meth:`open`."""
        self._directory = directory
        self._known: dict[str, Manifest] = {}
        self._users: dict[str, tuple[str, ...]] = {}
        self._boot = _BOOT_ID.read_text("ascii").strip()

    def open(self) -> list[Path]:
        """Read what is there; what a crash left half-made is returned, for the caller to delete.

        Raises:
            SandboxError: the directory cannot be made or read.
        """
        leftovers = []
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            entries = sorted(self._directory.iterdir())
        except OSError as error:
            raise SandboxError(f"the snapshots in {self._directory} cannot be read: {error.strerror}") from error
        for entry in entries:
            manifest = read_manifest(entry)
            if manifest is None or not (manifest.boot == self._boot or (entry / SYNCED).exists()):
                leftovers.append(entry)
            else:
                self._known[manifest.id] = manifest
        broken = {name for name, one in self._known.items() if not set(one.chain) <= self._known.keys()}
        leftovers += [self._directory / name for name in broken]
        for name in broken:
            del self._known[name]
        return leftovers

    def all(self) -> list[Manifest]:
        """Every snapshot, the newest first."""
        return sorted(self._known.values(), key=lambda one: one.created_ns, reverse=True)

    def get(self, snapshot: str) -> Manifest:
        """The snapshot of that id.

        Raises:
            InvalidInput: there is none (any more).
        """
        found = self._known.get(snapshot)
        if found is None:
            raise InvalidInput(
                f"there is no snapshot {show(snapshot, 40)!r} in this home (was it deleted?): 'vallum snapshots' lists them"
            )
        return found

    def make_image(self, manifest: Manifest) -> Image:
        """What a fork is built on: the image with the chain's sealed layers over it.

        Raises:
            SandboxError: the image that it lies on is gone.
        """
        for layer in manifest.image.layers:
            if missing := [lower for lower in layer.lowers if not os.path.isdir(lower)]:  # noqa: PTH112 - strings
                raise SandboxError(
                    f"snapshot {manifest.id} cannot be forked: {missing[0]} of its image {manifest.image.ref} is gone; put it back"
                )
        chain = [self.get(name) for name in manifest.chain]
        layers = [self._cover(layer, chain) for layer in manifest.image.layers]
        return msgspec.structs.replace(manifest.image, layers=layers)

    def _cover(self, layer: Layer, chain: Iterable[Manifest]) -> Layer:
        sealed = [
            str(self._directory / one.id / str(part.number))
            for one in chain
            for part in one.layers
            if part.at == layer.at
        ]
        return msgspec.structs.replace(layer, lowers=[*sealed, *layer.lowers], sealed=len(sealed))

    def listing(self, manifest: Manifest, number: int) -> Path:
        """The listing of a snapshot's layer: what its cell's own layer held, also where more was merged into it."""
        own = self._directory / manifest.id / f"{number}.own.list"
        return own if own.exists() else self._directory / manifest.id / f"{number}.list"

    # ------------------------------------------------------------------ making

    def draft(self) -> Path:
        """A fresh directory that becomes a snapshot by :meth:`commit`; its name says that it is none yet.

        Raises:
            SandboxError: it cannot be made.
        """
        path = self._directory / f".new-{secrets.token_hex(6)}"
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise SandboxError(
                f"no snapshot can be made in {self._directory}: {error.strerror}; free disk space or inodes there"
            ) from error
        return path

    def commit(self, draft: Path, manifest: Manifest) -> None:
        """Make the draft a snapshot, in one piece.

        Raises:
            SandboxError: it cannot be written; the draft is still there.
        """
        try:
            (draft / MANIFEST).write_bytes(msgspec.json.encode(manifest))
            draft.rename(self._directory / manifest.id)
        except OSError as error:
            raise SandboxError(
                f"the snapshot could not be written to {self._directory}: {error.strerror}; free disk space there"
            ) from error
        self._known[manifest.id] = manifest

    @property
    def boot(self) -> str:
        """This boot of the machine."""
        return self._boot

    def mark_synced(self, names: Iterable[str]) -> None:
        """Note that these are on the disk, so that they count after a loss of power, too."""
        for name in names:
            if name in self._known:
                (self._directory / name / SYNCED).touch(mode=0o600)

    def unsynced(self) -> list[str]:
        """Those that are not known to be on the disk."""
        return [name for name in self._known if not (self._directory / name / SYNCED).exists()]

    # ------------------------------------------------------------------ use and deletion

    def use(self, sandbox: str, manifest: Manifest) -> None:
        """A cell is (about to be) built on the snapshot: its chain must stay."""
        self._users[sandbox] = tuple(manifest.chain)

    def release(self, sandbox: str) -> None:
        """The cell has ended. One that used none is no error."""
        self._users.pop(sandbox, None)

    def remove(self, snapshot: str) -> Path:
        """Take a snapshot out of the list; the directory that is returned is to be deleted.

        Raises:
            InvalidInput: there is none of that id; a live cell or another snapshot needs it.
        """
        self.get(snapshot)
        cells = sorted(name for name, chain in self._users.items() if snapshot in chain)
        others = sorted(name for name, one in self._known.items() if name != snapshot and snapshot in one.chain)
        if cells or others:
            what = f"cell {cells[0]} runs on it" if cells else f"snapshot {others[0]} lies on it"
            more = f" (and {len(cells) + len(others) - 1} more)" if len(cells) + len(others) > 1 else ""
            raise InvalidInput(f"snapshot {snapshot} cannot be deleted: {what}{more}; end or delete that first")
        doomed = self._directory / f".old-{secrets.token_hex(6)}"
        try:
            (self._directory / snapshot).rename(doomed)
        except OSError as error:
            raise SandboxError(f"snapshot {snapshot} cannot be deleted: {error.strerror}") from error
        del self._known[snapshot]
        return doomed


def must_merge(image: Image, chain: int) -> bool:
    """Whether a cell of this image is so deep that its snapshot should take in the sealed layers below. Pure."""
    directories = sum(len(layer.lowers) + layer.writable for layer in image.layers)
    writable = sum(layer.writable for layer in image.layers)
    return chain + 1 > MAX_CHAIN or directories + writable > MAX_DIRECTORIES


def strip_sealed(image: Image) -> Image:
    """The image without the sealed layers of a chain. Pure."""
    layers = [msgspec.structs.replace(layer, lowers=layer.lowers[layer.sealed :], sealed=0) for layer in image.layers]
    return msgspec.structs.replace(image, layers=layers)


def digest_of(image: Image, below: str, layers: Iterable[SealedLayer]) -> str:
    """Identity of a snapshot: of what it lies on (``below``: the parent's digest, or empty) and of its listings. Pure."""
    parts = [image.digest, below, *(f"{layer.at}\0{layer.digest}" for layer in layers)]
    joined = "\0".join(parts).encode("utf-8", "surrogateescape")
    return f"sha256:{hashlib.sha256(joined).hexdigest()}"


def read_manifest(directory: Path) -> Manifest | None:
    """What a directory of the store is; None when it is no snapshot (a draft, or damaged)."""
    if directory.name.startswith("."):
        return None
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, *MALFORMED):
        return None
    return manifest if manifest.id == directory.name else None


def list_manifests(directory: Path) -> list[Manifest]:
    """The snapshots of a home, the newest first, for readers that are not its node."""
    try:
        found = [read_manifest(entry) for entry in directory.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((one for one in found if one is not None), key=lambda one: one.created_ns, reverse=True)
