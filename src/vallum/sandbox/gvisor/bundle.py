"""What runsc is told about a cell: an OCI bundle and a trace session. Pure.

The paths are those of the cell's mount namespace as native/mounts.c and native/runtime.c lay it out.

Covered: PID 1 has four capabilities and empties the bounding set of commands; nothing of the host is mounted but the
cell's own tree; /sys is empty. Not covered: /tmp is memory of the guest's kernel when the image leaves it empty (runsc
does that), so it is not in the cell's upper layer.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from vallum.sandbox.ns.wire import WARDEN_UID, Packer

ROOT = "/tmp/root"  # noqa: S108 - the cell's own staging tmpfs
TRACE_SOCKET = "/tmp/trace.sock"  # noqa: S108
BUNDLE = "/tmp/bundle"  # noqa: S108
STATE = "/tmp/state"  # noqa: S108
SESSION = "/tmp/session.json"  # noqa: S108
CONTAINER = "cell"
GUEST_DIR = "/run/cell"
"""Where PID 1's program is in the guest, read-only."""
SPEC_RUNTIME = 1024

_CAPABILITIES = ["CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
_MIB = 1024 * 1024

POINTS = ("sentry/clone", "sentry/execve", "sentry/exit_notify_parent", "syscall/connect/enter")


def make_config(*, hostname: str, program: str, shm_bytes: int = 512 * _MIB) -> dict[str, Any]:
    """The OCI configuration: ``program`` is PID 1's, in :data:`GUEST_DIR`."""
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": ROOT, "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": WARDEN_UID, "gid": WARDEN_UID},
            "args": [f"{GUEST_DIR}/{program}", "guest"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "hard": 65536, "soft": 65536},
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
            ],
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "mode=0555", "size=4k"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["ptmxmode=0666"]},
            {
                "destination": "/dev/shm",  # noqa: S108 - the guest's
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["mode=1777", f"size={shm_bytes}"],
            },
        ],
        "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")]},
    }


def make_session() -> dict[str, Any]:
    """What the guest's kernel reports, before the guest runs: when it cannot be delivered, the guest waits, then it is counted."""
    fields = ["time", "thread_id", "group_id", "container_id", "credentials", "process_name"]
    return {
        "trace_session": {
            "name": "Default",
            "points": [{"name": name, "context_fields": fields} for name in POINTS],
            "sinks": [
                {
                    "name": "remote",
                    "config": {"endpoint": TRACE_SOCKET, "retries": 20, "backoff": "50us", "backoff_max": "20ms"},
                }
            ],
        }
    }


def add_runtime(request: bytes, argv: list[str], *, hostname: str, program: str) -> bytes:
    """The launcher's request for a cell, changed to run ``argv`` in it instead of our own PID 1."""
    (flags,) = struct.unpack_from("=I", request)
    p = Packer([struct.pack("=I", flags | SPEC_RUNTIME), request[4:]])
    p.texts(argv)
    p.text(msgspec.json.encode(make_config(hostname=hostname, program=program)))
    p.text(msgspec.json.encode(make_session()))
    return p.bytes()
