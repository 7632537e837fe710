"""Whether two tasks share one table of descriptors.

Raw privilege: kcmp(2) has no wrapper in libc.
Source: man 2 kcmp; include/uapi/linux/kcmp.h.
"""

from __future__ import annotations

import ctypes
import os

_NUMBERS = {"x86_64": 312, "aarch64": 272, "riscv64": 272}
_KCMP_FILES = 2
_libc = ctypes.CDLL(None, use_errno=True)
_number = _NUMBERS.get(os.uname().machine)


def shares_files(pid: int, tid: int) -> bool | None:
    """Whether the tasks share their descriptors; None where the kernel does not say."""
    if _number is None:
        return None
    order = _libc.syscall(_number, ctypes.c_long(pid), ctypes.c_long(tid), _KCMP_FILES, 0, 0)
    return None if order < 0 else order == 0
