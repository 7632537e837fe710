"""A directory of ours and everything beneath it, reached one part at a time and never through a link.

For trees that nobody but us can reach while this is used: what was looked at is still so a moment later. What the
tree's author put there (links, other kinds of files) leads nowhere: a part that is not a directory ends the way.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from vallum.core.tar import LayerError
from vallum.core.text import keep, show

NO_WAY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What a way that is not there, or leads through something else than directories, ends with."""

_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Beneath:
    """Ways from one directory. Paths are bytes joined by '/', without '..'; the directory itself is empty."""

    def __init__(
        self,
        directory: Path,
        *,
        on_step: Callable[[], None] | None = None,
        on_made: Callable[[bytes], None] | None = None,
    ) -> None:
        """``on_step`` is called for each part of each way, ``on_made`` for each directory that was made on one.

        Raises:
            OSError: it is not there.
        """
        self.root = os.open(directory, _WALK)
        self._on_step = on_step
        self._on_made = on_made
        self._parent: tuple[bytes, int] | None = None

    def close(self) -> None:
        """Let go of the directory."""
        self._forget_parent()
        os.close(self.root)

    def open(self, path: bytes, *, make: bool) -> int:
        """As :meth:`walk`, to be read and changed."""
        walked = self.walk(path, make=make)
        try:
            return os.open(b".", _LIST, dir_fd=walked)
        finally:
            os.close(walked)

    def open_parent(self, path: bytes) -> int:
        """A directory, kept until another is asked for: members of one directory come together."""
        if self._parent is None or self._parent[0] != path:
            fd = self.walk(path, make=True)
            self._forget_parent()
            self._parent = (path, fd)
        return self._parent[1]

    def _forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def walk(self, path: bytes, *, make: bool) -> int:
        """A descriptor (of the path only) of a directory.

        Args:
            path: where.
            make: make what is missing, root's and 0755.

        Raises:
            OSError: ``NO_WAY``, or the file system's own trouble.
            LayerError: with ``make``, a part is something else than a directory.
        """
        fd = os.dup(self.root)
        try:
            parts = path.split(b"/") if path else []
            for number, part in enumerate(parts, 1):
                if self._on_step is not None:
                    self._on_step()
                try:
                    below = os.open(part, _WALK, dir_fd=fd)
                except FileNotFoundError:
                    if not make:
                        raise
                    if self._on_made is not None:
                        self._on_made(b"/".join(parts[:number]))
                    os.mkdir(part, 0o700, dir_fd=fd)
                    # It is no link: we made it a moment ago and nobody else can.
                    os.chmod(part, 0o755, dir_fd=fd)  # noqa: S103 - of the image, below a directory of mode 0700
                    below = os.open(part, _WALK, dir_fd=fd)
                os.close(fd)
                fd = below
        except BaseException as error:
            os.close(fd)
            if make and isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.ELOOP):
                way = show(keep(path[:300]))
                raise LayerError(
                    f"the way {way!r} leads through something that is no directory of the layer (a link?)"
                ) from error
            raise
        return fd


def clear(parent: int, name: bytes) -> None:
    """Remove what is there: the later member counts."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        remove_tree(name, parent)


def remove_tree(name: bytes | str, parent: int | None = None) -> None:
    """Delete a directory and all below it, whatever the modes; never follows a link. One that is gone is no error.

    For trees that nobody else can reach, at most :data:`~vallum.core.tar.MAX_DEPTH` deep.

    Raises:
        OSError: something cannot be deleted.
    """
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        os.chmod(name, 0o700, dir_fd=parent)
        fd = os.open(name, _LIST, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        with os.scandir(fd) as entries:
            found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_below in found:
            if is_below:
                remove_tree(child, fd)
            else:
                os.unlink(child, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def exists(parent: int, name: bytes) -> bool:
    """Whether there is anything of that name."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def is_directory(parent: int, name: bytes) -> bool:
    """Whether that is a directory (and not a link to one)."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def is_same(parent: int, name: bytes, other: os.stat_result) -> bool:
    """Whether that is one file with ``other``."""
    try:
        return os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), other)
    except FileNotFoundError:
        return False
