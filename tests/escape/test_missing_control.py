"""A control that is taken away for real stops the node and fails doctor; an optional one only lowers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
WITHOUT = Path(__file__).with_name("without_priv.py")


def doctor(home, *before):
    ran = subprocess.run(
        [*before, sys.executable, "-m", "vallum", "doctor", "--json"],
        env={**os.environ, "VALLUM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, json.loads(ran.stdout)


def without(home, what):
    return doctor(home, sys.executable, str(WITHOUT), what, "--")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("seccomp", "seccomp"),
        ("clone3", "namespaces"),
        ("mount_setattr", "layer"),
        ("fsopen", "mount"),
        ("pivot_root", "root"),
        ("capset", "capabilities"),
        ("socket:2=12", "nftables"),
        ("prctl:0=24", "bounding set"),
    ],
)
def test_an_essential_control_that_is_not_there(home, what, sentence):
    code, found = without(home, what)
    assert code == 3
    assert found["state"] == "missing"
    (only,) = found["controls"]
    assert (only["control"], only["state"]) == ("cell", "missing")
    assert sentence in only["detail"], only["detail"]
    assert len(only["detail"].splitlines()) == 1


@pytest.mark.parametrize(("what", "control"), [("seccomp!", "cell.seccomp"), ("prctl:0=24!", "cell.capabilities")])
def test_a_kernel_that_says_yes_and_does_nothing(home, what, control):
    """Found by trying from inside, not by what system calls answered."""
    code, found = without(home, what)
    assert code == 3
    (only,) = found["controls"]
    assert control in only["detail"], only["detail"]
    assert "no cell is started on this machine" in only["detail"]


def test_no_user_namespaces(home):
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    code, found = doctor(home, "unshare", "-U", "-r", "-m", "sh", "-c", script, "sh")
    assert code == 3
    assert "max_user_namespaces" in found["controls"][0]["detail"]


def test_a_client_is_told_why_no_node_starts(home):
    ran = subprocess.run(
        [sys.executable, str(WITHOUT), "seccomp", "--", sys.executable, "-m", "vallum", "run", "--", "true"],
        env={**os.environ, "VALLUM_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 125
    assert "seccomp" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_kernel_without_landlock_is_lower_and_says_so(home):
    code, found = without(home, "landlock_create_ruleset")
    tier = next(control for control in found["controls"] if control["control"] == "cell.landlock")
    assert (code, found["state"], tier["state"]) == (1, "degraded", "degraded")
    assert "Landlock" in tier["detail"]
    assert tier["remedy"]
