"""Load for the gateway bench: load.py denied|requests|bulk COUNT HOST PORT URL-OR-PATH. Prints JSON: a list of samples.

``denied``: ms from connect to the end of the connection. ``requests``: one request a connection, requests per second.
``bulk``: MB per second of each download.
"""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import json
import socket
import sys
import time


def denied(host: str, port: int) -> float:
    started = time.perf_counter()
    try:
        with socket.create_connection((host, port), timeout=10) as sock:
            sock.sendall(b"x\r\n\r\n")
            while sock.recv(4096):
                pass
    except ConnectionError:
        pass
    return (time.perf_counter() - started) * 1000


def get(host: str, port: int, name: str, target: str) -> int:
    with socket.create_connection((host, port), timeout=30) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        first = sock.recv(65536)
        if not first.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
            raise SystemExit(f"not served: {first[:200]!r}")
        total = len(first)
        while data := sock.recv(262144):
            total += len(data)
    return total


def main() -> None:
    what, count, host, port, name, target = sys.argv[1:7]
    samples = []
    for _ in range(int(count)):
        started = time.perf_counter()
        if what == "denied":
            samples.append(denied(host, int(port)))
            continue
        size = get(host, int(port), name, target)
        seconds = time.perf_counter() - started
        samples.append(1 / seconds if what == "requests" else size / seconds / 1e6)
    sys.stdout.write(json.dumps(samples) + "\n")


if __name__ == "__main__":
    main()
