"""Resolve names: resolve.py NAME..."""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import socket
import sys


def main() -> int:
    failed = 0
    for name in sys.argv[1:]:
        try:
            addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
            sys.stdout.write(f"{name}: {' '.join(addresses)}\n")
        except OSError as error:
            sys.stdout.write(f"{name}: {error}\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
