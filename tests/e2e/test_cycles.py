"""Create, use and destroy, over and over: nothing is left of a cell that has ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

import vallum
from vallum.client.places import Places

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

AT_ONCE = 4


def read_children(pid: int) -> list[int]:
    """Every process below ``pid``."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *read_children(child)]
    return found


def find_roots(name: str) -> list[str]:
    """Where one home's control groups begin, in every hierarchy."""
    return [root for root, _, _ in os.walk("/sys/fs/cgroup") if root.endswith(f"/{name}")]


def count_groups(roots: list[str]) -> int:
    """Control groups at and below ``roots``."""
    return sum(1 for top in roots for _ in os.walk(top))


def count_bytes(directory: Path) -> int:
    """What the layers of cells take on the disk."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(root, name).lstat().st_blocks * 512
    return total


def find_namespaces(pids: list[int]) -> Counter[str]:
    """How many namespaces of each kind these processes are in."""
    seen = set()
    for pid in pids:
        for kind in ("net", "mnt", "pid", "user", "ipc", "uts", "cgroup"):
            try:
                seen.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
            except OSError:
                continue
    return Counter(link.partition(":")[0] for link in seen)


def count(node: int, home: Path, roots: list[str]) -> dict[str, object]:
    """What a node holds, in the kernel and on the disk."""
    below = read_children(node)
    return {
        "processes": len(below),
        "descriptors": len(os.listdir(f"/proc/{node}/fd")),
        "mounts": len(Path(f"/proc/{node}/mountinfo").read_text().splitlines()),
        "namespaces": find_namespaces([node, *below]),
        "cgroups": count_groups(roots),
        "cells": len(os.listdir(home / "cells")),
        "bytes": count_bytes(home / "cells"),
    }


async def settle(measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """The same three times in a row: what is put away in the background has been, and the spares are built."""
    last, alike = measure(), 0
    for _ in range(600):
        await asyncio.sleep(0.1)
        now = measure()
        alike = alike + 1 if now == last else 0
        last = now
        if alike == 3:
            return now
    return last


async def run_cycles(tmp_path: Path, cycles: int) -> None:
    places = Places(state=tmp_path, runtime=tmp_path / "run")
    groups = f"vallum.{sha256(str(places.state).encode()).hexdigest()[:8]}"  # as node/wiring.py names them
    async with vallum.Node(home=tmp_path) as node:

        async def cycle() -> None:
            async with node.sandbox() as sandbox:
                ran = await sandbox.exec(["sh", "-c", "echo left > /tmp/left; sleep 600 & exit 3"])
                assert ran.exit_code == 3

        await asyncio.gather(*(cycle() for _ in range(AT_ONCE)))
        for _ in range(4):
            await cycle()
        roots = find_roots(groups)
        before = await settle(lambda: count(node.pid, places.state, roots))
        for _ in range(cycles // AT_ONCE):
            await asyncio.gather(*(cycle() for _ in range(AT_ONCE)))
        after = await settle(lambda: count(node.pid, places.state, roots))
        assert after == before
        assert len(os.listdir(f"/proc/{node.pid}/task")) < 20
    assert roots
    for _ in range(200):  # the node ends after its last client
        left = [*os.listdir(places.cells), *filter(os.path.isdir, roots)]
        if not left:
            break
        await asyncio.sleep(0.1)
    assert left == []


async def test_300_cycles_leave_nothing(tmp_path: Path) -> None:
    await run_cycles(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_10000_cycles_leave_nothing(tmp_path: Path) -> None:
    await run_cycles(tmp_path, 10_000)
