"""MCP: servers behind the door, tools of the host: `mcp_inside.py`, in a network namespace with an address of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mcp")
pytestmark = [pytest.mark.root, pytest.mark.e2e]
INSIDE = """
ip link set lo up && ip addr add 198.51.100.7/32 dev lo && mount --bind "$1" /etc/hosts
shift; exec "$@"
"""


@pytest.mark.timeout(180)
def test_mcp_at_the_door(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root: a namespace with an address of its own")
    tests = Path(__file__).with_name("mcp_inside.py")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n198.51.100.7 mcp.test\n")
    done = subprocess.run(
        [
            *("unshare", "-n", "-m", "--propagation", "private", "sh", "-ec", INSIDE, "sh", hosts),
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests),
        ],
        cwd=tests.parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
