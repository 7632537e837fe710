"""What an attack is: real programs in real cells, their word, and what is found outside of them afterwards.

A *family* is a class of published or thinkable ways out. It runs as one *actor* (guest user, guest root, root that
owns the cell's files) on a *ground* (a node, canaries outside) and gives outcomes. An attempt holds when it was
refused or came to nothing; a *twin* is its harmless relative, which must work, or a wall would be proven by breakage.

Covered: the programs are ours and the cells fresh, so their word is good; beside it :mod:`.outside` compares what an
attempt could have changed. Not covered: bugs of the kernel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from vallum.arena.attacks.prelude import PRELUDE
from vallum.client.face import Node, Sandbox
from vallum.core.errors import VallumError
from vallum.core.limits import MIB, Limits
from vallum.core.text import show

GUEST_PYTHON = "/usr/bin/python3"
WITHIN_S = 60.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, or one thing found outside."""

    family: str
    name: str
    actor: str
    held: bool
    """The attempt came to nothing; for a twin: it worked."""
    detail: str = ""
    twin: bool = False


@dataclass(frozen=True)
class Actor:
    """Who attacks."""

    name: str
    user: str
    root: Literal["plain", "owner"] = "plain"


AGENT = Actor("agent", "agent")
ROOT = Actor("root", "root")
OWNER = Actor("owner", "root", "owner")


@dataclass
class Ground:
    """Where a family attacks: a node, who attacks, and what the programs are told of the canaries outside."""

    node: Node
    actor: Actor
    facts: Mapping[str, Any]
    can_limit: bool
    """Whether quotas of memory and processes are enforced on this machine."""

    @asynccontextmanager
    async def cell(self, *, limits: Limits | None = None, image: str = "host") -> AsyncIterator[Sandbox]:
        """A fresh cell without network, of the actor's kind."""
        if limits is None and self.can_limit:
            limits = Limits(memory_bytes=512 * MIB, pids=256)
        async with self.node.sandbox(
            image, containment="locked", user=self.actor.user, root=self.actor.root, limits=limits or Limits()
        ) as cell:
            yield cell

    async def run(self, cell: Sandbox, family: str, program: str, **facts: Any) -> list[Outcome]:
        """Run a program of :data:`PRELUDE`'s vocabulary and give what it reports."""
        told = msgspec.json.encode({**self.facts, **facts}).decode()
        try:
            ran = await cell.exec([GUEST_PYTHON, "-I", "-c", PRELUDE + program, told], timeout_s=WITHIN_S)
        except TimeoutError:
            return [self.outcome(family, "the attack ends in time", held=False, detail=f"more than {WITHIN_S:.0f} s")]
        outcomes = []
        for line in ran.stdout.splitlines():
            said = msgspec.json.decode(line, type=tuple[str, bool, str, bool])
            outcomes.append(self.outcome(family, said[0], held=said[1], detail=said[2], twin=said[3]))
        if ran.exit_code != 0:
            why = ran.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {ran.exit_code}"]
            outcomes.append(self.outcome(family, "the attack runs to its end", held=False, detail=why[0]))
        return outcomes

    def outcome(self, family: str, name: str, *, held: bool, detail: str = "", twin: bool = False) -> Outcome:
        """An outcome of this actor."""
        return Outcome(family=family, name=name, actor=self.actor.name, held=held, detail=show(detail, 200), twin=twin)


class Family(Protocol):
    """One class of attacks."""

    @property
    def name(self) -> str:
        """Short and unique."""
        ...

    @property
    def what(self) -> str:
        """What is tried, and which published escapes are of this kind."""
        ...

    async def attack(self, ground: Ground) -> list[Outcome]:
        """Try everything of the family in cells of its own.

        Raises:
            VallumError: the ground itself failed (no cell could be had).
        """
        ...


@dataclass(frozen=True)
class Scripted:
    """A family that is one program in one cell."""

    name: str
    what: str
    program: str

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`Family`."""
        async with ground.cell() as cell:
            return await ground.run(cell, self.name, self.program)


async def is_refused(work: Any) -> str:
    """The sentence of the error that ``work`` (awaitable) ends with; empty when it went well."""
    try:
        async with asyncio.timeout(WITHIN_S):
            await work
    except (VallumError, TimeoutError) as error:
        return str(error) or type(error).__name__
    return ""
