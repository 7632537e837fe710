"""A cell whose rules read requests trusts its run's authority, at every level, in forks, and for an ordinary user's node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import vallum
from vallum.core.errors import InvalidInput

RULES = '[[allow]]\nhost = "read.test"\nports = [443]\nmethods = ["GET"]\n'
LOOK = "md5sum < /etc/vallum/ca.pem; tail -n 100 $SSL_CERT_FILE | grep -c 'END CERT'; echo $NODE_EXTRA_CA_CERTS"
FORK = f"""
import asyncio, pathlib, sys, vallum

async def main():
    rules = pathlib.Path(sys.argv[1]) / "rules.toml"
    rules.write_text({RULES!r})
    async with vallum.Node() as node:
        async with node.sandbox(rules=rules, level=sys.argv[2]) as sb:
            said = [(await sb.exec(["sh", "-c", {LOOK!r}])).stdout]
            if sys.argv[2] == "ns":
                snapshot = await sb.snapshot()
                fork = await node.fork(snapshot)
                said.append((await fork.exec(["sh", "-c", {LOOK!r}])).stdout)
                await fork.close()
        print(said)

asyncio.run(main())
"""


def look(directory: Path, level: str, *prefix: str) -> list[bytes]:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", FORK, str(directory), level],
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "VALLUM_HOME": str(directory / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)  # a list of bytes literals that our own script printed


def check(said: list[bytes], cells: int) -> None:
    assert len(said) == cells
    assert len(set(said)) == 1  # a fork of the same run has the same authority
    digest, certificates, path = said[0].decode().split("\n")[:3]
    assert len(digest.split()[0]) == 32
    assert int(certificates) >= 1
    assert path == "/etc/vallum/ca.pem"


def test_a_cell_and_its_fork(tmp_path: Path) -> None:
    check(look(tmp_path, "ns"), 2)
    # The node ends on its own time once its last client has gone.
    deadline = time.monotonic() + 20
    while (left := list((tmp_path / "home" / "trust").glob("*/*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_gvisor(tmp_path: Path) -> None:
    if shutil.which("runsc") is None or os.geteuid() != 0:
        pytest.skip("needs runsc and root")
    check(look(tmp_path, "gvisor"), 1)


def test_an_ordinary_user_s_node() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv (util-linux) to become an ordinary user")
    directory = Path(tempfile.mkdtemp(prefix="vallum-trust-", dir="/tmp"))
    os.chown(directory, 12345, 12345)
    become = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--")
    try:
        can = subprocess.run([*become, sys.executable, "-c", "import vallum"], capture_output=True)
        if can.returncode != 0:
            pytest.skip("an ordinary user cannot read this checkout or its Python")
        check(look(directory, "ns", *become), 2)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def test_roots_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALLUM_HOME", str(tmp_path / "home"))
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "no.pem").write_text("nothing")
    async with vallum.Node() as node:
        for path in (tmp_path / "no.pem", tmp_path / "missing.pem"):
            with pytest.raises(InvalidInput, match="the authorities of granted servers"):
                await node.sandbox(rules=tmp_path / "rules.toml", upstream_ca=path)
