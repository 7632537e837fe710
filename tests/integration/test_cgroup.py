"""Cgroup drivers on the real kernel, with real processes. Every driver that this machine can have is tried."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vallum.core.errors import InvalidInput, SandboxError
from vallum.core.limits import MIB, Limits
from vallum.sandbox.cgroup.detect import find_driver

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make cgroups outside a delegated subtree"),
]

FREE = Limits(memory_bytes=None, pids=None)


def without_unified(tmp_path):
    text = Path("/proc/self/mountinfo").read_text()
    path = tmp_path / "mountinfo"
    path.write_text("".join(line for line in text.splitlines(keepends=True) if " - cgroup2 " not in line))
    return path


@pytest.fixture(params=["best", "v1"])
def driver(request, tmp_path):
    mounts = Path("/proc/self/mountinfo") if request.param == "best" else without_unified(tmp_path)
    driver = find_driver(f"vallum.{secrets.token_hex(4)}", mounts=mounts)
    if driver is None:
        pytest.skip(f"this machine has no {request.param} cgroups")
    yield driver
    driver.close()


@pytest.fixture
def make(driver):
    """Makes cells and removes them at the end."""
    groups = []

    def make_cell(limits=FREE, name=None):
        groups.append(driver.make(name or f"cell-{len(groups)}", limits))
        return groups[-1]

    yield make_cell
    for group in groups:
        group.remove()


@pytest.fixture
def start():
    """Starts ``sh -c script`` in a leaf: the shell waits until it has been moved there."""
    running = []

    def start_in(group, step, script):
        process = subprocess.Popen(
            ["/bin/sh", "-c", "read go\n" + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        running.append(process)
        for path in group.enter_paths():
            Path(path).write_text(str(process.pid))
        group.open_leaf(step)
        group.move(process.pid, step)
        process.stdin.write(b"\n")
        process.stdin.flush()
        return process

    yield start_in
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def await_true(check, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.01)
    return False


def test_every_control_is_enforced_here(driver):
    report = driver.probe()
    assert set(report) == {f"cgroup.{name}" for name in ("attribution", "cpu", "memory", "pids", "kill", "freeze")}
    for control, state in report.items():
        assert re.match(r"enforced$|degraded: .+; .+|missing: .+; .+", state), (control, state)
    assert report["cgroup.kill"] == report["cgroup.freeze"] == "enforced"


def test_a_daemon_stays_in_the_step_that_started_it(make, start, tmp_path):
    cell = make()
    note = tmp_path / "pid"
    first = start(cell, 3, f"(setsid sh -c 'echo $$ >{note}; exec sleep 30' >/dev/null 2>&1 &) ; exit 0")
    first.wait(timeout=5)
    assert await_true(lambda: note.exists() and note.read_text().strip())
    pid = int(note.read_text())
    cell.open_leaf(4)
    assert cell.step_of_pid(pid) == 3
    assert cell.pids(3) == [pid]
    assert cell.pids(4) == []
    assert cell.pids() == [pid]
    assert cell.kill(3) == 1
    assert cell.await_dead(3)
    assert cell.pids() == []


def test_a_process_outside_belongs_to_no_step(make):
    cell = make()
    cell.open_leaf(1)
    assert cell.step_of_pid(os.getpid()) is None
    assert cell.step_of_pid(2**22 - 1) is None
    assert cell.step_of_cgroup(1) is None


def test_kill_ends_fifty_forking_processes(make, start):
    cell = make(Limits(memory_bytes=None, pids=300))
    start(
        cell, 0, "i=0; while [ $i -lt 50 ]; do (while :; do (sleep 0.2) ; done) & i=$((i+1)); done; trap '' TERM; wait"
    )
    assert await_true(lambda: len(cell.pids(0)) >= 50)
    begin = time.monotonic()
    assert cell.kill(0) >= 50
    assert cell.await_dead(0, timeout_s=2.0)
    assert time.monotonic() - begin < 2.0
    assert cell.pids() == []


def test_kill_of_one_step_leaves_the_others(make, start):
    cell = make()
    one, two = start(cell, 1, "exec sleep 30"), start(cell, 2, "exec sleep 30")
    assert cell.kill(1) == 1
    assert cell.await_dead(1)
    assert one.wait(timeout=5) == -signal.SIGKILL
    assert two.poll() is None
    assert cell.pids() == [two.pid]


def test_park_takes_a_process_out_of_its_step(make, start):
    cell = make()
    shell, other = start(cell, 1, "exec sleep 30"), start(cell, 1, "exec sleep 30")
    cell.park(shell.pid)
    assert cell.step_of_pid(shell.pid) is None
    assert cell.pids() == [other.pid]
    cell.kill(1)
    assert cell.await_dead(1)
    assert shell.poll() is None
    cell.move(shell.pid, 2)
    assert cell.step_of_pid(shell.pid) == 2


def test_moving_a_process_that_is_gone_says_so(make):
    cell = make()
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    with pytest.raises(SandboxError, match=str(process.pid)):
        cell.move(process.pid, 0)


def test_a_frozen_step_stands_still_and_goes_on(make, start, tmp_path):
    cell = make()
    log = tmp_path / "log"
    start(cell, 5, f"while :; do echo x >>{log}; sleep 0.01; done")
    assert await_true(lambda: log.exists() and log.stat().st_size > 4)
    cell.freeze(5)
    size = log.stat().st_size
    time.sleep(0.2)
    assert log.stat().st_size == size
    cell.thaw(5)
    assert await_true(lambda: log.stat().st_size > size)
    cell.freeze()
    cell.kill(5)
    assert cell.await_dead(5), "a frozen step must still die"


def test_a_frozen_cell_freezes_what_starts_later_but_never_its_pid_1(make, start, tmp_path):
    cell = make()
    first = subprocess.Popen(["sleep", "30"])
    try:
        cell.open_leaf(0)
        cell.park(first.pid)
        cell.freeze()
        late = tmp_path / "late"
        start(cell, 1, f"echo x >{late}; exec sleep 30")
        time.sleep(0.2)
        assert not late.exists()
        assert Path(f"/proc/{first.pid}/wchan").read_text() not in ("do_freezer_trap", "__refrigerator")
        first.terminate()
        assert first.wait(timeout=2) == -signal.SIGTERM
        cell.thaw()
        assert await_true(late.exists)
    finally:
        first.kill()
        first.wait()


def test_usage_grows_with_what_a_step_burns(make, start):
    cell = make()
    idle = start(cell, 1, "exec sleep 30")
    busy = start(cell, 2, "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done; exec sleep 30")
    assert busy.stdout.readline() == b"done\n"
    burnt, rested, total = cell.usage(2), cell.usage(1), cell.usage()
    assert burnt.cpu_ns > 50_000_000
    assert rested.cpu_ns < burnt.cpu_ns / 3
    assert total.cpu_ns >= burnt.cpu_ns
    assert burnt.pids == rested.pids == 1
    assert total.pids == 2
    assert total.memory_bytes is None or total.memory_bytes > 0
    assert idle.poll() is None


def test_cpu_quota_is_enforced(driver, make, start):
    if driver.probe()["cgroup.cpu"] != "enforced":
        pytest.skip("no cpu controller with bandwidth control")
    cell = make(Limits(cpus=0.2, memory_bytes=None, pids=None))
    start(cell, 0, "while :; do :; done")
    begin, used = time.monotonic(), cell.usage(0).cpu_ns
    time.sleep(1.5)
    share = (cell.usage(0).cpu_ns - used) / 1e9 / (time.monotonic() - begin)
    assert 0.05 < share < 0.3


def test_memory_quota_kills_inside_and_only_there(make, start):
    small, other = make(Limits(memory_bytes=32 * MIB, pids=None)), make(Limits(memory_bytes=256 * MIB, pids=None))
    hog = "exec /usr/bin/python3 -c 'b = bytearray(100 << 20); print(len(b), flush=True); import time; time.sleep(30)'"
    killed, fine = start(small, 0, hog), start(other, 0, hog)
    assert killed.wait(timeout=20) == -signal.SIGKILL
    assert killed.stdout.read() == b""
    assert fine.stdout.readline() == b"104857600\n"
    assert small.usage().oom_kills == 1
    assert small.usage().memory_peak_bytes <= 32 * MIB
    assert other.usage().oom_kills == 0
    assert other.usage().memory_peak_bytes > 100 * MIB


def test_pids_quota_stops_a_fork_bomb(make, start):
    cell = make(Limits(memory_bytes=None, pids=20))
    code = (
        "import os, time\n"
        "n = 0\n"
        "try:\n"
        "    while n < 200:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(30); os._exit(0)\n"
        "        n += 1\n"
        "except OSError as error:\n"
        "    print(n, error.errno, flush=True)\n"
        "time.sleep(30)\n"
    )
    bomb = start(cell, 0, f"exec /usr/bin/python3 -c '{code}'")
    made, number = map(int, bomb.stdout.readline().split())
    assert number == 11  # EAGAIN
    assert made <= 20
    assert cell.usage().pids <= 21
    assert cell.kill(0) == made + 1
    assert cell.await_dead(0)


def test_a_cell_leaves_nothing(driver, start):
    cell = driver.make("short-lived", Limits())
    process = start(cell, 0, "exec sleep 30")
    cell.open_leaf(0)
    cell.remove()
    assert process.wait(timeout=5) == -signal.SIGKILL
    assert find_groups("short-lived") == []


def test_sweep_removes_what_a_crash_left_and_nothing_else(driver, make, start, tmp_path):
    crashed = driver.make("crashed", Limits(cpus=1))
    process = start(crashed, 0, "exec sleep 30")
    crashed.freeze()
    other = find_driver(f"vallum.{secrets.token_hex(4)}")
    try:
        kept = other.make("kept", FREE)
        assert driver.sweep() >= 3
        assert process.wait(timeout=5) == -signal.SIGKILL
        assert find_groups("crashed") == []
        assert find_groups("kept") != []
        kept.remove()
    finally:
        other.close()
    assert driver.sweep() == 0


def test_what_a_socket_may_be_stamped_with_outlives_the_leaf(make):
    cell = make()
    leaves = [cell.open_leaf(step) for step in (0, 0, 1)]
    if leaves[0].cgroup_id is None:
        pytest.skip("cgroup v1 has no ids")
    assert len({leaf.cgroup_id for leaf in leaves}) == 3
    assert [cell.step_of_cgroup(leaf.cgroup_id) for leaf in leaves] == [0, 0, 1]
    cell.remove()
    assert cell.step_of_cgroup(leaves[1].cgroup_id) == 0


@pytest.mark.parametrize(("delegated", "says"), [(True, "0::/s0"), (False, "errno EACCES")])
def test_pid_1_may_start_into_leaves_only_when_delegated(make, delegated, says):
    cell = make()
    if cell.open_leaf(9).fd is None:
        pytest.skip("cgroup v1 has no CLONE_INTO_CGROUP")
    cell = make()
    script = Path(__file__).with_name("clone_into_priv.py")
    pid_1 = subprocess.Popen(
        [sys.executable, str(script), "123456"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        for path in cell.enter_paths():
            Path(path).write_text(str(pid_1.pid))
        if delegated:
            cell.delegate(123456)
        pid_1.stdin.write("go\n")
        assert pid_1.stdout.readline() == "ready\n"
        leaf = cell.open_leaf(0)
        assert cell.step_of_pid(pid_1.pid) is None
        pid_1.stdin.write(os.readlink(f"/proc/self/fd/{leaf.fd}") + "\n")
        assert pid_1.stdout.readline().strip() == says
    finally:
        pid_1.kill()
        pid_1.communicate()


def test_delegation_gives_two_files_and_no_directory(make):
    cell = make()
    leaf = cell.open_leaf(0)
    if leaf.fd is None:
        pytest.skip("cgroup v1")
    cell.delegate(123456)
    home = Path(os.readlink(f"/proc/self/fd/{leaf.fd}")).parent
    given = sorted(str(path.relative_to(home)) for path in [home, *home.rglob("*")] if path.stat().st_uid == 123456)
    assert given == ["cgroup.procs", "s0/cgroup.procs"]


def test_a_quota_without_its_controller_is_refused(tmp_path):
    mounts = tmp_path / "mountinfo"
    lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    mounts.write_text("".join(line for line in lines if not re.search(r" - cgroup .*\bmemory\b", line)))
    driver = find_driver(f"vallum.{secrets.token_hex(4)}", mounts=mounts)
    assert driver is not None
    try:
        if driver.probe()["cgroup.memory"] == "enforced":
            pytest.skip("memory is a v2 controller here")
        with pytest.raises(SandboxError, match="memory"):
            driver.make("one", Limits(memory_bytes=64 * MIB))
        assert find_groups("one") == []
        driver.make("one", FREE).remove()
    finally:
        driver.close()


def test_an_explicit_base_must_be_one(tmp_path):
    with pytest.raises(InvalidInput, match="cannot hold cells"):
        find_driver("vallum.00000000", base=str(tmp_path))


def find_groups(name):
    # Not a glob: groups of others come and go meanwhile, which walk() takes in its stride.
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(f"/{name}")]
