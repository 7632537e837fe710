"""How cells end, whatever ends first, and that nothing is left behind."""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vallum.core.errors import CellGone, ControlMissing, InvalidInput, SandboxError
from vallum.core.limits import Limits
from vallum.sandbox.base import CellSpec, Command, Image, Layer
from vallum.sandbox.ns import backend as backend_module
from vallum.sandbox.ns.backend import NsBackend
from vallum.testing.ns_cells import NO_LIMITS, make_spec, open_backend, open_cell
from vallum.testing.sandbox_conformance.driving import become, close_pipes, is_alive, run, sh, start

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

OWNER = """
import asyncio, os, sys
from pathlib import Path
from vallum.testing.ns_cells import make_spec, open_backend
from vallum.testing.sandbox_conformance.driving import start
async def main():
    home = Path(sys.argv[1])
    async with open_backend(home) as backend:
        cells = [await backend.create(make_spec(home)) for _ in range(3)]
        children = [await start(cell, "setsid sh -c 'sleep 600 & sleep 600' & exec sleep 600") for cell in cells]
        print(backend._process.pid, *[cell.pid for cell in cells], *[child.pid for child in children], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("after_s", [0.0, 0.05])
async def test_killing_the_owner_kills_the_guests(tmp_path, after_s):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 7
        assert all(is_alive(pid) for pid in pids)
        await asyncio.sleep(after_s)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    started = time.monotonic()
    assert await become(lambda: not any(is_alive(pid) for pid in pids), 2.0)
    assert time.monotonic() - started < 1.0
    assert any((tmp_path / "cells").iterdir())
    async with open_backend(tmp_path):
        assert list((tmp_path / "cells").iterdir()) == []


async def test_killing_the_launcher_ends_its_cells_and_says_so(tmp_path):
    async with open_backend(tmp_path) as backend:
        cell = await backend.create(make_spec(tmp_path))
        os.kill(backend._process.pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            await cell.gone.wait()
        with pytest.raises(CellGone):
            await run(cell, ["true"])
        again = await backend.create(make_spec(tmp_path))  # by a new launcher
        assert (await run(again, ["echo", "on"])).text == "on"
    assert list((tmp_path / "cells").iterdir()) == []


async def test_a_build_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    async with open_backend(tmp_path) as backend:
        monkeypatch.setattr(backend_module, "BUILD_WITHIN_S", 0.0)
        defaults = NsBackend._ask.__kwdefaults__
        monkeypatch.setitem(defaults, "within_s", 0.0005)
        with pytest.raises(SandboxError, match="given up"):
            await backend.create(make_spec(tmp_path))
        monkeypatch.undo()
        assert await become(lambda: list((tmp_path / "cells").iterdir()) == [], 2.0)
        cell = await backend.create(make_spec(tmp_path))
        assert (await run(cell, ["echo", "still works"])).text == "still works"


async def test_what_cannot_be_built_says_why_and_leaves_nothing(tmp_path):
    async with open_backend(tmp_path) as backend:
        missing = Image(
            ref="x", digest="", layers=[Layer(at="/", lowers=["/no/such/layer"])], environ={}, user="0", workdir="/"
        )
        with pytest.raises(SandboxError, match=r"open the layer /no/such/layer: No such file"):
            await backend.create(make_spec(tmp_path, image=missing))
        none = Image(ref="x", digest="", layers=[], environ={}, user="0", workdir="/")
        with pytest.raises(InvalidInput):
            await backend.create(make_spec(tmp_path, image=none))
        for bad in ("", "UPPER", "a/b", "..", "a" * 41):
            with pytest.raises(InvalidInput):
                await backend.create(CellSpec(id=bad, image=none, limits=NO_LIMITS))
        assert list((tmp_path / "cells").iterdir()) == []
        cell = await backend.create(make_spec(tmp_path))
        assert (await run(cell, ["true"])).exit.code == 0


async def test_without_the_program_the_level_is_missing(tmp_path):
    backend = NsBackend(tmp_path / "cells", uids=None, driver=None, binary=tmp_path / "nothing")
    with pytest.raises(ControlMissing, match="compile"):
        await backend.start()


async def test_hostile_trees_are_deleted(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    script = textwrap.dedent(
        f"""
        import os
        os.chdir("/tmp")
        for i in range(3000):
            os.mkdir("d"); os.chdir("d")
        os.chdir("/tmp")
        os.mkdir("locked"); open("locked/f", "w").close(); os.chmod("locked", 0)
        os.symlink("{outside}", "link"); os.symlink("/", "locked-root"); os.symlink("..", "up")
        os.mkfifo("fifo")
        for i in range(500): open(f"0{{i}}", "w").close()
        os.mkdir("0"); os.mkdir("1"); os.mkdir("1/0")
        os.mkdir(b"odd\\n\\xff -rf"); open(b"odd\\n\\xff -rf/\\x01", "w").close()
        os.rename("/etc/passwd", "/etc/gone"); os.mkdir(".removing-1")
        """
    )
    for with_range in (True, False):
        async with open_cell(tmp_path, with_range=with_range, with_groups=with_range) as cell:
            user = "root" if with_range else None
            result = await run(cell, ["python3", "-c", script], user=user)
            assert result.exit.code == 0 or not with_range, result.stderr
        assert list((tmp_path / "cells").iterdir()) == []
    assert (outside / "precious").read_text() == "kept"


async def test_the_directory_may_be_reached_by_nobody_else(tmp_path):
    async with open_cell(tmp_path):
        cells = tmp_path / "cells"
        assert cells.stat().st_mode & 0o777 == 0o700
        assert all(entry.stat().st_mode & 0o777 == 0o700 for entry in cells.iterdir())


async def test_a_guest_that_kills_its_keeper_loses_its_cell(tmp_path):
    """Lineage only: the keeper has the guest's own user, so it can be killed; nothing is then left uncharged."""
    async with open_cell(tmp_path, with_range=False, with_groups=False) as cell:
        child = await start(cell, "setsid sleep 600 & sleep 0.2; kill -9 $(ps -o ppid= -p $$); sleep 600")
        async with asyncio.timeout(5):
            await cell.gone.wait()
        assert not is_alive(child.pid)
        close_pipes(child)


