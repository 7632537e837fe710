"""The incident played twice in one closed world: without walls, then in a cell through the public face."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vallum.arena.incident import ACTS, GRANTS, WORKDIR, Act, Step, make_files, make_steps
from vallum.arena.judgement import Case, Queries, delta, judge, received_by
from vallum.arena.unwalled import Unwalled
from vallum.arena.world import World
from vallum.client.face import Node, Sandbox, Session
from vallum.client.places import Places
from vallum.core.errors import StepTimeout
from vallum.testing.fakes import Received

SETTLE_S = 0.3
"""Time given to what is on its way before counts are final."""


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as played."""

    key: str
    thought: str
    command: str
    step: int
    """Index in the cell."""
    exit_code_unwalled: int
    exit_code: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How both plays went."""

    ok: bool
    """Whether every attack was stopped, charged and recorded, and everything permitted worked."""
    run: str
    episode: str
    cases: list[Case]
    steps: list[Played]
    tiers: dict[str, str]
    rootless: bool
    unwalled_s: float
    cell_s: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the replay is."""

    phase: str
    """``unwalled`` or ``cell``."""
    step: Step
    number: int
    of: int
    unwalled: dict[str, Received]
    """Act -> what arrived of it without walls, so far."""
    cases: list[Case]
    """Acts that are settled."""


class Replay:
    """One replay. ``told`` hears of every step before it starts."""

    def __init__(self, world: World, told: Callable[[Progress], None]) -> None:
        self._world = world
        self._told = told
        self._steps = make_steps(world.facts)
        self._files = make_files(world.facts)
        self._unwalled: dict[str, Received] = {}
        self._before: dict[str, Received] = {}
        self._asked_before = 0
        self._indices: dict[str, int] = {}
        self._has_leaked = False

    async def play(self, node: Node, *, grants: Sequence[str] = GRANTS, rules: Path | None = None) -> Outcome:
        """Play both, judge every act.

        Args:
            node: an open node that runs in this world's near namespace.
            grants: as ``vallum run --allow``.
            rules: rule file, for a replay in which attacks are granted.

        Raises:
            VallumError: the world or a cell failed; an act that got out is an outcome, not an error.
        """
        started = time.monotonic()
        exits_unwalled = await self._play_unwalled()
        between = time.monotonic()
        self._before, self._asked_before = self._world.received(), len(self._world.queries())
        sandbox = await node.sandbox(allow=grants, rules=rules, command=["vallum", "demo"])
        exits = await self._play_in(node, sandbox)
        await asyncio.sleep(SETTLE_S)
        await sandbox.close(exit_code=0)
        cases = self._judge(await node.events(run=sandbox.run, episode=sandbox.episode), ACTS)
        steps = [
            Played(
                key=step.key, thought=step.thought, command=step.command, step=self._indices[step.key],
                exit_code_unwalled=exits_unwalled[step.key], exit_code=exits[step.key],
            )
            for step in self._steps
        ]  # fmt: skip
        return Outcome(
            ok=all(case.ok for case in cases), run=sandbox.run, episode=sandbox.episode, cases=cases, steps=steps,
            tiers=node.tiers, rootless=sandbox.rootless, unwalled_s=between - started, cell_s=time.monotonic() - between,
        )  # fmt: skip

    async def _play_unwalled(self) -> dict[str, int]:
        exits: dict[str, int] = {}
        before, asked = self._world.received(), len(self._world.queries())
        with tempfile.TemporaryDirectory(prefix="vallum-unwalled-") as directory:
            lay_files(Path(directory), self._files)
            async with Unwalled(Path(directory)) as shell:
                for number, step in enumerate(self._steps):
                    self._told(self._progress("unwalled", number, []))
                    exits[step.key], _ = await shell.run(step.command, step.timeout_s)
                    counts, queries = delta(self._world.received(), before), self._world.queries()[asked:]
                    self._unwalled = {act.key: received_by(act, counts, queries) for act in ACTS}
                await asyncio.sleep(SETTLE_S)
        counts, queries = delta(self._world.received(), before), self._world.queries()[asked:]
        self._unwalled = {act.key: received_by(act, counts, queries) for act in ACTS}
        return exits

    async def _play_in(self, node: Node, sandbox: Sandbox) -> dict[str, int]:
        exits: dict[str, int] = {}
        for name, (content, mode) in self._files.items():
            await sandbox.write_file(f"{WORKDIR}/{name}", content, mode=mode)
        cases: list[Case] = []
        settled: set[str] = set()
        async with sandbox.session(cwd=WORKDIR) as shell:
            for number, step in enumerate(self._steps):
                self._told(self._progress("cell", number, cases))
                exits[step.key] = await self._run_one(shell, step, number)
                newly = [act for act in ACTS if act.settled_in == step.key]
                settled |= {act.key for act in newly}
                if newly:
                    cases = self._judge(
                        await node.events(run=sandbox.run, episode=sandbox.episode),
                        [act for act in ACTS if act.key in settled],
                    )
        return exits

    async def _run_one(self, shell: Session, step: Step, number: int) -> int:
        try:
            result = await shell.run(step.command, timeout_s=step.timeout_s, tool_call=f"call_{number}")
        except StepTimeout as error:
            if error.partial is not None:
                self._indices[step.key] = error.partial.step
                self._look_for_canaries(error.partial.stdout, error.partial.stderr)
            return StepTimeout.exit_code
        self._indices[step.key] = result.step
        self._look_for_canaries(result.stdout, result.stderr)
        return result.exit_code

    def _look_for_canaries(self, *outputs: bytes) -> None:
        canaries = [canary.encode() for canary in self._world.facts.canaries]
        self._has_leaked |= any(canary in output for canary in canaries for output in outputs)

    def _judge(self, events: Sequence[dict[str, Any]], acts: Sequence[Act]) -> list[Case]:
        counts: dict[str, Received] = delta(self._world.received(), self._before)
        queries: Queries = self._world.queries()[self._asked_before :]
        return [
            judge(
                act,
                unwalled=self._unwalled[act.key],
                cell=received_by(act, counts, queries),
                events=events,
                expected_step=self._indices.get(act.started_in),
                leaked=self._has_leaked and act.key == "metadata",
            )
            for act in acts
        ]

    def _progress(self, phase: str, number: int, cases: list[Case]) -> Progress:
        return Progress(
            phase=phase,
            step=self._steps[number],
            number=number,
            of=len(self._steps),
            unwalled=dict(self._unwalled),
            cases=cases,
        )


def lay_files(directory: Path, files: dict[str, tuple[bytes, int]]) -> None:
    """Write the agent's files where it works without walls."""
    for name, (content, mode) in files.items():
        target = directory / name
        target.write_bytes(content)
        target.chmod(mode)


async def replay(world: World, places: Places, told: Callable[[Progress], None]) -> Outcome:
    """Play the incident with a node of its own at ``places``, and return when that node has ended.

    Raises:
        VallumError: as :meth:`Replay.play`.
    """
    async with Node(places=places) as node:
        outcome = await Replay(world, told).play(node)
        pid = node.pid
    await wait_gone(pid)
    return outcome


async def wait_gone(pid: int, timeout_s: float = 10.0) -> None:
    """Until a process has ended, or the time is up."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
