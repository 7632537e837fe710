"""The gvisor level as a user sees it: denial, attribution and report, steps, time-outs, and no survivors."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

import vallum
from vallum.sandbox.gvisor.runsc import find_path

pytestmark = [
    pytest.mark.root,
    pytest.mark.e2e,
    pytest.mark.timeout(120),
    pytest.mark.skipif(find_path() is None, reason="runsc is not installed (apt-get install runsc)"),
]

DIAL = """
import socket
s = socket.socket(); s.settimeout(5)
try:
    s.connect(("10.9.8.7", 3333)); s.sendall(b'{"id":1,"method":"mining.subscribe","params":[]}\\n'); print(s.recv(99))
except OSError as error:
    print("refused")
"""


def test_run_denies_charges_and_reports(cli, tmp_path):
    ran = cli("run", "--level", "gvisor", "--", "python3", "-c", DIAL)
    assert ran.code == 0, ran.err
    assert "refused" in ran.out or "b''" in ran.out
    started = cli.events(kind="episode.started")
    assert started[0]["level"] == "gvisor"
    flow = cli.events(kind="net.flow", verdict="deny")[0]
    assert (flow["dst_ip"], flow["dst_port"], flow["protocol"], flow["bytes_out"]) == ("10.9.8.7", 3333, "stratum", 0)
    assert flow["scope"]["step"] == 0
    assert flow["attribution"] == {"method": "lineage", "confidence": 0.9}
    assert flow["process"]["exe"].startswith("/usr/bin/python3")
    assert [e["process"]["argv"][0] for e in cli.events(kind="process.started")] == ["python3"]
    page = tmp_path / "report.html"
    assert cli("report", "latest", "-o", page).code == 0
    assert "10.9.8.7" in page.read_text()
    assert cli("verify", "latest").code == 0


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


async def test_a_daemon_that_dials_later_is_charged_to_the_step_that_started_it(node):
    async with node.sandbox(level="gvisor") as sb, sb.session() as sh:
        await sb.write_file("/tmp/dial.py", "import time; time.sleep(1.5)\n" + DIAL)
        first = await sh.run("(setsid python3 /tmp/dial.py >/dev/null 2>&1 &)")
        for _ in range(3):
            last = await sh.run("true")
        assert last.step == first.step + 3
        for _ in range(100):
            events = await node.events(run=sb.run)
            flows = [e for e in events if e["kind"] == "net.flow"]
            if flows:
                break
            await asyncio.sleep(0.1)
        assert flows[0]["scope"]["step"] == first.step
        assert flows[0]["attribution"]["method"] == "lineage"


async def test_a_timeout_ends_the_whole_tree_in_time(node):
    async with node.sandbox(level="gvisor") as sb:
        tree = "trap '' TERM; (setsid sh -c 'sleep 777 & sleep 777' &) ; echo started; sleep 777"
        began = time.monotonic()
        with pytest.raises(vallum.StepTimeout) as caught:
            await sb.exec(["sh", "-c", tree], timeout_s=1.0)
        assert time.monotonic() - began < 2.0
        assert caught.value.partial.stdout == b"started\n"
        left = await sb.exec(["sh", "-c", "grep -l [s]leep.777 /proc/[0-9]*/cmdline 2>/dev/null | wc -l"])
        assert int(left.stdout) == 0


async def test_both_levels_at_once(node):
    async with node.sandbox(level="gvisor") as one, node.sandbox() as two:
        kernels = [(await sb.exec(["cat", "/proc/sys/kernel/osrelease"])).stdout.strip() for sb in (one, two)]
        assert kernels[1] == os.uname().release.encode() != kernels[0]
        await one.exec(["sh", "-c", "echo mine >/tmp/x"])
        assert (await two.exec(["cat", "/tmp/x"])).exit_code != 0


async def test_a_quota_that_is_used_up_ends_this_cell_and_no_other(node):
    async with node.sandbox() as other:
        async with node.sandbox(level="gvisor", limits=vallum.Limits(memory_bytes=128 * 2**20)) as sb:
            with pytest.raises(vallum.CellGone):
                await sb.exec(["python3", "-c", "b = bytearray(400 << 20)"], timeout_s=30)
        events = await node.events(run=sb.run, episode=sb.episode)
        states = [e["state"] for e in events if e["kind"] == "sensor.status" and e["sensor"] == "gvisor_trace"]
        assert states == ["watching", "blind"]
        assert (await other.exec(["true"])).exit_code == 0


async def test_what_this_level_lacks_is_refused_in_one_sentence(node):
    async with node.sandbox(level="gvisor") as sb:
        with pytest.raises(vallum.VallumError, match="cannot be sealed; use level 'ns'"):
            await sb.snapshot()
        assert (await sb.exec(["true"])).exit_code == 0
    with pytest.raises(vallum.VallumError, match=r"root=owner.*use root=plain, or the level ns"):
        await node.sandbox(level="gvisor", root="owner")


async def test_an_unknown_level_is_refused_in_one_sentence(node):
    with pytest.raises(vallum.VallumError, match="use one of gvisor, ns"):
        await node.sandbox(level="microvm")


async def test_nothing_survives_the_node(home):
    node = vallum.Node(home=home)
    await node.__aenter__()
    sb = await node.sandbox(level="gvisor")
    await sb.exec(["sh", "-c", "setsid sleep 4242 >/dev/null 2>&1 &"])
    pid = sb.pid
    assert Path(f"/proc/{pid}").exists()
    os.kill((await node.status()).pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        await asyncio.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
    assert not [
        p for p in Path("/proc").glob("[0-9]*/cmdline") if f"/{home.name}/" in _words(p) and "runsc" in _words(p)
    ]
    await node.close()


def _words(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
