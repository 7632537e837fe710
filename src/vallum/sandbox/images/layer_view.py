"""What overlay shows of unpacked layers, asked without mounting them. No link is ever followed.

Overlay shows a directory with the owner and mode of the uppermost layer that has it. A layer that does not list a
directory (it only puts something into it) does not mean to change that: such *implied* ones are looked through.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vallum.core.text import keep
from vallum.sandbox.images.beneath import NO_WAY, Beneath
from vallum.sandbox.images.layer import OPAQUE

_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """What a path is."""

    layer: Path
    mode: int
    uid: int
    gid: int


class LayerView:
    """Layers, the uppermost first, each with its implied directories."""

    def __init__(self, layers: Sequence[tuple[Path, frozenset[bytes]]]) -> None:
        self._layers = layers

    def list_implied(self, check_stop: Callable[[], None]) -> list[str]:
        """Directories that overlay would show with the wrong owner or mode: implied where they are uppermost.

        ``check_stop`` is called for each, and may raise.
        """
        paths: set[bytes] = set()
        for number, (_, implied) in enumerate(self._layers[:-1]):
            for path in implied:
                check_stop()
                if self._is_shown(path, number):
                    paths.add(path)
        return [os.fsdecode(path) for path in sorted(paths)]

    def _is_shown(self, path: bytes, number: int) -> bool:
        shown = self._find(path, look_through=False)
        meant = self._find(path, look_through=True)
        if shown is None or meant is None or shown.layer != self._layers[number][0]:
            return False
        return (shown.mode, shown.uid, shown.gid) != (meant.mode, meant.uid, meant.gid)

    def find(self, path: str) -> Found | None:
        """What is at a path; None for nothing, and for what lies behind something that is no directory.

        Raises:
            OSError: the layers cannot be read.
        """
        return self._find(os.fsencode(path), look_through=True)

    def _find(self, path: bytes, *, look_through: bool) -> Found | None:
        parts = path.split(b"/")
        first: Found | None = None
        for layer, implied in self._layers:
            found, is_last = _find_in(layer, parts)
            if found is not None and first is None:
                first = found
            if found is not None and (not look_through or path not in implied or not stat.S_ISDIR(found.mode)):
                # Below an implied directory only another directory is the same one.
                return found if found is first or stat.S_ISDIR(found.mode) else first
            if is_last:
                break
        return first

    def read_text(self, path: str) -> str:
        """A small file of the image; empty when there is none, or none that can be read without following a link."""
        found = self.find(path)
        if found is None or not stat.S_ISREG(found.mode):
            return ""
        parent, _, name = path.rpartition("/")
        tree = Beneath(found.layer)
        try:
            above = tree.open(os.fsencode(parent), make=False)
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            finally:
                os.close(above)
            with os.fdopen(fd, "rb") as file:
                return keep(file.read(_MAX_TEXT_BYTES)).replace("\0", "")
        except OSError as error:
            if error.errno in (*NO_WAY, errno.EACCES):
                return ""
            raise
        finally:
            tree.close()


def _find_in(layer: Path, parts: list[bytes]) -> tuple[Found | None, bool]:
    """(what one layer has there, whether nothing below it counts)."""
    tree = Beneath(layer)
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
                return _describe(tree, layer, parts, found, hides)
            if not stat.S_ISDIR(found.st_mode):
                return None, True
    except FileNotFoundError:
        return None, hides
    except PermissionError:
        return None, True  # as an ordinary user: a directory that the image closed to its owner
    finally:
        tree.close()
    return None, hides


def _describe(tree: Beneath, layer: Path, parts: list[bytes], found: os.stat_result, hides: bool) -> tuple[Found, bool]:
    if stat.S_ISDIR(found.st_mode) and not hides:
        try:
            fd = tree.open(b"/".join(parts), make=False)
        except PermissionError:
            pass  # closed to its owner: it is there, and what is in it does not matter here
        else:
            hides = _is_opaque(fd)
            os.close(fd)
    return Found(layer, found.st_mode, found.st_uid, found.st_gid), hides or not stat.S_ISDIR(found.st_mode)


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:
        return False