async def test_lineage_when_there_is_a_range_but_no_cgroup(tmp_path):
    async with open_cell(tmp_path, with_groups=False) as cell:
        assert not cell.rootless
        child = await start(cell, "setsid sh -c 'sleep 600 & sleep 600' & exec sleep 600", step=7)
        assert await become(lambda: len(cell.pids(7)) >= 4)
        assert cell.step_of_pid(child.pid)[:2] == (7, "lineage")
        assert await cell.kill_step(7) >= 4
        assert cell.pids() == []
        assert (await sh(cell, "echo on", step=8)).text == "on"
        close_pipes(child)


async def test_root_of_a_user_namespace_gets_rootless_cells(tmp_path):
    """Privilege is found by attempting: here we are uid 0 and may map one id only."""
    code = """
import asyncio, os, sys
from pathlib import Path
from vallum.testing.ns_cells import open_backend, make_spec
from vallum.testing.sandbox_conformance.driving import run
async def main():
    home = Path(sys.argv[1])
    assert os.geteuid() == 0
    async with open_backend(home, with_groups=False) as backend:
        assert backend.probe()["cell.users"].startswith("degraded"), backend.probe()
        cell = await backend.create(make_spec(home, rootless=True))
        assert cell.rootless
        print((await run(cell, ["id", "-u"])).text)
asyncio.run(main())
"""
    home = Path("/var/tmp") / f"vallum-test-{secrets.token_hex(4)}"
    home.mkdir(mode=0o700)
    shutil.chown(home, 12345, 12345)
    try:
        command = [
            "setpriv",
            "--reuid",
            "12345",
            "--regid",
            "12345",
            "--clear-groups",
            "--",
            "unshare",
            "-Ur",
            sys.executable,
            "-c",
            code,
            str(home),
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], "HOME": str(home)}
        )
    finally:
        shutil.rmtree(home)
    assert result.stdout == "1000\n", result.stderr


async def test_many_at_once(tmp_path):
    async with open_backend(tmp_path) as backend:
        cells = await asyncio.gather(*(backend.create(make_spec(tmp_path, limits=Limits())) for _ in range(20)))
        results = await asyncio.gather(*(run(cell, ["echo", cell.id]) for cell in cells))
        assert [result.text for result in results] == [cell.id for cell in cells]
        await asyncio.gather(*(cell.close() for cell in cells))
    assert list((tmp_path / "cells").iterdir()) == []


async def test_given_up_requests_do_not_run_on(tmp_path):
    """A waiter that is cancelled at any moment leaves neither a process nor a descriptor."""
    async with open_cell(tmp_path) as cell:
        await cell.write_file("/tmp/big", b"x" * 3_000_000)
        assert (await run(cell, ["true"])).exit.code == 0
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(40):
            for work in (
                cell.spawn(Command(argv=[b"sleep", b"600"]), step=1),
                cell.read_file("/tmp/big", limit_bytes=1 << 30),
                cell.write_file("/tmp/other", b"y" * 1_000_000),
            ):
                task = asyncio.get_running_loop().create_task(work)
                await asyncio.sleep(turn * 0.0001)
                task.cancel()
                try:
                    child = await task
                except asyncio.CancelledError:
                    continue
                if child is not None and not isinstance(child, bytes):
                    close_pipes(child)
        await cell.kill_step(1)
        assert await become(lambda: cell.pids() == [])
        await asyncio.sleep(0.2)
        # A leaf's descriptor, and those of the child that waits for the next command.
        assert len(os.listdir("/proc/self/fd")) <= before + 5
        assert (await run(cell, ["echo", "on"])).text == "on"
