"""A small file tree held in memory: named by what is in it, written to disk once, checked before it is used.

Pure but for :func:`write_tree` and :func:`read_tree`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vallum.core.errors import SandboxError

Kind = Literal["dir", "file", "link"]


@dataclass(frozen=True)
class Entry:
    """A file, directory or symbolic link as the guest will see it."""

    kind: Kind
    mode: int = 0o755
    """Permission bits; 0 for links."""
    uid: int = 0
    gid: int = 0
    data: bytes = b""
    """Content of a file, target of a link."""


Tree = dict[str, Entry]
"""Path relative to the root, without a leading slash -> entry. The root itself is ``.``."""


def make_dir(mode: int = 0o755, uid: int = 0) -> Entry:
    """A directory."""
    return Entry(kind="dir", mode=mode, uid=uid, gid=uid)


def make_file(text: str | bytes, mode: int = 0o644) -> Entry:
    """A file of root's."""
    return Entry(kind="file", mode=mode, data=text.encode() if isinstance(text, str) else text)


def make_link(target: str) -> Entry:
    """A symbolic link. Its target is text and is resolved inside the cell only."""
    return Entry(kind="link", mode=0, data=os.fsencode(target))


def add_parents(tree: Mapping[str, Entry]) -> Tree:
    """The tree, with a root-owned 0755 directory for each parent that was not named."""
    full = dict(tree)
    full.setdefault(".", make_dir())
    for path in tree:
        for parent in list(Path(path).parents)[:-1]:
            full.setdefault(str(parent), make_dir())
    return full


def digest_tree(tree: Mapping[str, Entry], *, owners: bool = True) -> str:
    """``sha256:`` of the manifest: path, kind, mode, owner and content of each entry, sorted by path.

    Without ``owners`` everything counts as root's: how a tree looks that an ordinary user wrote.
    """
    manifest = hashlib.sha256()
    for path in sorted(tree):
        entry = tree[path]
        owner = f"{entry.uid}:{entry.gid}" if owners else "-"
        content = hashlib.sha256(entry.data).hexdigest()
        manifest.update(f"{path!r} {entry.kind} {entry.mode:o} {owner} {content}\n".encode())
    return f"sha256:{manifest.hexdigest()}"


def materialise(tree: Mapping[str, Entry], directory: Path, name: str, *, owners: bool) -> Path:
    """``<directory>/<name>-<digest>``, written if it is not there. One that no longer matches is set aside.

    Several processes may do this at once: each writes its own copy, the first rename wins.

    Raises:
        SandboxError: it cannot be written.
    """
    digest = digest_tree(tree, owners=owners)
    final = directory / f"{name}-{digest.removeprefix('sha256:')[:32]}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if final.exists():
            if digest_tree(read_tree(final), owners=owners) == digest:
                return final
            # A live cell may stand on it, so it is kept, under another name.
            final.rename(directory / f".changed-{secrets.token_hex(8)}")
        temporary = directory / f".new-{secrets.token_hex(8)}"
        try:
            write_tree(tree, temporary, owners=owners)
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise SandboxError(
            f"the image {name} cannot be prepared in {directory}: {error.strerror} ({error.filename}); free some space or fix its permissions"
        ) from error
    return final


def write_tree(tree: Mapping[str, Entry], root: Path, *, owners: bool) -> None:
    """Write the tree to ``root``, which must not exist. Without ``owners`` all is the caller's.

    Raises:
        OSError: as the kernel says.
    """
    root.mkdir(mode=0o755)
    paths = sorted(path for path in tree if path != ".")
    for path in paths:
        entry, target = tree[path], root / path
        if entry.kind == "dir":
            target.mkdir()
        elif entry.kind == "link":
            target.symlink_to(os.fsdecode(entry.data))
        else:
            target.write_bytes(entry.data)
    for path in reversed([".", *paths]):
        entry, target = tree[path], root / path
        if owners:
            os.chown(target, entry.uid, entry.gid, follow_symlinks=False)
        if entry.kind != "link":
            target.chmod(entry.mode)


def read_tree(root: Path) -> Tree:
    """What is on disk, as a tree.

    Raises:
        OSError: it cannot be read.
    """
    tree: Tree = {".": _read_entry(root)}
    for parent, directories, names in os.walk(root, followlinks=False):
        for name in [*directories, *names]:
            path = Path(parent) / name
            tree[str(path.relative_to(root))] = _read_entry(path)
    return tree


def _read_entry(path: Path) -> Entry:
    found = path.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return Entry(kind="link", mode=0, uid=found.st_uid, gid=found.st_gid, data=os.fsencode(path.readlink()))
    if stat.S_ISREG(found.st_mode):
        return Entry(kind="file", mode=mode, uid=found.st_uid, gid=found.st_gid, data=path.read_bytes())
    return Entry(kind="dir", mode=mode, uid=found.st_uid, gid=found.st_gid)
