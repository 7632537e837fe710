"""Run inside a closed world: the incident played with every act granted. Prints the outcome as JSON."""

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from vallum.arena.replay import Replay
from vallum.arena.world import World
from vallum.client.face import Node

RULES = """
containment = "research"

[[allow]]
host = "mirror.vallum.test"
ports = [80]

[[allow]]
id = "pool"
cidr = "203.0.113.10/32"
ports = [443, 3333, 14444]
protocols = ["stratum"]

[[allow]]
id = "tunnel"
cidr = "198.51.100.7/32"
ports = [22]
protocols = ["ssh"]

[[allow]]
id = "internal"
cidr = "10.77.0.0/24"
ports = [22, 80]
protocols = ["ssh", "http", "unknown"]

[[allow]]
id = "metadata"
cidr = "169.254.169.254/32"
ports = [80]

[[allow]]
id = "metadata-6"
cidr = "fd00:ec2::254/128"
ports = [80]

[[allow]]
host = "eu1.xmr-pool.vallum.test"

[[allow]]
host = "*.exfil.vallum.test"
"""


async def main(home: Path) -> None:
    rules = home / "granted.toml"
    rules.write_text(RULES, "utf-8")
    world = World.from_environ(os.environ)
    async with Node(home=home) as node:
        outcome = await Replay(world, lambda _: None).play(node, grants=[], rules=rules)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
