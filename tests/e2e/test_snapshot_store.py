"""Snapshots on disk: a full disk, a node killed at any moment, an ordinary user, what is left behind (nothing)."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]


def kept(home):
    """Names in the store that are not a live cell's own listings."""
    return sorted(path.name for path in (home / "snapshots").iterdir() if not path.name.startswith(".cell-"))


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


async def test_a_full_disk_is_one_sentence_and_nothing_is_left(home, small_disk):
    (home / "snapshots").symlink_to(small_disk)
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        await sb.exec(["sh", "-c", "echo small > /tmp/small"])
        snap = await sb.snapshot()
        await sb.exec(["sh", "-c", "head -c 40000000 /dev/urandom > /tmp/big"])
        with pytest.raises(vallum.SandboxError, match=r"No space left.*free disk space"):
            await sb.snapshot()
        assert kept(home) == [snap.id]
        assert (await sb.exec(["cat", "/tmp/small"])).stdout == b"small\n", "the cell goes on"
        await sb.exec(["rm", "/tmp/big"])
        again = await sb.snapshot()
        async with node.fork(again) as fork:
            assert (await fork.exec(["cat", "/tmp/small"])).stdout == b"small\n"
        kinds = [e.kind for e in await node.events(run=sb.run)]
        assert kinds.count("snapshot.made") == 2, "what failed is not on record as made"


async def test_a_node_killed_at_any_moment_leaves_whole_snapshots_or_none(home):
    made = set()
    for turn in range(12):
        async with vallum.Node(home=home) as node:
            listed = {one.id for one in await node.snapshots()}
            assert made <= listed, "one that was answered is there for good"
            assert [name for name in kept(home) if name.startswith(".")] == []
            for one in listed:
                if turn % 4 == 0:
                    async with node.fork(one, run=f"look-{turn}-{one}") as fork:
                        n = int((await fork.exec(["sh", "-c", "ls /tmp | wc -l"])).stdout)
                        assert n == 200, "all of it"
            sb = await node.sandbox()
            await sb.exec(["sh", "-c", "for i in $(seq 200); do echo $i > /tmp/f$i; done"])
            asking = asyncio.ensure_future(sb.snapshot())
            await asyncio.sleep(random.uniform(0, 0.1))
            os.kill(node.pid, signal.SIGKILL)
            with contextlib.suppress(vallum.NodeError):
                made.add((await asking).id)
    async with vallum.Node(home=home) as node:
        for one in await node.snapshots():
            await node.delete(one)
        assert kept(home) == []


async def test_deleting_is_put_right_after_a_kill(home):
    async with vallum.Node(home=home) as node:
        sb = await node.sandbox()
        snap = await sb.snapshot()
        (home / "snapshots" / snap.id).rename(home / "snapshots" / ".old-1")
        (home / "snapshots" / ".new-1").mkdir()
        (home / "snapshots" / "s123").mkdir()
        (home / "snapshots" / "s123" / "manifest.json").write_text("{torn")
        os.kill(node.pid, signal.SIGKILL)
    async with vallum.Node(home=home) as node:
        assert await node.snapshots() == []
        assert kept(home) == []


async def test_the_image_of_a_snapshot_must_still_be_there(home, tmp_path):
    (tmp_path / "data").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    async with vallum.Node(home=home) as node:
        async with node.sandbox(mounts=[f"{tmp_path}/data:/data"], user="root") as sb:
            await sb.exec(["sh", "-c", "chmod 0750 /data; echo x > /data/x"])
            snap = await sb.snapshot()
        async with node.fork(snap) as fork:
            assert (await fork.exec(["sh", "-c", "stat -c %a /data; cat /data/x"])).stdout == b"750\nx\n"
            assert (await fork.exec(["id", "-un"])).stdout == b"root\n", "the parent's user"
        shutil.rmtree(tmp_path / "data")
        with pytest.raises(vallum.SandboxError, match="its image host is gone"):
            await node.fork(snap)
        assert (await node.status()).cells == 0


ROOTLESS = """
import asyncio, sys, vallum
async def main():
    async with vallum.Node(home=sys.argv[1]) as node, node.sandbox() as sb:
        assert sb.rootless
        await sb.exec(["sh", "-c", "cd /tmp; mkdir d shut; echo 1 > d/a; echo s > shut/s; chmod 0 shut d/a; rm /etc/hostname"])
        snap = await sb.snapshot()
        async with node.fork(snap) as one, node.fork(snap) as two:
            look = "cd /tmp; stat -c '%n %a %U' d d/a shut; chmod 700 shut d/a; cat shut/s d/a; ls /etc/hostname"
            r = await one.exec(["sh", "-c", look])
            assert r.stdout == b"d 755 agent\\nd/a 0 agent\\nshut 0 agent\\ns\\n1\\n", r
            assert (await two.exec(["sh", "-c", look])).stdout == r.stdout
            deeper = await one.snapshot(processes="end")
        changes = {c.path: c.change for c in (await sb.diff()).changes}
        assert changes["/etc/hostname"] == "removed" and changes["/tmp/d/a"] == "added", changes
        for snapshot in (deeper, snap):
            await node.delete(snapshot)
        print("fine", await node.snapshots())
asyncio.run(main())
"""


def test_an_ordinary_user_can_do_it_too(tmp_path_factory):
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not here")
    base = Path("/tmp") / f"vallum-fork-{os.getpid()}"
    base.mkdir(mode=0o700)
    os.chown(base, 12345, 12345)
    command = [
        setpriv,
        "--reuid",
        "12345",
        "--regid",
        "12345",
        "--clear-groups",
        "--",
        sys.executable,
        "-c",
        ROOTLESS,
        base,
    ]
    environ = {"PATH": os.environ["PATH"], "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}
    try:
        ran = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=60)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if "Permission denied" in ran.stderr and "vallum" not in ran.stderr:
        pytest.skip("an ordinary user cannot run this Python")
    assert ran.stdout == "fine []\n", ran.stderr
