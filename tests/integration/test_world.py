"""The closed world: what is in it, what is not, and that nothing of it stays."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vallum.arena.world import command_inside

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("ip", "ssh", "sshd"))), reason="needs iproute2, openssh-client and openssh-server"
)
PYTHON = [sys.executable, "-I", "-c"]
IN_THE_NEAR_NAMESPACE = """
import json, os, socket, subprocess
from vallum.arena.world import World
world = World.from_environ(os.environ)
said = {"facts": world.facts.package, "resolv": open("/etc/resolv.conf").read()}
said["links"] = sorted(link["ifname"] for link in json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True).stdout))
said["mirror"] = socket.getaddrinfo("mirror.vallum.test", 80, type=socket.SOCK_STREAM)[0][4][0]
with socket.create_connection(("203.0.113.10", 3333), timeout=3) as s:
    s.sendall(b'{"id": 1, "method": "mining.subscribe", "params": []}\\n')
    s.recv(100)
try:
    socket.create_connection(("93.184.216.34", 80), timeout=3)
except ConnectionRefusedError:
    said["elsewhere"] = "refused"
said["pool"] = world.received()["203.0.113.10:3333"].units
said["queries"] = world.queries()
print(json.dumps(said))
"""


def leftovers() -> list[str]:
    return sorted(path.name for path in Path("/tmp").glob("vallum-[swu]*-*") if path.stat().st_uid == os.geteuid())


def ordinary_user(argv: list[str]) -> list[str]:
    return ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *argv] if os.geteuid() == 0 else argv


@pytest.mark.parametrize(
    "is_ordinary", [False, pytest.param(True, marks=pytest.mark.root)], ids=["as we are", "ordinary user"]
)
def test_the_world_is_closed_and_counts(is_ordinary):
    if (
        is_ordinary
        and subprocess.run(ordinary_user([sys.executable, "-c", "import vallum"]), capture_output=True).returncode
    ):
        pytest.skip("an ordinary user may not read this checkout")
    argv = command_inside([*PYTHON, IN_THE_NEAR_NAMESPACE])
    done = subprocess.run(
        ordinary_user(argv) if is_ordinary else argv, capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["links"] == ["lo", "vallum-n"]
    assert said["resolv"].startswith("nameserver 192.0.2.53\n")
    assert said["mirror"] == "192.0.2.20"
    assert said["pool"] == {"subscribes": 1}
    assert said["elsewhere"] == "refused"
    assert {name for name, _ in said["queries"]} == {"mirror.vallum.test"}


def test_exit_codes_come_through():
    assert subprocess.run(command_inside([*PYTHON, "raise SystemExit(7)"]), timeout=60).returncode == 7
    assert (
        subprocess.run(command_inside([*PYTHON, "import os; os.kill(os.getpid(), 15)"]), timeout=60).returncode == 143
    )


def test_without_a_command_it_says_how_to_use_it():
    done = subprocess.run([sys.executable, "-m", "vallum.arena.world"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage" in done.stderr


def descendants(pid: int) -> dict[int, str]:
    """Pid -> program of everything below a process."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        found |= {child: Path(f"/proc/{child}/comm").read_text().strip(), **descendants(child)}
    return found


def networks(pids):
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # what set the world up may have ended by now
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_its_end(number):
    before = leftovers()
    command = command_inside([*PYTHON, "import time; print('up', flush=True); time.sleep(60)"])
    world = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert world.stdout is not None
    try:
        assert world.stdout.readline() == b"up\n"
        inside = descendants(world.pid)
        assert len(networks([os.getpid(), *inside])) == 3
        assert "sshd" in inside.values()
    finally:
        world.send_signal(number)
        world.wait(timeout=10)
        world.stdout.close()
    deadline = time.monotonic() + 5
    while (left := [pid for pid in inside if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    assert leftovers() == before
