"""Every family, as every actor, with a look outside after each. `vallum doctor --attack` and tests/escape run this."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vallum.arena.attacks.base import AGENT, OWNER, ROOT, Actor, Family, Ground, Outcome
from vallum.arena.attacks.entry import Hijacks, Images, Transfers
from vallum.arena.attacks.exhaustion import Exhaustion
from vallum.arena.attacks.files import DEVICES, PROGRAM
from vallum.arena.attacks.kernel import INTERFACES, SOCKETS
from vallum.arena.attacks.namespaces import CGROUPS, NAMESPACES, SETTINGS
from vallum.arena.attacks.neighbours import Neighbours
from vallum.arena.attacks.outside import CLOCK_SLACK_S, Canaries, compare
from vallum.arena.attacks.processes import PROCESSES, TERMINALS
from vallum.client.face import Node
from vallum.core.errors import VallumError
from vallum.core.text import show

FAMILIES: tuple[Family, ...] = (
    INTERFACES, SOCKETS, NAMESPACES, CGROUPS, SETTINGS, PROCESSES, TERMINALS, DEVICES, PROGRAM,
    Transfers(), Hijacks(), Images(), Neighbours(), Exhaustion(),
)  # fmt: skip


def choose_actors(tiers: dict[str, str]) -> Sequence[Actor]:
    """Who there is in a cell of this machine: a rootless one has a single user. Pure."""
    return (AGENT, ROOT, OWNER) if tiers.get("cell.users", "").startswith("enforced") else (AGENT,)


async def attack(
    node: Node, families: Sequence[Family] = FAMILIES, actors: Sequence[Actor] | None = None
) -> AsyncIterator[Outcome]:
    """Run the battery and give outcomes as they come.

    Raises:
        VallumError: no cell can be had at all.
    """
    can_limit = all(node.tiers.get(f"cgroup.{name}", "").startswith("enforced") for name in ("memory", "pids"))
    for actor in choose_actors(node.tiers) if actors is None else actors:
        for family in families:
            for outcome in await attack_once(node, family, actor, can_limit=can_limit):
                yield outcome


async def attack_once(node: Node, family: Family, actor: Actor, *, can_limit: bool) -> list[Outcome]:
    """One family as one actor: its outcomes, and what was found outside afterwards."""
    with tempfile.TemporaryDirectory(prefix="vallum-canary-") as directory:
        Path(directory).chmod(0o755)
        with Canaries(Path(directory) / "c") as canaries:
            facts = {**canaries.facts, "is_owner": actor.root == "owner"}
            ground = Ground(node, actor, facts, can_limit)
            before, mounts, offset = canaries.look(), canaries.mounts(), canaries.clock_offset_s()
            try:
                outcomes = await family.attack(ground)
            except VallumError as error:
                outcomes = [ground.outcome(family.name, "the attack could be made", held=False, detail=str(error))]
            changed = compare(before, canaries.look())
            if gone := mounts - canaries.mounts():
                changed.append(f"{len(gone)} mounts of the host are gone or changed: {show(min(gone), 80)}")
            if abs(canaries.clock_offset_s() - offset) > CLOCK_SLACK_S:
                changed.append("the clock was set")
            outcomes.append(
                ground.outcome(family.name, "nothing outside was changed", held=not changed, detail="; ".join(changed))
            )
            return outcomes


def who_runs() -> str:
    """Root or an ordinary user, in words."""
    return "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
