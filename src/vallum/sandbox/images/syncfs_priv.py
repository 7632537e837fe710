"""``syncfs(2)``: everything written to one file system reaches the disk, in one call instead of one a file."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def sync_file_system(fd: int) -> None:
    """Write out the file system that ``fd`` is on.

    Raises:
        OSError: it could not be written (EIO, ENOSPC, EDQUOT).
    """
    if _libc.syncfs(ctypes.c_int(fd)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
