"""The child that waits for the next step's command: it becomes that command, is charged as it, and is out of every guest's reach."""

import asyncio
import os
import textwrap
from pathlib import Path

import pytest

from vallum.core.limits import Limits
from vallum.sandbox.base import Command
from vallum.testing.ns_cells import open_cell
from vallum.testing.sandbox_conformance.driving import become, close_pipes, is_alive, python, run, sh, start

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(params=["plain", "owner"])
async def cell(request, tmp_path):
    async with open_cell(tmp_path, root=request.param) as cell:
        if (await cell.open_step(0)) is None:
            pytest.skip("steps are no cgroups here, so no child waits for the next one")
        yield cell


def children(cell):
    """Host pids of the children of the cell's PID 1."""
    return {int(pid) for pid in Path(f"/proc/{cell.pid}/task/{cell.pid}/children").read_text().split()}


def leaf_of(pid):
    return Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip().rpartition("/")[2]


async def wait_for_child(cell, step, besides=()):
    """The child that waits for ``step``, as the host's kernel shows it."""
    found = set()

    def look():
        found.clear()
        found.update(pid for pid in children(cell) - set(besides) if leaf_of(pid) == f"s{step}")
        # Asleep: it has done all that it does ahead.
        return len(found) == 1 and all(
            "S" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3] for pid in found
        )

    assert await become(look), found
    return found.pop()


async def next_command(cell, argv, step, **more):
    await cell.open_step(step)
    return await cell.spawn(Command(argv=argv, **more), step=step)


async def test_it_becomes_the_command_of_its_step(cell):
    assert (await run(cell, ["true"])).exit.code == 0
    waiting = await wait_for_child(cell, 1)
    assert cell.pids() == []
    assert await become(lambda: not cell.usage().pids)
    child = await next_command(cell, [b"sleep", b"600"], 1)
    assert child.pid == waiting
    assert cell.step_of_pid(child.pid) == (1, "cgroup", 1.0)
    assert cell.pids(1) == [waiting]
    assert await cell.kill_step(1) == 1
    assert (await cell.wait(child)).signal == 9
    close_pipes(child)


