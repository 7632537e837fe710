"""Landlock and the limits of PID 1: what holds where the first wall would not, each with a twin that works."""

import asyncio
import contextlib
import os
import time

import pytest

import vallum

pytestmark = [pytest.mark.e2e]

# The kernel lets anybody make character device 0:0 (a whiteout): only Landlock says no, so it shows that Landlock is on.
WHITEOUT = "import os, stat; os.mknod('/tmp/whiteout', stat.S_IFCHR | 0o600, 0)"
MOVE = """
import os
os.makedirs('/tmp/a/b'); os.makedirs('/tmp/c'); open('/tmp/a/b/f', 'w').close()
os.rename('/tmp/a/b/f', '/tmp/c/f'); os.link('/tmp/c/f', '/tmp/a/b/g'); os.rename('/tmp/a/b', '/tmp/c/b')
os.makedirs(os.path.expanduser('~/d')); os.rename('/tmp/c/f', os.path.expanduser('~/d/f'))
"""
TERMINAL = (
    "import os, fcntl, termios; m, s = os.openpty(); fcntl.ioctl(s, termios.TIOCGWINSZ, bytes(8)); print(os.ttyname(s))"
)


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


async def test_landlock_is_on_and_in_nobody_s_way(node):
    if node.tiers["cell.landlock"] != "enforced":
        pytest.skip(node.tiers["cell.landlock"])
    async with node.sandbox() as sb:
        refused = await sb.exec(["python3", "-c", WHITEOUT])
        assert refused.exit_code == 1
        assert b"PermissionError" in refused.stderr
        moved = await sb.exec(["python3", "-c", MOVE])
        assert (moved.exit_code, moved.stderr) == (0, b"")
        terminal = await sb.exec(["python3", "-c", TERMINAL])
        assert terminal.stdout.startswith(b"/dev/pts/")
        assert (await sb.exec(["sh", "-c", "cd /tmp && mkfifo p && mv p q && echo > r && mv r s"])).exit_code == 0


async def test_limits_may_be_set_for_oneself_only(node):
    code = "import resource, os, sys\npid = int(sys.argv[1])\nresource.prlimit(pid, resource.RLIMIT_NOFILE, (99, 99))\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))"
    async with node.sandbox() as sb:
        own = await sb.exec(["python3", "-c", code, "0"])
        assert own.stdout == b"(99, 99)\n"
        other = await sb.exec(["python3", "-c", code, "1"])
        assert b"PermissionError" in other.stderr
        assert (await sb.exec(["sh", "-c", "ulimit -n 50; ulimit -n"])).stdout == b"50\n"


@pytest.mark.skipif(
    os.geteuid() == 0, reason="of an ordinary user's cells, whose helpers are of the guest's user; see the battery"
)
async def test_a_guest_that_stops_the_node_s_helpers_gains_nothing(node):
    stop = """
import os, signal, time
end = time.monotonic() + 4
while time.monotonic() < end:
    for p in os.listdir('/proc'):
        if p.isdigit() and int(p) not in (1, os.getpid()):
            try: os.kill(int(p), signal.SIGSTOP)
            except OSError: pass
"""
    async with node.sandbox() as sb:
        await sb.write_file("/tmp/f", b"x")
        stopping = asyncio.create_task(sb.exec(["python3", "-c", stop], timeout_s=20))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        for _ in range(30):
            with contextlib.suppress(vallum.VallumError):
                assert await asyncio.wait_for(sb.read_file("/tmp/f"), 5) == b"x"
        assert time.monotonic() - began < 10
        with contextlib.suppress(vallum.VallumError):
            await stopping
