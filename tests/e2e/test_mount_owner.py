"""Directories of the host in a cell: whose they are there, and that nothing of it reaches the host."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

LEVELS = ["ns", *(["gvisor"] if shutil.which("runsc") else [])]


@pytest.fixture
def make_work(tmp_path):
    """A directory of files: of its owner, of the agent's id on disk, and of a third."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make directories of other users")
    os.chmod(tmp_path, 0o755)

    def make(owner):
        work = tmp_path / "work"
        (work / "sub").mkdir(parents=True)
        for name, uid in (("mine", owner), ("sub/mine", owner), ("agents", 1000), ("third", 4321)):
            (work / name).write_text(name)
            (work / name).chmod(0o600)
            os.chown(work / name, uid, uid)
        (work / "tool").write_text("#!/bin/sh\nid -u\n")
        (work / "tool").chmod(0o4755)
        for name in ("", "sub", "tool"):
            os.chown(work / name, owner, owner)
        (work / "tool").chmod(0o4755)
        return work

    return make


def look(work):
    """Everything that there is to know of a tree on the host."""
    found = {}
    for path in [work, *sorted(work.rglob("*"))]:
        st = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(st.st_mode) else b""
        found[str(path)] = (
            st.st_mode,
            st.st_uid,
            st.st_gid,
            st.st_ino,
            st.st_nlink,
            st.st_mtime_ns,
            st.st_ctime_ns,
            content,
        )
    return found


WORK = """
set -e
stat -c '%n %u:%g %a' . mine sub sub/mine
cat mine sub/mine; echo
echo more >> mine; echo new > new; mkdir sub/deeper; rm sub/mine; chmod 640 mine
cat third >/dev/null 2>&1 && echo read-third || echo no-third
"""


@pytest.mark.parametrize("owner", [0, 1000, 1234, 70000, 2**31])
@pytest.mark.parametrize("level", LEVELS)
async def test_the_agent_owns_its_work(home, make_work, owner, level):
    work = make_work(owner)
    before = look(work)
    async with (
        vallum.Node(home=home) as node,
        node.sandbox(mounts=[f"{work}:/work"], workdir="/work", level=level) as sb,
    ):
        ran = await sb.exec(["sh", "-c", WORK])
        assert ran.exit_code == 0, ran.stderr
        lines = ran.stdout.decode().splitlines()
        assert [line.split()[1] for line in lines[:4]] == ["1000:1000"] * 4, lines
        assert lines[4] == "minesub/mine"
        assert lines[5] == "no-third", "another user's file stays closed"
        whose = (await sb.exec(["stat", "-c", "%u", "agents", "third"])).stdout.decode().split()
        seen = {0: "0", 1000: "1000", 1234: "1234"}.get(owner, "65534")
        assert whose == [seen, "4321"], "the agent's id on disk is the owner's in turn, and no other id moves"
        if owner != 1000:
            assert (await sb.exec(["cat", "agents"])).exit_code != 0
        assert (await sb.exec(["./tool"])).stdout == b"1000\n", "set-id does nothing"
        assert (await sb.exec(["./tool"], user="4321")).stdout == b"4321\n"
        assert (await sb.exec(["cat", "mine"], user="4321")).exit_code != 0
    assert look(work) == before, "the host is as it was"


@pytest.mark.parametrize("owner", [0, 1234, 70000])
async def test_snapshots_forks_and_diffs_see_the_same_owners(home, make_work, owner):
    work = make_work(owner)
    before = look(work)
    listing = "cd /work; stat -c '%n %u:%g %a' . mine sub new agents third tool"
    async with vallum.Node(home=home) as node:
        async with node.sandbox(mounts=[f"{work}:/work"], workdir="/work") as sb:
            assert (await sb.diff()).changes == []
            await sb.exec(["sh", "-c", "echo more >> mine; echo new > new"])
            changed = {one.path: (one.change, one.uid) for one in (await sb.diff()).changes}
            assert changed == {"/work/mine": ("changed", 1000), "/work/new": ("added", 1000)}
            seen = (await sb.exec(["sh", "-c", listing])).stdout
            snap = await sb.snapshot()
        async with node.fork(snap, workdir="/work") as fork:
            assert (await fork.exec(["sh", "-c", listing])).stdout == seen
            assert (await fork.diff()).changes == []
            assert (
                await fork.exec(["sh", "-c", "cat mine; echo x >> mine; echo y > sub/mine; touch sub/z"])
            ).exit_code == 0
            paths = [one.path for one in (await fork.diff()).changes]
            assert paths == ["/work/mine", "/work/sub/mine", "/work/sub/z"]
            deeper = await fork.snapshot()
        async with node.fork(deeper, workdir="/work") as second:
            assert (await second.exec(["cat", "sub/mine"])).stdout == b"y\n"
    assert look(work) == before