async def test_many_steps_one_after_the_other(cell):
    """With their input, output, status, user, directory and variables, and nothing left behind."""
    assert (await run(cell, ["true"])).exit.code == 0
    await wait_for_child(cell, 1)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(1, 40):
        said = await run(
            cell,
            ["sh", "-c", 'cat; pwd; echo "$WHO $(id -un)" > /dev/stdout; echo err > /dev/stderr; exit 7'],
            step=step, stdin=b"in\n", environ={"WHO": str(step)}, cwd="/tmp", user="root" if step % 10 == 5 else None,
        )  # fmt: skip
        user = "root" if step % 10 == 5 else "agent"
        assert (said.exit.code, said.text, said.stderr) == (7, f"in\n/tmp\n{step} {user}", b"err\n")
    await wait_for_child(cell, 40)
    assert len(children(cell)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 45  # one a leaf, and those of the child that waits now


async def test_what_cannot_be_started_is_told(cell):
    for step, (command, error) in enumerate(
        [
            (Command(argv=[b"nothing-like-this"]), "CommandNotFound"),
            (Command(argv=[b"true"], cwd="/nowhere"), "InvalidInput"),
            (Command(argv=[b"true"], user="nobody-like-this"), "InvalidInput"),
            (Command(argv=[b"/etc/passwd"]), "CommandNotExecutable"),
        ]
    ):
        await cell.open_step(step)
        with pytest.raises(Exception) as told:
            await cell.spawn(command, step=step)
        assert type(told.value).__name__ == error
    assert (await run(cell, ["echo", "on"], step=9)).text == "on"


async def test_the_users_of_the_moment_count(cell):
    """Its pipes were made for somebody whom /etc/passwd has by another number when the command comes."""
    assert (await run(cell, ["true"])).exit.code == 0
    waiting = await wait_for_child(cell, 1)
    users = (await cell.read_file("/etc/passwd", limit_bytes=1 << 20)).replace(b"agent:*:1000:", b"agent:*:1234:")
    await cell.write_file("/etc/passwd", users, user="root")
    child = await next_command(cell, [b"sleep", b"600"], 1)
    assert child.pid != waiting
    assert Path(f"/proc/{child.pid}").stat().st_uid - Path(f"/proc/{cell.pid}").stat().st_uid != 0
    await cell.kill_step(1)
    close_pipes(child)
    assert (await run(cell, ["id", "-u"], step=2)).text == "1234"
    assert (await sh(cell, "echo out > /dev/stdout", step=3)).text == "out"


async def test_long_commands_are_started_all_the_same(cell):
    assert (await run(cell, ["true"])).exit.code == 0
    await wait_for_child(cell, 1)
    said = await run(cell, ["sh", "-c", "printf %s $0 | wc -c", "x" * 100_000], step=1)
    assert said.text.strip() == "100000"
    assert (await run(cell, ["echo", "on"], step=2)).text == "on"
    assert await become(lambda: len(children(cell)) <= 1)


async def test_it_dies_with_its_step_and_the_step_goes_on(cell):
    assert (await run(cell, ["true"])).exit.code == 0
    waiting = await wait_for_child(cell, 1)
    await cell.open_step(1)
    assert await cell.kill_step(1) == 0, "it is no process of the step"
    assert await become(lambda: not is_alive(waiting))
    assert (await run(cell, ["echo", "on"], step=1)).text == "on"
    assert (await run(cell, ["echo", "on"], step=2)).text == "on"


PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
PTRACE, PRLIMIT, PIDFD_OPEN, PIDFD_GETFD, SETAFFINITY = (101, 302, 434, 438, 203) if os.uname().machine == "x86_64" else (117, 261, 434, 438, 122)
def works(*args):
    return libc.syscall(*args) != -1
def reach(pid):
    found = []
    for sig in (0, 15, 19, 9):
        try:
            os.kill(pid, sig); found.append(f"kill {sig}")
        except OSError:
            pass
        if pid == own: break
    for name in ("exe", "root", "cwd"):
        try:
            os.readlink(f"/proc/{pid}/{name}"); found.append(name)
        except OSError:
            pass
    for name in ("mem", "environ", "fd", "maps", "syscall"):
        try:
            os.listdir(f"/proc/{pid}/fd") if name == "fd" else open(f"/proc/{pid}/{name}", "rb").read(1) if name != "mem" else open(f"/proc/{pid}/mem", "rb")
            found.append(name)
        except OSError:
            pass
    for name in ("oom_score_adj", "comm"):
        try:
            open(f"/proc/{pid}/{name}", "w").write("1"); found.append("write " + name)
        except OSError:
            pass
    fd = libc.syscall(PIDFD_OPEN, pid, 0)
    if fd >= 0 and works(PIDFD_GETFD, fd, 4, 0): found.append("getfd")
    if works(PRLIMIT, pid, 7, None, ctypes.create_string_buffer(16)) and pid != own: found.append("prlimit")
    if works(SETAFFINITY, pid, 128, ctypes.create_string_buffer(b"\\xff" * 128)): found.append("affinity")
    if works(PTRACE, 0x4206, pid, 0, 0): found.append("seize")
    return found
own = os.fork()
if own == 0:
    import time; time.sleep(60); os._exit(0)
print("own", len(reach(own)) > 3)
os.kill(own, 9)
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in (1, os.getpid(), own) and os.stat(f"/proc/{name}").st_uid not in (1000,) and open(f"/proc/{name}/comm").read() == "cell-init\\n":
        print("waiting", reach(int(name)))
"""


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_no_guest_reaches_it(cell, user):
    """Signals, its memory, descriptors, limits, and tracing; the same on a child of one's own works."""
    probe = await start(
        cell,
        "",
        command=Command(argv=[b"sh", b"-c", b'read go; exec python3 -c "$PROBE"'], environ={"PROBE": PROBE}, user=user),
    )
    assert (await run(cell, ["true"], step=1)).exit.code == 0
    waiting = await wait_for_child(cell, 2, {probe.pid})
    os.write(probe.stdin, b"go\n")
    said = b""
    async with asyncio.timeout(20):
        await cell.wait(probe)
    said, errors = os.read(probe.stdout, 65536), os.read(probe.stderr, 65536)
    close_pipes(probe)
    assert said.split(b"\n")[:2] == [b"own True", b"waiting []"], (said, errors)
    assert is_alive(waiting)
    child = await next_command(cell, [b"true"], 2)
    assert child.pid == waiting
    assert (await cell.wait(child)).code == 0
    close_pipes(child)


async def test_it_takes_no_place_of_the_quota(tmp_path):
    """A guest has as many processes as was said, with a child waiting beside them."""
    async with open_cell(tmp_path, limits=Limits(memory_bytes=None, pids=8)) as cell:
        code = textwrap.dedent(
            """
            import os, time
            made = 1
            try:
                while made < 30:
                    if os.fork() == 0:
                        os.close(1); os.close(2); time.sleep(30); os._exit(0)
                    made += 1
            except OSError:
                pass
            print(made, flush=True)
            """
        )
        assert (await run(cell, ["true"])).exit.code == 0
        assert int((await python(cell, code, step=1)).text) in (8, 9)
        await cell.kill_step(1)
        assert (await run(cell, ["echo", "on"], step=2)).text == "on"
