"""What a container image lacks to be a cell: one small layer on top, and who commands run as.

The top layer holds the directories that a cell mounts on (so that an image with a link there cannot lead a mount
elsewhere, nor fail) and ``/etc/resolv.conf``, ``hosts`` and ``hostname``, as every container engine does. It is named
by its content: images with the same needs share it.
Covered: links in the image are not followed while its ``/etc/passwd`` is read here. Not covered: a user the image's
configuration names that is not in it is said when a command starts.
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vallum.sandbox.images import accounts
from vallum.sandbox.images.layer_view import LayerView
from vallum.sandbox.images.oci_spec import Config, Process, parse_environ
from vallum.sandbox.images.skeleton import Entry, Tree, add_parents, make_dir, make_file, materialise
from vallum.sandbox.images.store import Store

HOSTNAME = "cell"
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
    view = LayerView([(layer, store.read_implied(layer)) for layer in lowers])
    passwd, group = view.read_text("etc/passwd"), view.read_text("etc/group")
    tree = make_tree()
    if workdir != "/" and view.find(workdir[1:]) is None:
        add_directory(tree, workdir[1:], view)
    for path in view.list_implied(store.check_stop):
        add_directory(tree, path, view)
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


def add_directory(tree: Tree, path: str, view: LayerView) -> None:
    """Put a directory of the image, or one that it lacks, on top: with the owners and modes that it has there.

    What the tree has stays; a way through something that is no directory is left to the image.
    """
    ways: Tree = {}
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        way = "/".join(parts[:depth])
        if way in tree and tree[way].kind != "dir":
            return
        if way in tree:
            continue
        found = view.find(way)
        if found is None:
            ways[way] = make_dir()
        elif not stat.S_ISDIR(found.mode):
            return  # a link, perhaps to a directory: only the cell can tell
        else:
            ways[way] = Entry(kind="dir", mode=stat.S_IMODE(found.mode), uid=found.uid, gid=found.gid)
    tree.update(ways)


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
