"""``python -m vallum.gateway --control-fd N --uid U --gid G``: started by :class:`vallum.gateway.link.GatewayLink`."""

from __future__ import annotations

import argparse
import asyncio
import encodings.idna  # noqa: F401 - loaded before the drop: afterwards this file tree may be unreadable
import gc
import importlib.util
import logging
import signal
import socket
import sys
from pathlib import Path

import dns.rdata

from vallum.core.errors import GatewayError
from vallum.gateway.privilege_priv import close_other_descriptors, drop_privilege, raise_descriptor_limit
from vallum.gateway.server import serve
from vallum.gateway.services import load_services
from vallum.gateway.services.packages import use_cache

LATER = ("asyncssh", "vallum.gateway.ssh.door")
"""Loaded with the first connection that needs them (they take a quarter of a second), where they can be read then."""


def load_what_will_be_closed() -> None:
    """Load what the gateway's user could not read after the drop: a program in somebody's closed home."""
    origins = [spec.origin for name in LATER if (spec := importlib.util.find_spec(name)) is not None]
    if not all(origin is not None and is_open(Path(origin)) for origin in origins):
        for name in LATER:
            importlib.import_module(name)


def is_open(file: Path) -> bool:
    """Whether every user may read a file and go through the directories above it."""
    return bool(file.stat().st_mode & 0o004) and all(place.stat().st_mode & 0o001 for place in file.parents)


def open_cache(fd: int | None) -> None:
    """Keep package files in this directory. One that cannot be read only means that nothing is kept."""
    if fd is not None:
        try:
            use_cache(fd)
        except OSError as error:
            logging.getLogger(__name__).warning("no package is kept: %s", error.strerror)


def main() -> int:
    """Drop privilege, then serve. Exit code 0 when the node has gone, 125 when it could not start."""
    parser = argparse.ArgumentParser(prog="vallum-gateway")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--cache-fd", type=int, help="directory where package files are kept")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="vallum-gateway: %(levelname)s %(message)s")
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]
    load_services()
    load_what_will_be_closed()
    # Ctrl-C in the owner's terminal is for the node to handle, which then ends the gateway.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cache = () if options.cache_fd is None else (options.cache_fd,)
        close_other_descriptors({0, 1, 2, options.control_fd, *cache})
        raise_descriptor_limit()
        drop_privilege(options.uid, options.gid)
        open_cache(options.cache_fd)
    except GatewayError as error:
        sys.stderr.write(f"vallum-gateway: {error}\n")
        return error.exit_code
    # What was loaded stays; looking through it again and again for garbage takes a tenth of the time of a flow.
    gc.freeze()
    asyncio.run(serve(socket.socket(fileno=options.control_fd)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
