"""Look for services in a /24: sweep.py 10.77.0.0/24 22,80. A port counts as open when somebody answers on it."""

# ruff: noqa: D103 - a script, read by nobody but its interpreter

from __future__ import annotations

import asyncio
import ipaddress
import sys


async def probe(host: str, port: int, slots: asyncio.Semaphore) -> str | None:
    """What the service said, or None."""
    async with slots:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2)
        except (OSError, asyncio.TimeoutError):  # noqa: UP041 - Python 3.9 in the guest
            return None
        try:
            if port != 22:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
            said = await asyncio.wait_for(reader.read(60), 1)
        except (OSError, asyncio.TimeoutError):  # noqa: UP041
            return None
        finally:
            writer.close()
        if not said or b"vallum" in said or b" 403 " in said:
            return None
        return f"{host}:{port} {said[:24]!r}"


async def sweep(network: str, ports: list[int]) -> list[str]:
    slots = asyncio.Semaphore(64)
    probes = [probe(str(host), port, slots) for host in ipaddress.ip_network(network).hosts() for port in ports]
    return [found for found in await asyncio.gather(*probes) if found]


def main() -> None:
    open_ports = asyncio.run(sweep(sys.argv[1], [int(port) for port in sys.argv[2].split(",")]))
    sys.stdout.write("".join(f"{line}\n" for line in open_ports) + f"{len(open_ports)} open ports\n")


if __name__ == "__main__":
    main()
