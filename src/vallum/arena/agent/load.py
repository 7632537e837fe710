"""Load for the gateway bench: load.py WHAT COUNT HOST PORT NAME TARGET. Prints JSON: a list of samples.

``denied``: ms from connect to the end of the connection. ``requests``: requests per second, each on a connection of its own,
one after the other. ``kept``: the same on one connection. ``crowd``: requests per second of COUNT requests, :data:`CROWD`
connections at once, each for one request. ``bulk``: MB per second of each download.
"""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Iterator

CROWD = 16
ROUNDS = 5
Address = tuple[str, int]


def denied(address: Address) -> float:
    started = time.perf_counter()
    try:
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(b"x\r\n\r\n")
            while sock.recv(4096):
                pass
    except ConnectionError:
        pass
    return (time.perf_counter() - started) * 1000


def make_request(name: str, target: str, *, is_last: bool) -> bytes:
    connection = "close" if is_last else "keep-alive"
    return f"GET {target} HTTP/1.1\r\nHost: {name}\r\nConnection: {connection}\r\n\r\n".encode()


def check(first: bytes) -> None:
    if not first.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
        raise SystemExit(f"not served: {first[:200]!r}")


def get(address: Address, request: bytes) -> int:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(request)
        first = sock.recv(65536)
        check(first)
        total = len(first)
        while data := sock.recv(262144):
            total += len(data)
    return total


def kept(address: Address, request: bytes, count: int) -> Iterator[float]:
    """On one connection, and on another one whenever the other side will not keep it."""
    sock = socket.create_connection(address, timeout=30)
    for _ in range(count):
        started = time.perf_counter()
        answer = exchange(sock, request)
        if not answer:
            sock.close()
            sock = socket.create_connection(address, timeout=30)
            answer = exchange(sock, request)
        check(answer)
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = len(body)
        while (not lengths or size < lengths[0]) and (data := sock.recv(65536)):
            size += len(data)
        yield 1 / (time.perf_counter() - started)
    sock.close()


def exchange(sock: socket.socket, request: bytes) -> bytes:
    try:
        sock.sendall(request)
        return sock.recv(65536)
    except ConnectionError:
        return b""


def crowd(address: Address, request: bytes, count: int) -> float:
    """Requests per second, each on a connection of its own, :data:`CROWD` of them open at any moment."""
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    begun = ended = 0
    started = time.perf_counter()
    while ended < count:
        while begun < count and len(socks) < CROWD:
            sock = socket.create_connection(address, timeout=30)
            sock.sendall(request)
            socks[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
            begun += 1
        for fd, _ in poll.poll(30):
            if socks[fd].recv(65536):
                continue
            poll.unregister(fd)
            socks.pop(fd).close()
            ended += 1
    return count / (time.perf_counter() - started)


def main() -> None:
    what, count, host, port, name, target = sys.argv[1:7]
    found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    address = str(found[0][4][0]), int(port)
    last = make_request(name, target, is_last=True)
    if what == "kept":
        samples = list(kept(address, make_request(name, target, is_last=False), int(count)))
    elif what == "crowd":
        samples = [crowd(address, last, max(CROWD, int(count) // ROUNDS)) for _ in range(ROUNDS)]
    elif what == "denied":
        samples = [denied(address) for _ in range(int(count))]
    else:
        samples = []
        for _ in range(int(count)):
            started = time.perf_counter()
            size = get(address, last)
            seconds = time.perf_counter() - started
            samples.append(1 / seconds if what == "requests" else size / seconds / 1e6)
    sys.stdout.write(json.dumps(samples) + "\n")


if __name__ == "__main__":
    main()
