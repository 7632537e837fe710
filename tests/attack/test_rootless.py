"""Where guest and node are one user of the host: what they share must not become a lever."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ORDINARY = 12345


@pytest.fixture
def as_ordinary_user():
    """Runs Python text with the package, as an ordinary user with a home of its own; its output."""
    home = Path(tempfile.mkdtemp(prefix="vu", dir="/tmp"))
    os.chown(home, ORDINARY, ORDINARY)

    def run(text):
        script = home / "script.py"
        script.write_text(text)
        script.chmod(0o644)
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "VALLUM_HOME": str(home / "v")}
        ran = subprocess.run(
            [sys.executable, str(script)], user=ORDINARY, group=ORDINARY, extra_groups=[], env=environ, cwd="/",
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if "ControlMissing" in ran.stderr:
            pytest.skip(f"no cells for an ordinary user here: {ran.stderr[-300:]}")
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()

    yield run
    # Its node may still be ending, and takes away what is its own.
    deadline = time.monotonic() + 10
    while home.exists() and time.monotonic() < deadline:
        shutil.rmtree(home, ignore_errors=True)
        time.sleep(0.05)


def test_a_stopped_keeper_ends_its_cell_only(as_ordinary_user):
    """The keeper of a step is of the guest's user: stopped, it would never tell that its command has ended."""
    lines = as_ordinary_user(
        """
import asyncio, time, vallum
async def main():
    async with vallum.Node() as node:
        sb, other = await node.sandbox(), await node.sandbox()
        began = time.monotonic()
        try:
            await asyncio.wait_for(sb.exec(["sh", "-c", "kill -STOP $PPID; exit 0"]), 10)
            print("answered")
        except vallum.SandboxError:
            print("gone")
        print(time.monotonic() - began < 5, (await other.exec(["echo", "alive"])).stdout.decode())
asyncio.run(main())
"""
    )
    assert lines == ["gone", "True", "alive"]


def test_descriptors_in_flight_stop_nobody_else(as_ordinary_user):
    """The kernel counts descriptors in flight by user; at the sender's limit nobody of that user can pass one."""
    lines = as_ordinary_user(
        r'''
import asyncio, vallum
GUEST = """
import array, os, resource, socket, time
hard = resource.getrlimit(7)[1]
resource.setrlimit(7, (hard, hard))
fd, keep, flying = os.open("/dev/null", 0), [], 0
try:
    while flying < 2 * hard and len(keep) < hard // 2 - 100:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        keep.append((a, b)); a.setblocking(False)
        for i in range(11):
            a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * 253))]); flying += 253
except OSError:
    print("full", flush=True)
time.sleep(30)
"""
async def main():
    async with vallum.Node() as node:
        sb, other = await node.sandbox(), await node.sandbox()
        full = asyncio.Event()
        hog = sb.start(["python3", "-c", GUEST], on_output=lambda stream, data: full.set())
        await asyncio.wait_for(full.wait(), 20)
        for _ in range(3):
            print((await other.exec(["echo", "alive"])).stdout.decode())
        print(len(await other.read_file("/etc/hosts")) > 0)
        third = await node.sandbox()
        print((await third.exec(["echo", "built"])).stdout.decode())
        hog.signal(9)
        await hog.wait()
asyncio.run(main())
'''
    )
    assert lines == ["alive", "alive", "alive", "True", "built"]


def test_a_fork_bomb_has_an_end_without_cgroups(as_ordinary_user):
    lines = as_ordinary_user(
        """
import asyncio, vallum
async def main():
    async with vallum.Node() as node, node.sandbox() as sb:
        if not node.tiers["cgroup.pids"].startswith("enforced"):
            print((await sb.exec(["python3", "-c", "import resource; print(*resource.getrlimit(6))"])).stdout.decode())
        else:
            print(4096, 4096)
asyncio.run(main())
"""
    )
    assert lines == ["4096", "4096"]
