"""Unpacks one layer of an OCI image into a directory that overlay can use as a lower one. Security code.

A layer's author is hostile. Every operation is relative to a descriptor of the directory it happens in, and that
descriptor was reached from the root of the target one part at a time without following any link. So nothing that a
layer made (a link, a second entry of the same name) can lead a later member elsewhere.

Covered: names with ``..`` or absolute, ways through links, hard links to anything but a file of the same layer,
entries that replace others, devices (never made: the name is absent in the cell), setuid bits (kept as data: the
directory above is 0700 and cells mount layers nosuid), extended attributes and with them capabilities (never set),
owners beyond a cell's range, limits of bytes and entries, a full disk. Targets of symbolic links are text: they are
resolved inside the cell only.
Not covered: parents that the archive does not list become root's with mode 0755 here; who shows the layer gives them
what the layers below say (``implied``, see ``layer_view.py``).

Whiteouts take overlay's own form: ``.wh.x`` a character device 0/0 (making one needs no privilege since Linux 5.8),
``.wh..wh..opq`` the attribute ``user.overlay.opaque`` (cells mount with ``userxattr``). They are applied at the end:
a layer that deletes a directory and makes it anew gets an opaque one.
Source: OCI image-spec, layer.md; Linux, Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.core.tar import LayerError, Member, TarReader, split_name
from vallum.core.text import keep, show
from vallum.sandbox.base import MIN_UID_RANGE
from vallum.sandbox.images.beneath import NO_WAY, Beneath, clear, exists, is_directory, is_same
from vallum.sandbox.images.layer_stream import LayerLimits, LayerStream

OPAQUE = "user.overlay.opaque"
WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
_AUFS_MARK = b".wh..wh."
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 17
_LOOK_EVERY_BYTES = 16 << 20
_LOOK_EVERY_ENTRIES = 512
_KEPT_BYTES = 128 << 20
_KEPT_EACH_BYTES = 200
_STEPS_EACH_ENTRY = 10
_MAX_IMPLIED = 50_000


@dataclass
class Unpacked:
    """What a layer held."""

    entries: int = 0
    plain_bytes: int = 0
    devices: int = 0
    """Device nodes, which are not made."""
    digest: str = ""
    """Of the compressed bytes."""
    diff_id: str = ""
    """Of the plain bytes."""
    raw_bytes: int = 0
    implied: list[bytes] = field(default_factory=list)
    """Directories that the layer has but does not list: they are as the layers below have them."""


@dataclass(frozen=True)
class _Dress:
    """Owner, mode and time of a file or directory."""

    uid: int
    gid: int
    mode: int
    mtime_s: int


@dataclass
class _Marks:
    """What is done when all members are there: paths joined by '/', the root is empty."""

    directories: dict[bytes, _Dress] = field(default_factory=dict)
    whiteouts: set[bytes] = field(default_factory=set)
    opaque: set[bytes] = field(default_factory=set)
    made: set[bytes] = field(default_factory=set)
    """Directories that no member named before something was in them."""
    kept_bytes: int = 0

    def keep(self, path: bytes) -> bytes:
        """``path``, counted: the author of a layer decides how many there are.

        Raises:
            LayerError: it is too much to hold in memory.
        """
        self.kept_bytes += len(path) + _KEPT_EACH_BYTES
        if self.kept_bytes > _KEPT_BYTES:
            raise LayerError("it lists more directories and deletions than can be held")
        return path


class Unpacker:
    """Unpacks into one empty directory that nobody else can reach."""

    def __init__(
        self, target: Path, *, owners: bool, limits: LayerLimits | None = None, stop: threading.Event | None = None
    ) -> None:
        """Opens ``target``.

        Args:
            target: an empty directory of ours.
            owners: give files to whom the layer says (needs root); otherwise all is the caller's.
            limits: what is too much.
            stop: when set, unpacking ends with an error.
        """
        self._tree = Beneath(target, on_step=self._count_step, on_made=self._mark_made)
        self._owners = owners
        self._limits = limits or LayerLimits()
        self._stop = stop
        self._marks = _Marks()
        self._done = Unpacked()
        self._since_look = 0
        self._steps = 0

    def close(self) -> None:
        """Let go of the directory."""
        self._tree.close()

    def unpack(self, stream: LayerStream) -> Unpacked:
        """Everything of the layer, to the last byte of its stream.

        Raises:
            LayerError: the layer cannot be used.
            SandboxError: the disk is full, or it was stopped.
            OSError: the file system refuses; the caller knows where it is.
        """
        self._look_at_disk()
        reader = TarReader(stream.read)
        for member in reader:
            self._count_entry()
            try:
                self._add(member, reader)
            except OSError as error:
                raise self._explain(error, member) from error
        done = self._done
        done.digest, done.diff_id, done.raw_bytes = stream.finish()
        self._finish()
        return done

    def _explain(self, error: OSError, member: Member) -> Exception:
        """A member that collides with what is there, or the file system's own trouble."""
        if error.errno in (*NO_WAY, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.EMLINK, errno.EINVAL):
            name = show(keep(member.name[:300]))
            return LayerError(f"the member {name!r} cannot be made ({os.strerror(error.errno or 0)})")
        return error

    # ------------------------------------------------------------------ limits

    def _count_entry(self) -> None:
        self._done.entries += 1
        if self._done.entries > self._limits.max_entries:
            raise LayerError(f"it has more than {self._limits.max_entries} entries")
        if self._done.entries % _LOOK_EVERY_ENTRIES == 0:
            self._look_at_disk()

    def _look_at_disk(self) -> None:
        self._since_look = 0
        if self._stop is not None and self._stop.is_set():
            raise SandboxError("unpacking was stopped because nobody waits for it any more")
        found = os.fstatvfs(self._tree.root)
        reserve = min(self._limits.reserve_bytes, found.f_blocks * found.f_frsize // 20)
        if found.f_bavail * found.f_frsize < reserve or (found.f_files and found.f_favail < found.f_files // 100):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > self._limits.max_entries * _STEPS_EACH_ENTRY:
            raise LayerError("its tree is deeper and wider than any honest one")
        if self._steps % (_LOOK_EVERY_ENTRIES * _STEPS_EACH_ENTRY) == 0:
            self._look_at_disk()

    # ------------------------------------------------------------------ members

    def _add(self, member: Member, reader: TarReader) -> None:
        parts = split_name(member.name)
        dress = _Dress(member.uid, member.gid, member.mode, member.mtime_s)
        if not parts:
            if member.kind != "dir":
                raise LayerError("a member that is no directory has the root's name")
            self._check_owner(member)
            self._marks.directories[b""] = dress
            return
        name = parts.pop()
        above = b"/".join(parts)
        if name.startswith(WHITEOUT):
            self._mark(above, name)
            return
        self._check_owner(member)
        parent = self._tree.open_parent(above)
        if member.kind == "dir":
            self._marks.directories[self._marks.keep(_join(above, name))] = dress
            if not is_directory(parent, name):
                clear(parent, name)
                os.mkdir(name, 0o700, dir_fd=parent)
            return
        if member.kind == "device":
            self._done.devices += 1
            clear(parent, name)
            self._marks.whiteouts.add(self._marks.keep(_join(above, name)))
            return
        makers: dict[str, Callable[[int, bytes, Member, TarReader], None]] = {
            "file": self._make_file, "symlink": self._make_symlink, "hardlink": self._make_hardlink, "fifo": self._make_fifo,
        }  # fmt: skip
        makers[member.kind](parent, name, member, reader)

    def _mark(self, parent: bytes, name: bytes) -> None:
        if name == OPAQUE_MARK:
            self._marks.opaque.add(self._marks.keep(parent))
            return
        if name.startswith(_AUFS_MARK):
            return  # bookkeeping of a file system that is no more
        hidden = name.removeprefix(WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise LayerError(f"a member has the whiteout name {show(keep(name))!r}, which names nothing")
        self._marks.whiteouts.add(self._marks.keep(_join(parent, hidden)))

    def _mark_made(self, path: bytes) -> None:
        self._marks.made.add(self._marks.keep(path))

    def _check_owner(self, member: Member) -> None:
        if self._owners and max(member.uid, member.gid) >= MIN_UID_RANGE:
            raise LayerError(
                f"the member {show(keep(member.name[:300]))!r} belongs to {member.uid}:{member.gid}, but a cell has ids up to {MIN_UID_RANGE - 1} only"
            )

    def _make_file(self, parent: int, name: bytes, member: Member, reader: TarReader) -> None:
        clear(parent, name)
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            while data := reader.read_data(_CHUNK):
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                self._done.plain_bytes += len(data)
                self._since_look += len(data)
                if self._since_look > _LOOK_EVERY_BYTES:
                    self._look_at_disk()
            self._dress(fd, _Dress(member.uid, member.gid, member.mode, member.mtime_s))
        finally:
            os.close(fd)

    def _make_symlink(self, parent: int, name: bytes, member: Member, _: TarReader) -> None:
        if not member.link or len(member.link) > 4095 or b"\0" in member.link:
            raise LayerError(f"the symbolic link {show(keep(member.name[:300]))!r} has a target that none can have")
        clear(parent, name)
        os.symlink(member.link, name, dir_fd=parent)
        if self._owners:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, (member.mtime_s, member.mtime_s), dir_fd=parent, follow_symlinks=False)

    def _make_hardlink(self, parent: int, name: bytes, member: Member, _: TarReader) -> None:
        target = split_name(member.link, "link target")
        shown = show(keep(member.name[:300]))
        if not target:
            raise LayerError(f"the hard link {shown!r} names no file")
        try:
            source = self._tree.walk(b"/".join(target[:-1]), make=False)
        except OSError as error:
            raise LayerError(f"the hard link {shown!r} names a file that is not in its layer") from error
        try:
            found = os.stat(target[-1], dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise LayerError(f"the hard link {shown!r} names a directory")
            if is_same(parent, name, found):
                return
            clear(parent, name)
            os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError as error:
            raise LayerError(f"the hard link {shown!r} names a file that is not in its layer") from error
        finally:
            os.close(source)

    def _make_fifo(self, parent: int, name: bytes, member: Member, _: TarReader) -> None:
        clear(parent, name)
        os.mkfifo(name, 0o600, dir_fd=parent)
        if self._owners:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        # It is no link: we made it a moment ago and nobody else can.
        os.chmod(name, member.mode, dir_fd=parent)
        os.utime(name, (member.mtime_s, member.mtime_s), dir_fd=parent, follow_symlinks=False)

    def _dress(self, fd: int, dress: _Dress) -> None:
        """Owner, then mode (a change of owner takes the setuid bit away), then time."""
        if self._owners:
            os.fchown(fd, dress.uid, dress.gid)
        os.fchmod(fd, dress.mode)
        os.utime(fd, (dress.mtime_s, dress.mtime_s))

    # ------------------------------------------------------------------ the end

    def _finish(self) -> None:
        for path in self._marks.opaque:
            self._make_opaque(path)
        for path in self._marks.whiteouts:
            above, _, name = path.rpartition(b"/")
            parent = self._tree.walk(above, make=True)
            try:
                if is_directory(parent, name):
                    self._make_opaque(path)  # deleted, then made anew
                elif not exists(parent, name):
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
            finally:
                os.close(parent)
        self._marks.directories.setdefault(b"", _Dress(0, 0, 0o755, 0))
        # The deepest first: a directory may get a mode that keeps an ordinary user out of it.
        for path in sorted(self._marks.directories, key=_depth, reverse=True):
            self._dress_directory(path, self._marks.directories[path])
        self._done.implied = sorted(self._marks.made - self._marks.directories.keys())
        if len(self._done.implied) > _MAX_IMPLIED:
            raise LayerError(f"it has more than {_MAX_IMPLIED} directories that it does not list")

    def _make_opaque(self, path: bytes) -> None:
        fd = self._tree.open(path, make=True)
        try:
            os.setxattr(fd, OPAQUE, b"y")
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                raise SandboxError(
                    "the file system of the image store cannot hold extended attributes of users, which deleted directories of images need; keep it on ext4, xfs, btrfs or tmpfs (Linux 6.6)"
                ) from error
            raise
        finally:
            os.close(fd)

    def _dress_directory(self, path: bytes, dress: _Dress) -> None:
        try:
            fd = self._tree.open(path, make=False)
        except OSError as error:
            if error.errno in NO_WAY:
                return  # a later member took its place
            raise
        try:
            self._dress(fd, dress)
        finally:
            os.close(fd)


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _depth(path: bytes) -> int:
    return path.count(b"/") + 1 if path else 0
