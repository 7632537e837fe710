"""A stand-in for PID 1: waits to be put into its cgroup, becomes another user, starts a child into a leaf.

Run as a program: ``clone_into_priv.py UID``. Reads two lines: ``go`` once it is in its cgroup, then the
leaf's directory. Prints the child's ``/proc/self/cgroup`` (its v2 line), or ``errno NAME``.
"""

import ctypes
import errno
import os
import struct
import sys

CLONE_INTO_CGROUP = 0x200000000
CLONE_NEWCGROUP = 0x02000000
SYS_CLONE3 = 435
SIGCHLD = 17

libc = ctypes.CDLL(None, use_errno=True)


def clone_into(cgroup_fd: int) -> int:
    """fork() with the child born in ``cgroup_fd``; source: clone3(2), ``struct clone_args`` of 88 bytes."""
    args = ctypes.create_string_buffer(
        struct.pack("=11Q", CLONE_INTO_CGROUP, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, cgroup_fd)
    )
    pid = libc.syscall(SYS_CLONE3, args, ctypes.c_size_t(88))
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone3")
    return pid


def main() -> None:
    uid = int(sys.argv[1])
    assert sys.stdin.readline() == "go\n"
    assert libc.unshare(CLONE_NEWCGROUP) == 0
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    print("ready", flush=True)
    leaf = sys.stdin.readline().strip()
    fd = os.open(leaf, os.O_PATH | os.O_DIRECTORY)
    try:
        pid = clone_into(fd)
    except OSError as error:
        print("errno", errno.errorcode[error.errno], flush=True)
        return
    if pid == 0:
        with open("/proc/self/cgroup") as file:
            text = file.read()
        os.write(1, next(line for line in text.splitlines() if line.startswith("0::")).encode() + b"\n")
        os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
