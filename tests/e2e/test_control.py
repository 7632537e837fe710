"""What needs servers, in a network namespace with an address of its own: `control_inside.py` and `bypasses_inside.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]
INSIDE = """
ip link set lo up && ip addr add 198.51.100.7/32 dev lo && mount --bind "$1" /etc/hosts
shift; exec "$@"
"""


@pytest.mark.timeout(280)
@pytest.mark.parametrize("file", ["control_inside.py", "bypasses_inside.py"])
def test_at_the_door(tmp_path, file):
    if os.geteuid() != 0:
        pytest.skip("needs root: a namespace with an address of its own")
    if file == "bypasses_inside.py" and not (shutil.which("ssh") and Path("/usr/sbin/sshd").exists()):
        pytest.skip("needs OpenSSH")
    tests = Path(__file__).with_name(file)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n198.51.100.7 web.test ssh.test\n")
    done = subprocess.run(
        [
            *("unshare", "-n", "-m", "--propagation", "private", "sh", "-ec", INSIDE, "sh", hosts),
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests),
        ],
        cwd=tests.parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
