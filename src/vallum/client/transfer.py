"""Files out of a cell and into it, as a tar stream of a command that runs there.

The cell's own ``tar`` reads and writes inside, as a guest user and as a step like any other; whatever it says is only bytes.

Covered: names that are absolute or have ``..`` (refused), links (never followed; symbolic ones and devices, FIFOs, sockets
are left out and counted), set-id bits and owners (dropped), members that come twice or through something that is no
directory (refused), too many entries or bytes (refused before more is written); the target is made by us and must not
have been there; what a failure left half-made is removed. Not covered: that the files are those which the
guest had at one moment: it may change them meanwhile, and a guest may replace its own ``tar``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from vallum.client.command import ExecResult, OnOutput, Process
from vallum.core.errors import CommandNotFound, GuestFileError, InvalidInput, VallumError
from vallum.core.tar import LayerError, Member, TarReader, split_name
from vallum.core.text import keep, show

MAX_BYTES = 1 << 30
MAX_ENTRIES = 100_000
_PER_ENTRY_BYTES = 2048
"""Headers and padding of an ordinary member in the stream."""
_CHUNK = 1 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ENOENT_WORDS = (b"No such file", b"no such file")


@dataclass(frozen=True)
class Copied:
    """What was copied."""

    files: int
    directories: int
    bytes: int
    left_out: int
    """Symbolic links, devices, FIFOs: they are not taken along."""


class Runner(Protocol):
    """The part of a sandbox that this needs."""

    def start(
        self, argv: list[str | bytes], *, interactive: bool, user: str | None, timeout_s: float, on_output: OnOutput
    ) -> Process:
        """See :meth:`vallum.Sandbox.start`."""
        ...


def split_guest(path: str) -> tuple[str, str]:
    """(directory, name) of a path in a cell, in a form that no program takes for an option. Pure.

    Raises:
        InvalidInput: it names no entry of a directory.
    """
    clean = path.rstrip("/")
    parent, name = posixpath.split(clean)
    if not name or name in (".", "..") or "\0" in path:
        raise InvalidInput(
            f"the path {show(path)!r} of the cell is not usable: name a file or directory, not '/', '.' or '..'"
        )
    if not parent.startswith("/"):
        parent = f"./{parent}"
    return parent, name


def check_target(host: Path) -> None:
    """Whether something can be copied to this path.

    Raises:
        InvalidInput: it is there already, or has no directory to be in.
    """
    if host.is_symlink() or host.exists():
        raise InvalidInput(f"{host} is there already: nothing is overwritten; name a new path for what is copied out")
    if not host.parent.is_dir():
        raise InvalidInput(f"{host} cannot be made: there is no directory {host.parent}")


async def copy_out(
    sandbox: Runner, guest: str, host: Path, *, user: str | None, limit_bytes: int, limit_entries: int, timeout_s: float
) -> Copied:
    """See :meth:`vallum.Sandbox.copy_out`."""
    parent, name = split_guest(guest)
    check_target(host)
    most = limit_bytes + limit_entries * _PER_ENTRY_BYTES + _CHUNK
    with tempfile.TemporaryFile(dir=host.parent) as spool:

        def take(stream: str, data: bytes) -> None:
            if stream != "stdout":
                return
            if spool.tell() + len(data) > most:
                raise _too_much(guest, limit_bytes, limit_entries)
            spool.write(data)

        result = await _run(sandbox, ["tar", "-cf", "-", "-C", parent, f"./{name}"], None, take, user, timeout_s)
        _raise_for(result, guest, "copied out")
        spool.seek(0)
        # In a thread; not cancelled half-way, so that what is half-made is removed.
        return await asyncio.shield(
            asyncio.to_thread(
                unpack, spool, os.fsencode(name), host, limit_bytes=limit_bytes, limit_entries=limit_entries
            )
        )


async def copy_in(
    sandbox: Runner, host: Path, guest: str, *, user: str | None, limit_bytes: int, timeout_s: float
) -> None:
    """See :meth:`vallum.Sandbox.copy_in`."""
    parent, name = split_guest(guest)
    with tempfile.TemporaryFile() as spool:
        await asyncio.to_thread(pack, host, name, spool, limit_bytes)
        spool.seek(0)
        result = await _run(
            sandbox, ["tar", "-xf", "-", "-C", parent], spool, lambda _stream, _data: None, user, timeout_s
        )
    _raise_for(result, guest, "copied in")


async def _run(
    sandbox: Runner,
    argv: list[str | bytes],
    source: IO[bytes] | None,
    take: OnOutput,
    user: str | None,
    timeout_s: float,
) -> ExecResult:
    process = sandbox.start(argv, interactive=source is not None, user=user, timeout_s=timeout_s, on_output=take)
    feeding = asyncio.ensure_future(_feed(process, source)) if source is not None else None
    try:
        return await process.wait()
    except CommandNotFound as error:
        raise CommandNotFound(f"files cannot be copied: the cell has no tar in its PATH ({error})") from error
    finally:
        if feeding is not None:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, VallumError):  # its end is told by wait()
                await feeding


async def _feed(process: Process, source: IO[bytes]) -> None:
    while data := source.read(_CHUNK):
        await process.feed(data)
    await process.feed(b"", eof=True)


def _raise_for(result: ExecResult, guest: str, verb: str) -> None:
    if result.exit_code == 0:
        return
    if result.exit_code == 127:
        raise CommandNotFound("files cannot be copied: the cell has no tar in its PATH; use an image with one")
    words = show(keep(result.stderr[:300].strip())) or f"exit code {result.exit_code}"
    number = errno.ENOENT if any(text in result.stderr for text in _ENOENT_WORDS) else errno.EIO
    raise GuestFileError(f"{show(guest)!r} could not be {verb}: tar in the cell said: {words}", errno.errorcode[number])


def _too_much(guest: str, limit_bytes: int, limit_entries: int) -> GuestFileError:
    return GuestFileError(
        f"{show(guest)!r} was not copied out: it is more than {limit_bytes} bytes or {limit_entries} entries; "
        "copy a part of it, or give larger limits",
        "EFBIG",
    )


# ------------------------------------------------------------------ out: a stream whose author is hostile


def unpack(spool: IO[bytes], name: bytes, host: Path, *, limit_bytes: int, limit_entries: int) -> Copied:
    """Make ``host``, a new file or directory, of the stream's ``name``.

    Raises:
        GuestFileError: the stream is not what an honest tar writes, or too much; nothing is left.
        InvalidInput: ``host`` is there, or cannot be written.
    """
    unpacker = _Unpacker(host, name, limit_bytes, limit_entries)
    shown = keep(name)
    try:
        for member in (reader := TarReader(spool.read)):
            unpacker.take(member, reader)
        return unpacker.finish()
    except LayerError as error:
        unpacker.undo()
        raise GuestFileError(f"{show(shown)!r} was not copied out: {error}", "EIO") from error
    except FileExistsError as error:
        unpacker.undo()
        raise InvalidInput(f"{host} is there already: nothing is overwritten; name a new path") from error
    except OSError as error:
        unpacker.undo()
        raise InvalidInput(f"{host} could not be written: {error.strerror}") from error
    except BaseException:
        unpacker.undo()
        raise


class _Unpacker:
    """Writes members beneath one new directory, or one new file. All of what it reads through it has made itself."""

    def __init__(self, host: Path, name: bytes, limit_bytes: int, limit_entries: int) -> None:
        self._host, self._name = host, name
        self._bytes_left, self._entries_left = limit_bytes, limit_entries
        self._limits = (limit_bytes, limit_entries)
        self._root: int | None = None
        self._is_made = False
        self._modes: list[tuple[bytes, int]] = []
        self._files = self._directories = self._bytes = self._left_out = 0

    def take(self, member: Member, reader: TarReader) -> None:
        self._entries_left -= 1
        self._bytes_left -= member.size
        if self._entries_left < 0 or self._bytes_left < 0:
            raise _too_much(keep(self._name), *self._limits)
        first, *below = split_name(member.name) or [b""]
        if first != self._name:
            raise LayerError(f"its tar sent {show(keep(first[:300]))!r}, which was not asked for")
        if not below:
            self._take_first(member, reader)
        elif self._root is None:
            raise LayerError("its tar sent an entry of a directory before the directory")
        else:
            self._take_below(below, member, reader)

    def _take_first(self, member: Member, reader: TarReader) -> None:
        if self._is_made:
            raise LayerError("it came twice")
        if member.kind == "dir":
            self._host.mkdir(mode=0o700)
            self._is_made = True
            self._root = os.open(self._host, _DIRECTORY)
            self._modes.append((b".", member.mode))
            self._directories += 1
        elif member.kind == "file":
            fd = os.open(self._host, _NEW_FILE, 0o600)
            self._is_made = True
            self._write(fd, member, reader)
        else:
            raise LayerError(f"it is a {member.kind}, and only files and directories are copied")

    def _take_below(self, parts: list[bytes], member: Member, reader: TarReader) -> None:
        parent = self._walk(parts[:-1])
        try:
            if member.kind == "dir":
                os.mkdir(parts[-1], 0o700, dir_fd=parent)
                self._modes.append((b"/".join(parts), member.mode))
                self._directories += 1
            elif member.kind == "file":
                self._write(os.open(parts[-1], _NEW_FILE, 0o600, dir_fd=parent), member, reader)
            elif member.kind == "hardlink":
                self._copy_again(parent, parts[-1], member)
            else:
                self._left_out += 1
        except FileExistsError:
            raise LayerError(f"the entry {show(keep(b'/'.join(parts)[:300]))!r} came twice") from None
        finally:
            os.close(parent)

    def _walk(self, parts: list[bytes]) -> int:
        assert self._root is not None
        fd = os.dup(self._root)
        for part in parts:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
            except (FileNotFoundError, NotADirectoryError):
                raise LayerError(f"an entry lies in {show(keep(part))!r}, which is no directory of it") from None
            finally:
                os.close(fd)
            fd = below
        return fd

    def _write(self, fd: int, member: Member, reader: TarReader) -> None:
        with os.fdopen(fd, "wb") as file:
            while data := reader.read_data(_CHUNK):
                file.write(data)
            os.fchmod(file.fileno(), 0o600 | member.mode & 0o755)
        self._files += 1
        self._bytes += member.size

    def _copy_again(self, parent: int, name: bytes, member: Member) -> None:
        """Another name of a file that came before becomes a file of its own: links would survive an edit."""
        first, *below = split_name(member.link, "link") or [b""]
        if first != self._name or not below:
            raise LayerError("a hard link leads out of it")
        holder = self._walk(below[:-1])
        try:
            source = os.open(below[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=holder)
        except OSError:
            self._left_out += 1  # of a link or FIFO that was itself left out
            return
        finally:
            os.close(holder)
        with os.fdopen(source, "rb") as file:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                raise LayerError("a hard link leads to what is no file")
            self._bytes_left -= found.st_size
            if self._bytes_left < 0:
                raise _too_much(keep(self._name), *self._limits)
            with os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=parent), "wb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK)
                os.fchmod(copy.fileno(), stat.S_IMODE(found.st_mode))
        self._files += 1
        self._bytes += found.st_size

    def finish(self) -> Copied:
        if not self._is_made:
            raise LayerError("its tar sent nothing")
        for way, mode in reversed(self._modes):
            fd = self._walk([part for part in way.split(b"/") if part != b"."])
            os.fchmod(fd, 0o700 | mode & 0o755)
            os.close(fd)
        if self._root is not None:
            os.close(self._root)
            self._root = None
        return Copied(self._files, self._directories, self._bytes, self._left_out)

    def undo(self) -> None:
        if self._root is not None:
            os.close(self._root)
            self._root = None
            shutil.rmtree(self._host, ignore_errors=True)
        elif self._is_made:
            self._host.unlink(missing_ok=True)
        self._is_made = False


# ------------------------------------------------------------------ in: the caller's own files


def pack(host: Path, name: str, spool: IO[bytes], limit_bytes: int) -> None:
    """Write a file or directory of the host as a tar stream under ``name``. Links are kept as links, never followed.

    Raises:
        InvalidInput: it is not there, no file or directory, cannot be read, or is too much.
    """
    left = limit_bytes

    def choose(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal left
        left -= member.size
        if left < 0:
            raise InvalidInput(f"{host} is more than {limit_bytes} bytes: copy a part of it, or give a larger limit")
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode &= 0o777
        return member if member.isreg() or member.isdir() or member.issym() or member.islnk() else None

    try:
        kind = host.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise InvalidInput(f"{host} cannot be copied in: it is neither a file nor a directory")
        with tarfile.open(fileobj=spool, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            archive.add(host, f"./{name}", filter=choose)
    except OSError as error:
        raise InvalidInput(f"{host} cannot be copied in: {error.strerror}") from error


def parse_copy(text: str) -> tuple[str, Path]:
    """``GUEST:HOST`` of the command line. Pure.

    Raises:
        InvalidInput: it is not of that form.
    """
    guest, colon, host = text.rpartition(":")
    if not colon or not guest or not host:
        raise InvalidInput(f"{text!r} is not usable: write GUEST:HOST, a path in the cell and a new path here")
    split_guest(guest)
    return guest, Path(os.path.abspath(host))  # noqa: PTH100 - no symlink is resolved: the user named this path
