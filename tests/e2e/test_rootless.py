"""The same face for an ordinary user: fewer walls, all of them named, and the door as shut as ever."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]

UID = 12345
BECOME = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--"]

FACE = r"""
import asyncio, json, sys, vallum

async def main():
    async with vallum.Node() as node, node.sandbox() as sb:
        assert sb.rootless
        who = await sb.exec(["id", "-u"])
        async with sb.session() as sh:
            await sh.run("cd /tmp; (setsid sh -c 'sleep 0.6; exec curl -s -m 2 http://203.0.113.77:8080/' >/dev/null 2>&1 &)")
            await sh.run("true")
            last = await sh.run("sleep 1.2; pwd")
        await sb.write_file("/tmp/f", b"data")
        back = await sb.read_file("/tmp/f")
        try:
            await sb.exec(["sh", "-c", "setsid sleep 77 & sleep 77"], timeout_s=0.4)
            timed_out = False
        except TimeoutError:
            timed_out = True
        left = await sb.exec(["sh", "-c", "grep -l '[s]leep.77' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"])
        events = await node.events(run=sb.run)
        print(json.dumps({"uid": who.stdout.decode(), "pwd": last.stdout.decode(), "back": back.decode(),
                          "timed_out": timed_out, "left": left.stdout.decode(), "events": events}))

asyncio.run(main())
"""


@pytest.fixture
def ordinary():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv (util-linux) to become an ordinary user")
    base = Path(tempfile.mkdtemp(prefix="vallum-rootless-", dir="/tmp"))
    os.chown(base, UID, UID)
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(base),
        "VALLUM_HOME": str(base / "v"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(*arguments, timeout=90):
        return subprocess.run(
            [*BECOME, sys.executable, *map(str, arguments)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd="/",
        )

    if run("-c", "import vallum").returncode != 0:
        shutil.rmtree(base)
        pytest.skip("an ordinary user cannot read this checkout or its Python")
    yield run
    shutil.rmtree(base, ignore_errors=True)


def test_run_denies_and_charges(ordinary):
    ran = ordinary(
        "-m", "vallum", "run", "--json", "--", "sh", "-c", "id -un >&2; curl -s -m 5 http://203.0.113.9/; exit 3"
    )
    assert ran.returncode == 3, ran.stderr
    summary = json.loads(ran.stdout)
    assert "agent" in ran.stderr
    denied = summary["denied_attempts"]
    assert [(e["dst_ip"], e["dst_port"], e["bytes_out"], e["scope"]["step"]) for e in denied] == [
        ("203.0.113.9", 80, 0, 0)
    ]
    assert "curl" in denied[0]["process"]["argv"][0]
    assert denied[0]["attribution"]["method"] in {"lineage", "cgroup"}
    assert ordinary("-m", "vallum", "verify", summary["run"]).returncode == 0


def test_the_face_and_a_daemon_of_an_earlier_step(ordinary):
    ran = ordinary("-c", FACE)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["uid"] == "1000\n"
    assert found["pwd"] == "/tmp\n"
    assert found["back"] == "data"
    assert found["timed_out"]
    assert found["left"] == "0\n"
    flows = [e for e in found["events"] if e["kind"] == "net.flow"]
    assert len(flows) == 1
    assert flows[0]["verdict"] == "deny"
    session_steps = [
        e["scope"]["step"] for e in found["events"] if e["kind"] == "tool.call" and e["name"] == "session.run"
    ]
    assert flows[0]["scope"]["step"] == session_steps[0], "charged to the step that started it"


def test_a_quota_that_cannot_be_enforced_is_refused_not_ignored(ordinary):
    ran = ordinary("-m", "vallum", "run", "--memory", "64M", "--", "true")
    if ran.returncode == 0:
        pytest.skip("this user has a delegated cgroup")
    assert ran.returncode == 125
    assert "memory_bytes" in ran.stderr


def test_doctor_names_what_is_weaker(ordinary):
    ran = ordinary("-m", "vallum", "doctor", "--json")
    assert ran.returncode in (1, 3)
    controls = {c["control"]: c for c in json.loads(ran.stdout)["controls"]}
    assert controls["cell.users"]["state"] == "degraded"
    for name in ("capabilities", "seccomp", "one-door", "egress-tcp", "egress-other", "egress-dns", "pid-namespace"):
        assert controls[name]["state"] == "enforced", controls[name]
    assert all(c["remedy"] for c in controls.values() if c["state"] != "enforced")
