"""The gateway gives up what it was started with, before it reads a byte of a guest.

Covered: groups, user and group ids (all three of each), every capability set, no_new_privs, core dumps, descriptors
that nobody meant to hand over, death with the parent. Not covered: system calls (no seccomp filter of its own yet)
and the network, which it needs.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from vallum.core.errors import GatewayError

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes, what: str) -> None:
    value = ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if _libc.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise GatewayError(
            f"the gateway cannot {what} ({os.strerror(ctypes.get_errno())}): this kernel is not supported"
        )


def close_other_descriptors(keep: set[int]) -> None:
    """Close every descriptor but ``keep``."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not files
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that listdir itself used


def raise_descriptor_limit(wanted: int = 262144) -> None:
    """As many descriptors as this process may have, up to ``wanted``: two a flow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def drop_privilege(uid: int, gid: int) -> None:
    """Become ``uid``:``gid`` for good, without capabilities, and die with the parent.

    Raises:
        GatewayError: one of it did not happen; the caller must end.
    """
    parent = os.getppid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_NAME, b"vallum-gateway", "set its name")
    try:
        if os.geteuid() == 0:
            for capability in range(64):
                _libc.prctl(
                    _PR_CAPBSET_DROP, capability, 0, 0, 0
                )  # EINVAL past the last one, EPERM without CAP_SETPCAP
            if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):
                os.setgroups([])
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
    except OSError as error:
        raise GatewayError(
            f"the gateway cannot become user {uid}:{gid} ({error.strerror}): give it an id that exists in this user namespace"
        ) from error
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise GatewayError(
            f"the gateway runs as {os.getresuid()}, not as {uid}:{gid}: start it as root or as that user"
        )
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "set no_new_privs")
    _prctl(_PR_SET_DUMPABLE, 0, "make itself unreadable")
    # After the change of user, which clears it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "ask to die with its parent")
    if os.getppid() != parent:
        raise GatewayError("the node ended while the gateway was starting")


def _drop_capabilities() -> None:
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # EINVAL before Linux 4.3, which had none
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, data) != 0:
        raise GatewayError(f"the gateway cannot give up its capabilities ({os.strerror(ctypes.get_errno())})")
