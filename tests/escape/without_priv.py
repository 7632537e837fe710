"""Take a control of the kernel away from a command, for real: a seccomp filter makes one system call fail.

    without_priv.py CALL[:ARGUMENT=VALUE][!] -- COMMAND...

With "!" the call says that it succeeded and does nothing, which is worse.
The filter is inherited by everything the command starts, so a node below it meets a kernel that lacks the control.
"""

import ctypes
import os
import struct
import sys

NUMBERS = {
    "seccomp": (317, 277),
    "clone3": (435, 435),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "fsopen": (430, 430),
    "pivot_root": (155, 41),
    "socket": (41, 198),
    "capset": (126, 91),
    "prctl": (157, 167),
}
ERRNO = {"seccomp": 22, "socket": 93}
ENOSYS = 38


def install(call, argument, value, error):
    x86 = os.uname().machine == "x86_64"
    number = NUMBERS[call][0 if x86 else 1]
    program = [(0x20, 0, 0, 0), (0x15, 0, 3 if argument is not None else 1, number)]
    if argument is not None:
        program += [(0x20, 0, 0, 16 + 8 * argument), (0x15, 0, 1, value)]
    program += [(0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *op) for op in program))
    libc = ctypes.CDLL(None, use_errno=True)
    fprog = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(38, 1, 0, 0, 0) < 0 or libc.prctl(22, 2, fprog, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "the filter could not be installed")


def main():
    spec, dashes, *command = sys.argv[1:]
    assert dashes == "--"
    is_lie = spec.endswith("!")
    call, _, condition = spec.removesuffix("!").partition(":")
    argument, _, value = condition.partition("=")
    install(call, int(argument) if argument else None, int(value or 0), 0 if is_lie else ERRNO.get(call, ENOSYS))
    os.execvp(command[0], command)


main()
