"""Download a file and check its sha256: fetch.py URL SHA256 TARGET."""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import hashlib
import sys
import urllib.request


def main() -> int:
    url, wanted, target = sys.argv[1:4]
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - the URL is the task's own
            data = reply.read()
    except OSError as error:
        sys.stdout.write(f"{url}: {error}\n")
        return 1
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        sys.stdout.write(f"{url}: sha256 is {found}, not {wanted}\n")
        return 1
    with open(target, "wb") as file:  # noqa: PTH123
        file.write(data)
    sys.stdout.write(f"{target}: {len(data)} bytes, sha256 OK\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
