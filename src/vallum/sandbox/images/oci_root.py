"""What a container image lacks to be a cell: one small layer on top, and who commands run as.

The top layer holds the directories that a cell mounts on (so that an image with a link there cannot lead a mount
elsewhere, nor fail) and ``/etc/resolv.conf``, ``hosts`` and ``hostname``, as every container engine does. It is named
by its content: images with the same needs share it.
Covered: links in the image are not followed while its ``/etc/passwd`` is read here. Not covered: a user the image's
configuration names that is not in it is said when a command starts.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vallum.core.text import keep
from vallum.sandbox.images import accounts
from vallum.sandbox.images.beneath import NO_WAY, Beneath
from vallum.sandbox.images.layer import OPAQUE
from vallum.sandbox.images.oci_spec import Config, Process, parse_environ
from vallum.sandbox.images.skeleton import Entry, Tree, add_parents, make_dir, make_file, materialise
from vallum.sandbox.images.store import Store

HOSTNAME = "cell"
_MAX_ACCOUNTS_BYTES = 1 << 20
_AGENT = str(accounts.AGENT_ID)


@dataclass(frozen=True)
class Prepared:
    """How a cell of an image starts."""

    lowers: list[Path]
    """The uppermost first."""
    environ: dict[str, str]
    user: str
    workdir: str


def make_image(ref: str, digest: str, config: Config, lowers: Sequence[Path], store: Store) -> Prepared:
    """Put the top layer on an image's layers (the uppermost first).

    Raises:
        SandboxError: it cannot be written.
    """
    process = config.config or Process()
    workdir = posixpath.normpath("/" + (process.working_dir or "").lstrip("/"))
    environ = {"PATH": accounts.PATH, "LANG": "C.UTF-8", **parse_environ(process.env or ())}
    passwd = _read_text(lowers, "etc/passwd")
    group = _read_text(lowers, "etc/group")
    tree = make_tree()
    add_workdir(tree, workdir, lowers)
    if store.owners:
        user = choose_user(process.user or "", passwd, group)
    else:
        user = f"{_AGENT}:{_AGENT}"
        add_agent(tree, passwd, group)
    top = materialise(add_parents(tree), store.directory, "oci-top", owners=store.owners)
    return Prepared(lowers=[top, *lowers], environ=environ, user=user, workdir=workdir)


def make_tree() -> Tree:
    """What every cell of a container image gets."""
    return {
        "dev": make_dir(),
        "etc": make_dir(),
        "etc/hostname": make_file(HOSTNAME + "\n"),
        "etc/hosts": make_file(accounts.write_hosts(HOSTNAME)),
        "etc/resolv.conf": make_file(accounts.RESOLV_CONF),
        "proc": make_dir(),
        "run": make_dir(),
        "sys": make_dir(),
        "tmp": make_dir(0o1777),
    }


def add_workdir(tree: Tree, workdir: str, lowers: Sequence[Path]) -> None:
    """Make the directory that commands start in, if the image has none; what it has keeps owner and mode."""
    missing: Tree = {}
    path = ""
    for part in workdir.split("/")[1:]:
        path = f"{path}/{part}".lstrip("/")
        if not part or path in tree:
            continue
        found = find(lowers, path)
        if found is None:
            missing[path] = make_dir()
        elif not stat.S_ISDIR(found.mode):
            return  # a link, perhaps to a directory: only the cell can tell
        else:
            missing[path] = Entry(kind="dir", mode=stat.S_IMODE(found.mode), uid=found.uid, gid=found.gid)
    if missing and find(lowers, path) is None:
        tree.update(missing)


def choose_user(wanted: str, passwd: str, group: str) -> str:
    """Who commands run as: whom the image names; else ``agent``, if it has one; else root. Pure."""
    name, colon, its_group = wanted.partition(":")
    if not wanted:
        return "agent" if _find_line(passwd, "agent") else "0:0"
    if colon and not its_group.isdecimal() and (line := _find_line(group, its_group)):
        return f"{name}:{line[2]}"
    return wanted


def add_agent(tree: Tree, passwd: str, group: str) -> None:
    """Give the one user of a rootless cell a name and a home, if the image has nobody of its id."""
    if any(line[2:3] == [_AGENT] for line in _split(passwd)):
        return
    root = "root:*:0:0:root:/root:/bin/sh\n"
    agent = f"agent:*:{_AGENT}:{_AGENT}:agent:{accounts.AGENT_HOME}:/bin/sh\n"
    tree["etc/passwd"] = make_file(_end_line(passwd or root) + agent)
    if not any(line[2:3] == [_AGENT] for line in _split(group)):
        tree["etc/group"] = make_file(_end_line(group or "root:*:0:\n") + f"agent:*:{_AGENT}:\n")
    tree[accounts.AGENT_HOME.lstrip("/")] = make_dir(0o755, accounts.AGENT_ID)


def _split(text: str) -> list[list[str]]:
    return [line.split(":") for line in text.split("\n")]


def _find_line(text: str, name: str) -> list[str] | None:
    return next((line for line in _split(text) if line[0] == name and len(line) > 2 and line[2].isdecimal()), None)


def _end_line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


# ---------------------------------------------------------------------- looking at the layers as overlay shows them


@dataclass(frozen=True)
class Found:
    """What a path is."""

    layer: Path
    mode: int
    uid: int
    gid: int


def find(lowers: Sequence[Path], path: str) -> Found | None:
    """What overlay shows at a path (layers the uppermost first); None for nothing, and for what lies behind a link.

    Raises:
        OSError: the layers cannot be read.
    """
    parts = os.fsencode(path).split(b"/")
    for layer in lowers:
        found, is_last = _find_in(layer, parts)
        if found is not None or is_last:
            return found
    return None


def _find_in(layer: Path, parts: list[bytes]) -> tuple[Found | None, bool]:
    """(what one layer has there, whether nothing below it counts)."""
    tree = Beneath(layer, lambda: None)
    hides = False
    try:
        for depth, part in enumerate(parts):
            above = tree.open(b"/".join(parts[:depth]), make=False)
            try:
                hides = hides or (depth > 0 and _is_opaque(above))
                found = os.stat(part, dir_fd=above, follow_symlinks=False)
            finally:
                os.close(above)
            if stat.S_ISCHR(found.st_mode):
                return None, True  # a whiteout
            if depth + 1 == len(parts):
                return Found(layer, found.st_mode, found.st_uid, found.st_gid), True
            if not stat.S_ISDIR(found.st_mode):
                return None, True
    except FileNotFoundError:
        return None, hides
    except PermissionError:
        return None, True  # as an ordinary user: a directory that the image closed to its owner
    finally:
        tree.close()
    return None, hides


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:
        return False


def _read_text(lowers: Sequence[Path], path: str) -> str:
    """A small file of the image; empty when there is none, or none that can be read without following a link."""
    found = find(lowers, path)
    if found is None or not stat.S_ISREG(found.mode):
        return ""
    parent, _, name = path.rpartition("/")
    tree = Beneath(found.layer, lambda: None)
    try:
        above = tree.open(os.fsencode(parent), make=False)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        finally:
            os.close(above)
        with os.fdopen(fd, "rb") as file:
            return keep(file.read(_MAX_ACCOUNTS_BYTES)).replace("\0", "")
    except OSError as error:
        if error.errno in (*NO_WAY, errno.EACCES):
            return ""
        raise
    finally:
        tree.close()
