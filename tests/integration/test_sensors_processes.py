"""The proc connector and its fallback, with real processes in a pid namespace of their own."""

import asyncio
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vallum.core.errors import RecordError
from vallum.core.events import ProcessExited, ProcessStarted, SensorStatus
from vallum.core.scope import Attribution, Scope
from vallum.sensors import procfs
from vallum.sensors.proc_connector import ProcConnector, probe
from vallum.sensors.proc_connector_priv import close_connector, open_connector
from vallum.sensors.proc_poll import ProcPoll

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a pid namespace")
pytestmark = [pytest.mark.root, needs_root]

SRC = str(Path(__file__).parents[2] / "src")
EXIT_SYSCALL = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


class Node:
    """Keeps what it is told. The step of a process is the number in its environment's place: its cwd."""

    def __init__(self, *, fails_after: int | None = None):
        self.events, self.failed, self.fails_after = [], [], fails_after

    def emit(self, event):
        if self.fails_after is not None and len(self.events) >= self.fails_after:
            raise RecordError("the disk is full")
        self.events.append(event)
        return len(self.events)

    def scope_of_pid(self, cell, pid):
        try:
            step = int(os.readlink(f"/proc/{pid}/cwd").removeprefix("/tmp/vallum-test-step-"))
        except (OSError, ValueError):
            step = None
        return Scope(run="r", episode=cell, step=step), Attribution(method="cgroup")

    def record_failed(self, cell, error):
        self.failed.append(cell)

    def started(self):
        return [e for e in self.events if isinstance(e, ProcessStarted)]

    def ended(self):
        return [e for e in self.events if isinstance(e, ProcessExited)]

    def statuses(self):
        return [(e.state, e.dropped) for e in self.events if isinstance(e, SensorStatus)]


class Place:
    """A pid namespace whose PID 1 is a shell that runs the lines it is given, one after the other."""

    def __init__(self):
        self.process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", 'while read -r line; do eval "$line"; done'],
            stdin=subprocess.PIPE,
        )
        deadline = time.monotonic() + 5
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.root = int(found[0])

    def run(self, line: str):
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def close(self):
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def place():
    made = Place()
    yield made
    made.close()


@pytest.fixture
async def connector(place):
    node = Node()
    sensor = ProcConnector(node)
    sensor.start()
    sensor.watch(place.root, "c", Scope(run="r", episode="c"))
    yield node, sensor
    sensor.stop()


@pytest.fixture
def steps():
    for step in (1, 5):
        Path(f"/tmp/vallum-test-step-{step}").mkdir(exist_ok=True)
    yield
    for step in (1, 5):
        Path(f"/tmp/vallum-test-step-{step}").rmdir()


