"""Send UDP datagrams to an address outside: beacon.py HOST PORT."""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import socket
import sys


def main() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(3):
            try:
                sock.sendto(b"beacon %d: here is the inside" % number, (sys.argv[1], int(sys.argv[2])))
            except OSError as error:
                sys.stdout.write(f"datagram {number}: {error}\n")
                return 1
    sys.stdout.write("3 datagrams sent\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
