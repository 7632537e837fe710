"""`python -m vallum.node`: the trusted process. Started by a client, ends with its last client.

Says one line on stdout: ``ready``, ``running`` (another node of this owner has the lock) or ``error <sentence>``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

from vallum.client.places import Places
from vallum.core.errors import VallumError
from vallum.node.house import House
from vallum.node.server import Server
from vallum.node.wiring import make_backends, make_driver

LOCK_WAIT_S = 15.0
"""How long a node that is just ending may hold the lock."""
FIRST_CLIENT_WAIT_S = 15.0

log = logging.getLogger("vallum.node")


def say(line: str) -> None:
    """Tell the starter, which may have gone."""
    with contextlib.suppress(OSError):
        os.write(1, line.replace("\n", " ").encode() + b"\n")


def take_lock(places: Places) -> int | None:
    """The owner's lock, None when a node that answers has it."""
    fd = os.open(places.runtime / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if places.socket.exists() or time.monotonic() > deadline:
                os.close(fd)
                return None
            time.sleep(0.02)
        else:
            return fd


async def serve(places: Places) -> None:
    """Run until the last client has gone, a signal comes, or a part fails that the node cannot do without."""
    driver = make_driver(places)
    house = House(places, make_backends(places, driver))
    loop = asyncio.get_running_loop()
    server = Server(house)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signum, server.is_over.set)
    try:
        await house.start()
        # What is there now stays: the collector need not walk through it again while a client waits.
        gc.collect()
        gc.freeze()
        listening = await server.listen(str(places.socket))
        say("ready")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        lonely = loop.call_later(FIRST_CLIENT_WAIT_S, lambda: server.is_over.set() if house.clients == 0 else None)
        over = asyncio.ensure_future(server.is_over.wait())
        broken = asyncio.ensure_future(house.is_broken.wait())
        await asyncio.wait({over, broken}, return_when=asyncio.FIRST_COMPLETED)
        lonely.cancel()
        over.cancel()
        broken.cancel()
        # The name goes first, so that a client that comes now starts a node of its own.
        with contextlib.suppress(FileNotFoundError):
            places.socket.unlink()
        listening.close()
        await server.drop_all()
    finally:
        await house.stop()
        if driver is not None:
            driver.close()


def raise_descriptor_limit() -> None:
    """As many descriptors as we may have: every cell holds some, and a guest of our own user (rootless) has half as many
    (native/command.c says why that matters)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Parse, lock, serve."""
    parser = argparse.ArgumentParser(prog="vallum.node")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--runtime", type=Path, required=True)
    arguments = parser.parse_args()
    places = Places(state=arguments.state, runtime=arguments.runtime)
    os.umask(0o077)
    raise_descriptor_limit()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if os.fork() != 0:
        # The node is nobody's child: its starter has nothing to reap, and its end is not the node's.
        os._exit(0)
    lock = take_lock(places)
    if lock is None:
        say("running")
        return 0
    with contextlib.suppress(FileNotFoundError):
        places.socket.unlink()
    for directory in (places.runs, places.cells, places.images):
        directory.mkdir(mode=0o700, exist_ok=True)
    try:
        asyncio.run(serve(places))
    except VallumError as error:
        log.error("%s", error)
        say(f"error {error}")
        return error.exit_code
    except Exception as error:
        log.exception("the node failed")
        say(f"error the node failed: {type(error).__name__}: {error}; its log is {places.runtime}/node.log")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
