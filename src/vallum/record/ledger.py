r"""The one writer of a run's log.

Acknowledged means handed to the kernel: :meth:`Ledger.append` returns after write(2), so an event
whose number was returned survives the end of this process, however it ends. :meth:`Ledger.sync`
(end of an episode, close) makes it survive the end of the machine, and moves the anchor.

Covered: a writer killed between any two bytes (the torn tail is cut, kept beside the log, and
noted in it); a second writer; a full or failing disk (nothing half-written stays, and the ledger
refuses everything after: what cannot be recorded must not happen); links and foreign files in place of the log.
Not covered: loss of power between two syncs may take the last records with it; whoever may write
to the directory may rewrite all of it (see ``chain``).
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError, VerificationError
from vallum.core.events import AnyEvent, LedgerNote, encode
from vallum.core.scope import BY_NODE, Scope, check_id
from vallum.record.chain import (
    ANCHOR,
    LOG,
    MAX_RECORD_BYTES,
    Anchor,
    ChainError,
    Position,
    check_anchor,
    link,
    open_log,
    read_anchor,
    walk,
)
from vallum.record.storage import lock, replace, save_new


class Ledger:
    """The open log of one run. Methods may be called from several threads."""

    def __init__(self, directory: Path, run: str, dir_fd: int, fd: int, at: Position) -> None:
        self.run = run
        self.directory = directory
        self.path = directory / LOG
        self._dir_fd = dir_fd
        self._fd = fd
        self._size = at.offset
        self._count = at.count
        self._head = at.head
        self._failed = ""
        self._is_closing = False
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()

    @classmethod
    def create(cls, runs: Path, run: str) -> Ledger:
        """Begin the log of a new run in ``runs/run`` (made 0700, the log 0600).

        Raises:
            InvalidInput: ``run`` cannot be used as an id.
            RecordError: there is such a run already, or it cannot be written. Nothing is left behind then.
        """
        check_id(run, "the run id")
        directory = runs / run
        try:
            runs.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
        except FileExistsError as error:
            raise RecordError(
                f"there is a run {run} already in {runs}: choose another id or resume that run"
            ) from error
        except OSError as error:
            raise RecordError(
                f"the directory {directory} cannot be made: {error.strerror}; give a --home that can be written"
            ) from error
        try:
            dir_fd = _open_directory(directory)
        except OSError as error:
            directory.rmdir()
            raise RecordError(f"the directory {directory} cannot be opened: {error.strerror}") from error
        fd = -1
        try:
            fd = os.open(LOG, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=dir_fd)
            lock(fd)
            os.fsync(dir_fd)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            os.close(dir_fd)
            (directory / LOG).unlink(missing_ok=True)
            directory.rmdir()
            raise RecordError(f"the log of run {run} cannot be made in {directory}: {error.strerror}") from error
        return cls(directory, run, dir_fd, fd, Position())

    @classmethod
    def open(cls, runs: Path, run: str) -> Ledger:
        """Resume the log of a run whose writer ended.

        The whole chain is checked. A tail that a crash tore is cut, kept beside the log as
        ``torn-<offset>``, and a note says so; so does one when the run had been closed in order.

        Raises:
            InvalidInput: ``run`` cannot be used as an id.
            RecordError: no such run, another process writes it, or it cannot be written.
            VerificationError: it was changed. It is left as it is.
        """
        check_id(run, "the run id")
        directory = runs / run
        try:
            dir_fd = _open_directory(directory)
        except OSError as error:
            raise RecordError(f"the run {run} cannot be opened in {runs}: {error.strerror}") from error
        try:
            fd = _open_existing(dir_fd, directory)
        except BaseException:
            os.close(dir_fd)
            raise
        try:
            anchor = read_anchor(directory)
            end, torn = _scan(directory, anchor)
            ledger = cls(directory, run, dir_fd, fd, end)
            ledger._repair(torn)
            if anchor is not None and anchor.closed:
                # First the anchor, then the note: killed in between, it must not look like a record put after the end.
                ledger.sync()
                ledger._note("the run was resumed after it had been closed")
                ledger.sync()
        except OSError as error:
            os.close(fd)
            os.close(dir_fd)
            raise RecordError(f"the log of run {run} cannot be resumed in {directory}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            os.close(dir_fd)
            raise
        return ledger

    @property
    def count(self) -> int:
        """Number of acknowledged records; the next one gets this id."""
        return self._count

    @property
    def head(self) -> str:
        """Hash of the last acknowledged record."""
        return self._head.decode()

    def append(self, event: AnyEvent) -> int:
        """Append one event and return its id. It survives the end of this process from then on.

        Raises:
            RecordError: it could not be written. Unless it was the event's own fault (another run's, too long, not
                Unicode), the ledger refuses everything from now on.
        """
        payload = self._encode(event)
        with self._lock:
            head = link(self._head, payload)
            self._write(b"%b %b\n" % (head, payload))
            self._head = head
            self._count += 1
            return self._count - 1

    def append_many(self, events: Iterable[AnyEvent]) -> range:
        """Append events at the price of one write; all of them or none. Returns their ids.

        Raises:
            RecordError: as :meth:`append`.
        """
        payloads = [self._encode(event) for event in events]
        with self._lock:
            head, lines = self._head, []
            for payload in payloads:
                head = link(head, payload)
                lines.append(b"%b %b\n" % (head, payload))
            if lines:
                self._write(b"".join(lines))
            first = self._count
            self._head = head
            self._count += len(lines)
            return range(first, self._count)

    def sync(self) -> None:
        """Make everything acknowledged survive a loss of power, and move the anchor to here.

        Waits for the disk; other threads may go on appending meanwhile.

        Raises:
            RecordError: the disk did not take it; the ledger refuses everything from now on.
        """
        with self._sync_lock:
            self._sync(closed=False)

    def close(self) -> None:
        """Sync, mark the log closed, and let go of it. May be called twice.

        Raises:
            RecordError: it could not be marked; it reads as interrupted then. It is let go of all the same.
        """
        with self._sync_lock:
            if self._fd < 0:
                return
            try:
                with self._lock:
                    self._is_closing = True
                if not self._failed:
                    self._sync(closed=True)
            finally:
                with self._lock:
                    # A child that was forked without exec would hold the lock through its copy of the descriptor.
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                    os.close(self._fd)
                    os.close(self._dir_fd)
                    self._fd = self._dir_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, event: AnyEvent) -> bytes:
        if event.scope.run != self.run:
            raise RecordError(
                f"an event of run {event.scope.run} was given to the ledger of run {self.run}: nothing was written"
            )
        try:
            payload = encode(event)
        except UnicodeEncodeError as error:
            raise RecordError(
                f"an event of run {self.run} holds text that is not Unicode: decode guest bytes with core.text.keep"
            ) from error
        if len(payload) > MAX_RECORD_BYTES - 66:
            raise RecordError(
                f"an event of {len(payload)} bytes is too long for the ledger of run {self.run}: shorten it"
            )
        return payload

    def _write(self, data: bytes) -> None:
        """All of ``data`` or nothing, with the lock held."""
        if self._is_closing:
            raise RecordError(f"the ledger of run {self.run} is closed: nothing was written")
        if self._failed:
            raise RecordError(self._failed)
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, memoryview(data)[written:])
        except OSError as error:
            self._fail(f"cannot be written: {error.strerror}; free space on that disk and start the run again", error)
        self._size += len(data)

    def _fail(self, why: str, error: OSError) -> None:
        self._failed = f"the ledger of run {self.run} in {self.directory} {why}"
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._failed += " (a torn record stays at its end; it is cut when the run is resumed)"
        raise RecordError(self._failed) from error

    def _sync(self, *, closed: bool) -> None:
        with self._lock:
            if self._fd < 0:
                raise RecordError(f"the ledger of run {self.run} is closed")
            if self._failed:
                raise RecordError(self._failed)
            anchor = Anchor(count=self._count, head=self._head.decode(), bytes=self._size, closed=closed)
        try:
            os.fsync(self._fd)
            replace(self._dir_fd, ANCHOR, msgspec.json.encode(anchor) + b"\n")
        except OSError as error:
            with self._lock:
                self._fail(
                    f"could not be made durable: {error.strerror}; free space on that disk and start the run again",
                    error,
                )

    def _repair(self, torn: bytes) -> None:
        """Cut ``torn`` from the end, keep it, and note it. Safe to be killed anywhere and done again."""
        if torn:
            name, number = f"torn-{self._size}", 0
            while not save_new(self._dir_fd, name, torn):
                number += 1
                name = f"torn-{self._size}.{number}"
            os.ftruncate(self._fd, self._size)
            os.fsync(self._fd)
        kept = sorted(entry.name for entry in self.directory.iterdir() if entry.name.startswith("torn-"))
        if kept:
            with open_log(self.path) as log:
                noted = b"\n".join(line.payload for line in walk(log) if b'"ledger.note"' in line.payload[:24])
            for name in kept:
                if b' %b"' % name.encode() not in noted:
                    length = (self.directory / name).stat().st_size
                    self._note(
                        f"the writer had died: {length} bytes of a record never acknowledged were cut, kept as {name}"
                    )
            self.sync()

    def _note(self, note: str) -> None:
        self.append(
            LedgerNote(t_ns=wall_ns(), mono_ns=mono_ns(), scope=Scope(run=self.run), attribution=BY_NODE, note=note)
        )


_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _open_existing(dir_fd: int, directory: Path) -> int:
    try:
        fd = os.open(LOG, _FLAGS, dir_fd=dir_fd)
    except OSError as error:
        raise RecordError(
            f"the log of run {directory.name} cannot be opened in {directory}: {error.strerror}"
        ) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
        os.close(fd)
        raise RecordError(
            f"{directory / LOG} is not a file of this user's ledger: restore it or remove the run's directory"
        )
    try:
        lock(fd)
    except OSError as error:
        os.close(fd)
        raise RecordError(
            f"run {directory.name} is being written by another process: end that one, or choose another run id"
        ) from error
    return fd


def _scan(directory: Path, anchor: Anchor | None) -> tuple[Position, bytes]:
    """Where the good records end, and the torn bytes after them.

    Raises:
        VerificationError: what is wrong cannot come from a crash.
    """
    end, there = Position(), None
    with open_log(directory / LOG) as log:
        try:
            for line in walk(log):
                end = line.after
                if anchor is not None and end.count == anchor.count:
                    there = end.head
        except ChainError as broken:
            log.seek(end.offset)
            # A crash leaves one unfinished record, at the very end; anything after it was put there by someone.
            if b"\n" in log.read(MAX_RECORD_BYTES)[:-1] or log.read(1):
                raise VerificationError(f"run {directory.name} is not resumed: {broken}", broken.seq) from broken
        log.seek(end.offset)
        torn = log.read()
    if anchor is not None:
        check_anchor(directory, anchor, end, there)
        if anchor.closed and torn:
            raise VerificationError(
                f"run {directory.name} is not resumed: record {end.count} (byte {end.offset}) was inserted after it was closed",
                end.count,
            )
    return end, torn
