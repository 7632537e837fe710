"""Snapshots and changed files as the face gives them, and the requests they are asked for with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vallum.client import wire
from vallum.core.limits import Limits


@dataclass(frozen=True)
class Snapshot:
    """The files of a cell at one moment. It outlives the cell and the node, until it is deleted."""

    id: str
    run: str
    episode: str
    step: int | None
    """The last step before it; None before the first."""
    digest: str
    """``sha256:...``: the same for the same files on the same image."""
    parent: str | None
    """Snapshot that the cell was forked from."""
    created_ns: int
    """Wall clock, nanoseconds since the epoch."""
    image: str
    entries: int
    """Paths that it holds of its own."""
    bytes: int
    processes: str
    """``freeze`` or ``end``: what was done with the cell's processes. None of them is in it."""
    alive: int
    """How many there were."""
    depth: int
    """Snapshots that lie on one another to make it up, itself included."""


@dataclass(frozen=True)
class FileChange:
    """A path that is not as it was."""

    path: str
    change: Literal["added", "changed", "removed"]
    type: str
    """``file``, ``directory``, ``link``, ``fifo``, ``socket``; empty for what was removed and is not known."""
    bytes: int | None
    mode: int | None
    uid: int | None
    """Owner inside the cell."""
    sha256: str
    """Of the content (of a link: its target); of a file with large holes ``s`` and a digest of its blocks."""
    replaced: bool
    """A directory that was deleted and made again: what was in it before is gone."""


@dataclass(frozen=True)
class FilesChanged:
    """What :meth:`Sandbox.diff` found."""

    changes: list[FileChange]
    """In the order of their paths; the first thousand."""
    first_step: int | None
    last_step: int | None
    added: int
    changed: int
    removed: int
    left_out: int
    """How many there are beyond ``changes``."""


def name_of(snapshot: Snapshot | str) -> str:
    """Its id."""
    return snapshot if isinstance(snapshot, str) else snapshot.id


def read_snapshot(info: wire.SnapshotInfo) -> Snapshot:
    """From the wire."""
    return Snapshot(**{name: getattr(info, name) for name in info.__struct_fields__})


def read_diff(found: wire.FilesChanged) -> FilesChanged:
    """From the wire."""
    changes = [FileChange(**{name: getattr(one, name) for name in one.__struct_fields__}) for one in found.changes]
    return FilesChanged(
        changes=changes, first_step=found.first_step, last_step=found.last_step, added=found.added,
        changed=found.changed, removed=found.removed, left_out=found.left_out,
    )  # fmt: skip


def make_fork(
    seq: int,
    snapshot: Snapshot | str,
    *,
    run: str | None,
    episode: str | None,
    containment: str | None,
    allow: Sequence[str],
    rules: str | None,
    rules_name: str,
    limits: Limits | None,
    environ: Mapping[str, str] | None,
    user: str | None,
    workdir: str | None,
    control: wire.Control,
) -> wire.ForkSandbox:
    """The request of :meth:`Node.fork`."""
    return wire.ForkSandbox(
        seq=seq, snapshot=name_of(snapshot), containment=containment, allow=list(allow), rules=rules, rules_name=rules_name,
        limits=limits.check() if limits is not None else None, run=run, episode=episode, environ=dict(environ or {}),
        user=user, workdir=workdir, control=control,
    )  # fmt: skip