async def until(condition, timeout_s: float = 5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@pytest.fixture
def script(tmp_path):
    """A line that runs a program of the system's own Python."""

    def write(text: str) -> str:
        (tmp_path / "program.py").write_text(textwrap.dedent(text))
        return f"/usr/bin/python3 {tmp_path}/program.py"

    return write


async def test_tells_program_arguments_parent_and_end(place, connector):
    node, _ = connector
    assert node.statuses() == [("watching", 0)]
    place.run("/bin/sleep 0.05 # a")
    await until(node.ended)
    [event] = node.started()
    assert event.process.exe == os.path.realpath("/bin/sleep")
    assert event.process.argv == ["/bin/sleep", "0.05"]
    assert event.process.uid == 0
    assert event.ppid == place.root
    assert [(e.pid, e.exit_code, e.signal) for e in node.ended()] == [(event.process.pid, 0, None)]


async def test_tells_exit_codes_and_signals(place, connector):
    node, _ = connector
    place.run("sh -c 'exit 7'")
    place.run("sh -c 'kill -9 $$'")
    await until(lambda: len(node.ended()) == 2)
    assert [(e.exit_code, e.signal) for e in node.ended()] == [(7, None), (None, signal.SIGKILL)]


async def test_follows_a_daemon_and_charges_it_where_it_stands(place, connector, steps):
    node, _ = connector
    place.run(
        "cd /tmp/vallum-test-step-1; sh -c '(setsid sh -c \"sleep 0.3; /bin/true\" &)'; cd /tmp/vallum-test-step-5"
    )
    place.run("sleep 0.5")
    await until(
        lambda: len([e for e in node.started() if e.process.argv[:1] == ["/bin/true"] or not e.process.exe]) > 0
    )
    by_program = {" ".join(e.process.argv): e.scope.step for e in node.started() if e.process.argv}
    assert by_program["sleep 0.3"] == 1
    assert by_program["sleep 0.5"] == 5
    last = [e for e in node.started() if e.process.argv[:1] == ["/bin/true"] or not e.process.exe][-1]
    assert last.scope.step == 1, "a daemon's child belongs to the daemon's step"


async def test_says_that_it_was_too_late_and_never_guesses(place, connector, steps):
    node, _ = connector
    place.run("cd /tmp/vallum-test-step-5")
    place.run("for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done")
    time.sleep(0.3)  # the loop is busy: every one of them has ended
    await until(lambda: len(node.ended()) == 10)
    assert {(e.process.exe, tuple(e.process.argv)) for e in node.started()} == {("", ())}
    assert {(e.scope.step, e.attribution.method) for e in node.started()} == {(5, "lineage")}
    assert all(e.attribution.confidence < 1 for e in node.started())


async def test_does_not_tell_of_the_rest_of_the_machine(place, connector):
    node, sensor = connector
    subprocess.run(["true"])
    place.run("/bin/sleep 0.05")
    await until(node.ended)
    assert len(node.started()) == 1
    assert sensor._members.keys() == {place.root}


async def test_exec_from_a_thread_is_the_process_going_on(place, connector, script):
    node, sensor = connector
    place.run(
        script("""
        import os, threading
        threading.Thread(target=os.execv, args=("/bin/sleep", ["sleep", "0.2"])).start()
    """)
    )
    await until(node.ended)
    assert [e.process.argv[0] for e in node.started()] == ["/usr/bin/python3", "sleep"]
    assert len({e.process.pid for e in node.started()}) == 1
    assert len(node.ended()) == 1
    assert sensor._members.keys() == {place.root}


@pytest.mark.skipif(EXIT_SYSCALL is None, reason="the number of exit(2) is not known here")
async def test_threads_that_outlive_their_leader_stay_followed(place, connector, script):
    node, sensor = connector
    place.run(
        script(f"""
        import ctypes, os, subprocess, threading, time
        def later():
            time.sleep(0.4)
            subprocess.run(["/bin/sleep", "0.1"])
            os._exit(4)
        threading.Thread(target=later).start()
        ctypes.CDLL(None).syscall({EXIT_SYSCALL}, 0)
    """)
    )
    await until(lambda: len(node.ended()) == 2)
    assert [e.process.argv[0] for e in node.started()] == ["/usr/bin/python3", "/bin/sleep"]
    child, parent = node.ended()
    assert parent.pid == node.started()[0].process.pid and child.pid != parent.pid
    assert sensor._members.keys() == {place.root}


async def test_lost_events_are_counted_said_and_made_good(place, connector):
    node, sensor = connector
    sensor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    place.run("for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done; /bin/true; /bin/sleep 30 &")
    time.sleep(0.5)
    await until(lambda: any(state == "degraded" for state, _ in node.statuses()))
    assert sensor.dropped > 0
    assert node.statuses()[-1] == ("degraded", sensor.dropped)
    living = [e.process.argv for e in node.started() if e.process.argv]
    assert ["/bin/sleep", "30"] in living


async def test_members_of_a_late_watch_are_found(place):
    place.run("/bin/sleep 30 &")
    await asyncio.sleep(0.2)
    node = Node()
    sensor = ProcConnector(node)
    sensor.start()
    sensor.watch(place.root, "c", Scope(run="r", episode="c"))
    assert [e.process.argv for e in node.started()] == [["/bin/sleep", "30"]]
    sensor.stop()
    assert sensor._members == {}


async def test_ledger_that_fails_ends_the_watch(place):
    node = Node(fails_after=1)
    sensor = ProcConnector(node)
    sensor.start()
    sensor.watch(place.root, "c", Scope(run="r", episode="c"))
    place.run("/bin/sleep 0.05")
    await until(lambda: node.failed)
    assert node.failed == ["c"] and sensor._members == {}
    sensor.stop()


async def test_drain_takes_what_is_waiting(place, connector):
    node, sensor = connector
    place.run("/bin/sleep 0.01")
    time.sleep(0.3)
    assert node.started() == []
    sensor.drain()
    assert len(node.started()) == 1 and len(node.ended()) == 1


def test_probe_by_attempt_as_root_and_as_nobody():
    assert probe() == "enforced"
    code = f"import os, sys; sys.path.insert(0, {SRC!r}); from vallum.sensors.proc_connector import probe; os.setuid(65534); print(probe())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20).stdout.strip()
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    assert told == "enforced" if release >= (6, 6) else told.startswith("degraded: ")


@pytest.mark.parametrize("kind", ["--pid", "--user"])
def test_probe_in_a_container_says_what_to_do(kind):
    """Also while somebody else on the machine listens, so that events do arrive."""
    listener = open_connector()
    code = f"import sys; sys.path.insert(0, {SRC!r}); from vallum.sensors.proc_connector import probe; print(probe())"
    told = subprocess.run(
        ["unshare", kind, "--fork", sys.executable, "-c", code], capture_output=True, text=True, timeout=20
    ).stdout
    close_connector(listener)
    assert told.startswith("degraded: ") and "polled instead" in told


# -- the fallback ------------------------------------------------------------------------------------


async def test_poll_sees_what_lives_and_tells_programs_apart(place):
    node = Node()
    poll = ProcPoll(node, "a test")
    poll.watch(place.root, "c", Scope(run="r", episode="c"), lambda: procfs.pids_of_namespace(place.root)[1:])
    assert node.statuses() == [("degraded", 0)]
    place.run("sh -c 'sleep 0.3; exec sleep 0.4'")
    poll.start_polling("c")
    await asyncio.sleep(1.2)
    poll.stop_polling("c")
    assert poll.sweep("c") == 0
    programs = [" ".join(e.process.argv) for e in node.started()]
    assert programs[0].startswith("sh -c") and set(programs[1:]) == {"sleep 0.3", "sleep 0.4"}
    assert len(node.ended()) == 2
    assert all(e.exit_code is None and e.sensor == "proc_poll" for e in node.ended())
    poll.stop()


async def test_poll_survives_a_ledger_that_fails(place):
    node = Node(fails_after=1)
    poll = ProcPoll(node, "a test")
    poll.watch(place.root, "c", Scope(run="r", episode="c"), lambda: [os.getpid()])
    poll.start_polling("c")
    assert node.failed == ["c"]
    assert poll.sweep("c") == 0


# -- /proc -------------------------------------------------------------------------------------------


def test_a_process_is_read_in_one_piece_or_not_at_all():
    child = subprocess.Popen(["sleep", "30", "\udcff"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    child.kill()
    time.sleep(0.1)
    assert procfs.read_process(child.pid) is None, "a zombie is no process"
    assert not procfs.is_alive(child.pid)
    child.wait()
    assert procfs.read_process(child.pid) is None
    mine = procfs.read_process(os.getpid())
    assert mine is not None and mine.process.uid == os.getuid() and mine.ppid == os.getppid()


def test_huge_argv_is_cut_and_a_deleted_file_is_said(tmp_path):
    tool = tmp_path / "tool"
    tool.write_bytes(Path("/bin/sleep").read_bytes())
    tool.chmod(0o755)
    child = subprocess.Popen([str(tool), "30"])
    long = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", *["x" * 100_000] * 4])
    try:
        time.sleep(0.3)
        tool.unlink()
        seen = procfs.read_process(child.pid)
        assert seen is not None and seen.process.exe == f"{tool} (deleted)"
        cut = procfs.read_process(long.pid)
        assert cut is not None and "not kept" in cut.process.argv[-1]
        assert sum(map(len, cut.process.argv)) < procfs.ARGV_BYTES + 200
    finally:
        child.kill()
        long.kill()
        child.wait()
        long.wait()