async def test_a_user_of_the_callers_choice_and_a_quota(home, make_work):
    work = make_work(1234)
    async with vallum.Node(home=home) as node:
        async with node.sandbox(mounts=[f"{work}:/work"], workdir="/work", user="root") as sb:
            assert (await sb.exec(["stat", "-c", "%u", ".", "mine"])).stdout == b"0\n0\n"
        limits = vallum.Limits(disk_bytes=32 * 2**20)
        async with node.sandbox(mounts=[f"{work}:/work"], workdir="/work", limits=limits) as sb:
            ran = await sb.exec(["sh", "-c", "echo x > new && echo y >> mine && stat -c %u . new mine"])
            assert ran.stdout == b"1000\n1000\n1000\n", ran.stderr
        async with node.sandbox(mounts=[f"{work}:/work:ro"], workdir="/work") as sb:
            assert (await sb.exec(["cat", "mine"])).stdout == b"mine"
            assert (await sb.exec(["sh", "-c", "echo x >> mine"])).exit_code != 0


async def test_two_directories_of_different_owners(home, make_work, tmp_path):
    work = make_work(0)
    other = tmp_path / "other"
    other.mkdir()
    os.chown(other, 70000, 70001)
    async with vallum.Node(home=home) as node, node.sandbox(mounts=[f"{work}:/work", f"{other}:/work/sub/o"]) as sb:
        assert (
            await sb.exec(["sh", "-c", "echo a > /work/sub/o/a; echo b > /work/b; stat -c %u:%g /work /work/sub/o"])
        ).stdout == (b"1000:1000\n1000:1000\n")
    assert list(other.iterdir()) == []


def test_the_command_line(cli, make_work):
    work = make_work(0)
    ran = cli("run", "-q", "--work", work, "--", "sh", "-c", "echo x > out && cat mine out")
    assert (ran.code, ran.out) == (0, "minex\n"), ran.err
    assert not (work / "out").exists()


ROOTLESS = """
import asyncio, pathlib, sys, vallum
async def main():
    base = pathlib.Path(sys.argv[1])
    (base / "work").mkdir()
    (base / "work" / "mine").write_text("mine")
    async with vallum.Node(home=base / "v") as node, node.sandbox(mounts=[f"{base}/work:/work"], workdir="/work") as sb:
        assert sb.rootless
        ran = await sb.exec(["sh", "-c", "stat -c %u . mine; echo more >> mine; echo x > new; cat mine"])
        assert ran.stdout == b"1000\\n1000\\nminemore\\n", ran
        snap = await sb.snapshot()
        async with node.fork(snap, workdir="/work") as fork:
            assert (await fork.exec(["sh", "-c", "cat new; stat -c %u mine"])).stdout == b"x\\n1000\\n"
        await sb.copy_out("/work", base / "out")
    print(sorted(p.name for p in (base / "work").iterdir()), sorted(p.name for p in (base / "out").iterdir()))
asyncio.run(main())
"""


def test_an_ordinary_user_owns_its_work_too(tmp_path_factory):
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root and setpriv (util-linux) to become an ordinary user")
    base = Path(tempfile.mkdtemp(prefix="vallum-owner-", dir="/tmp"))
    os.chown(base, 12345, 12345)
    environ = {"PATH": os.environ["PATH"], "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}
    become = [setpriv, "--reuid", "12345", "--regid", "12345", "--clear-groups", "--"]
    try:
        ran = subprocess.run(
            [*become, sys.executable, "-c", ROOTLESS, base],
            cwd="/",
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if "Permission denied" in ran.stderr and "vallum" not in ran.stderr:
        pytest.skip("an ordinary user cannot run this Python")
    assert ran.stdout == "['mine'] ['mine', 'new']\n", ran.stderr
