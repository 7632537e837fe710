"""Files of a run's directory, handled so that a crash between any two steps leaves something whole."""

from __future__ import annotations

import fcntl
import os
import time

_LOCK_PATIENCE_S = 0.3
"""A reader that asks whether a run is live holds a shared lock for an instant."""


def lock(fd: int) -> None:
    """Take the exclusive lock, or raise BlockingIOError."""
    give_up = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)
        else:
            return


def save_new(dir_fd: int, name: str, data: bytes) -> bool:
    """Write a new file durably. False when the name is taken by other bytes."""
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dir_fd)
    except FileExistsError:
        return False
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.fsync(dir_fd)
    return True


def replace(dir_fd: int, name: str, data: bytes) -> None:
    """Put ``data`` in place of file ``name``, durably and in one piece."""
    draft = f".{name}.new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dir_fd)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.replace(draft, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    os.fsync(dir_fd)
