"""The benches run, name their peers, and assert no timing."""

import json
import shutil
import subprocess
import sys

import pytest

from vallum.arena.figures import OURS

pytestmark = pytest.mark.e2e
VALLUM = [sys.executable, "-I", "-c", "from vallum.cli.main import main; main()"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("models", {"direct, no door"}),
        ("record", {"plain JSONL, no chain", "sqlite (WAL, synchronous=off), a commit each"}),
        pytest.param(
            "sandbox",
            {"subprocess.run (no walls)", "the same outside (no walls)", "runc", "crun", "bwrap", "runsc"},
            marks=pytest.mark.slow,
        ),
        ("gateway", {"direct (no walls)", "plain asyncio relay", "tinyproxy", "squid", "mitmproxy"}),
    ],
)
def test_a_bench_measures_us_and_its_peers(name, peers):
    if name == "gateway" and not all(map(shutil.which, ("ip", "ssh", "sshd"))):
        pytest.skip("needs iproute2, openssh-client and openssh-server")
    done = subprocess.run(
        [*VALLUM, "bench", name, "--json", "--repetitions", "3"], capture_output=True, text=True, timeout=280, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    [bench] = json.loads(done.stdout)["benches"]
    assert bench["name"] == name
    assert bench["machine"]
    assert {figure["subject"] for figure in bench["figures"]} == {OURS, *peers}
    for figure in bench["figures"]:
        assert figure["missing"] or figure["p50"] > 0, figure
        if figure["subject"] == OURS:
            assert figure["ratio"] == 1.0
            assert not figure["missing"]


def test_an_unknown_bench_is_bad_input():
    done = subprocess.run([*VALLUM, "bench", "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nothing" in done.stderr
