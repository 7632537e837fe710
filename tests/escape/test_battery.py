"""The battery of escapes, family by family, as guest user, guest root and owner; and as a node of an ordinary user."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vallum
from vallum.arena.attacks.base import AGENT, OWNER, ROOT
from vallum.arena.attacks.battery import FAMILIES, attack_once
from vallum.arena.attacks.outside import Canaries, compare

IS_ROOT = os.geteuid() == 0
ORDINARY_UID = 1500
ACTORS = (AGENT, ROOT, OWNER) if IS_ROOT else (AGENT,)
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

# The one family that takes long: as guest user in every run, as the others in the slow ones.
CASES = [
    pytest.param(family, actor, id=f"{family.name}-{actor.name}", marks=[pytest.mark.slow] if family.name == "exhaustion" and actor is not AGENT else [])
    for family in FAMILIES
    for actor in ACTORS
]  # fmt: skip


@pytest.mark.parametrize(("family", "actor"), CASES)
async def test_every_attempt_comes_to_nothing(home, family, actor):
    async with vallum.Node(home=home) as node:
        can_limit = all(node.tiers[f"cgroup.{name}"].startswith("enforced") for name in ("memory", "pids"))
        outcomes = await attack_once(node, family, actor, can_limit=can_limit)
    assert [o for o in outcomes if not o.held] == []
    assert len(outcomes) >= 3
    assert outcomes[-1].name == "nothing outside was changed"


def test_names_of_families_are_unique():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


def test_what_is_looked_at_outside_notices(tmp_path):
    """The judge is judged: each canary that is touched is seen."""
    with Canaries(tmp_path / "c") as canaries:
        before = canaries.look()
        assert compare(before, canaries.look()) == []
        (tmp_path / "c/target").write_text("owned")
        (tmp_path / "c/new").write_text("")
        pid = canaries.facts["canary_pid"]
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + 1)
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            s.connect("\0" + canaries.facts["canary_abstract"])
            changed = " ".join(compare(before, canaries.look()))
    for what in ("canary file target", "canary file new", "canary process", "canary sockets"):
        assert what in changed


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.skipif(not IS_ROOT, reason="root runs this same file as an ordinary user")
def test_the_same_as_an_ordinary_user():
    repository = Path(__file__).resolve().parents[2]
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not here")
    become = [setpriv, "--reuid", str(ORDINARY_UID), "--regid", str(ORDINARY_UID), "--clear-groups", "--"]
    readable = subprocess.run([*become, sys.executable, "-c", f"open({__file__!r})"], capture_output=True)
    if readable.returncode != 0:
        pytest.skip(f"an ordinary user cannot read {repository} or run {sys.executable}")
    base = Path("/tmp") / f"vallum-escape-{secrets.token_hex(4)}"
    base.mkdir(mode=0o700)
    os.chown(base, ORDINARY_UID, ORDINARY_UID)
    environ = {"PATH": os.environ["PATH"], "HOME": str(base), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}
    environ |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    command = [
        *become,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--basetemp={base}/t",
        "--tb=short",
        __file__,
    ]
    try:
        result = subprocess.run(command, cwd=repository, env=environ, capture_output=True, text=True, timeout=280)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(result.stdout[-6000:], result.stderr[-2000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
