"""Ways around the door that are tried in a real cell, and what the record, `show` and the report say of them."""

import asyncio
import html
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

_spec = importlib.util.spec_from_file_location(
    "inside_ssh_server", Path(__file__).parents[1] / "integration" / "ssh_server.py"
)
assert _spec is not None and _spec.loader is not None
server_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = server_module
_spec.loader.exec_module(server_module)

IP = "198.51.100.7"
SSH = '[[allow]]\nid = "git"\nhost = "ssh.test"\nports = [22]\n'
EXEC = SSH + 'ssh = ["exec"]\ncredential = "deploy"\n'
LOGIN = "ssh -o BatchMode=yes -o ConnectTimeout=10"
"""As a guest types it: host keys are those of the cell's own files, and asked about of nobody."""


class Target:
    """A server beside the granted ones that nobody granted."""

    def __init__(self):
        self.connections = 0
        self.got = bytearray()

    async def handle(self, reader, writer):
        self.connections += 1
        try:
            while data := await reader.read(65536):
                self.got += data
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def target():
    target = Target()
    server = await asyncio.start_server(target.handle, IP, 0)
    target.port = server.sockets[0].getsockname()[1]
    try:
        yield target
    finally:
        server.close()


async def command(home, *arguments, stdin=b""):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vallum", *map(str, arguments)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "VALLUM_HOME": str(home)},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(stdin), 40)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def sshd(home, tmp_path):
    """An SSH server with a credential in the node's store that logs in there."""
    server = server_module.SshServer(os.getpid(), tmp_path, IP)
    with server:
        credential = server.credential
        (tmp_path / "known").write_text("\n".join(credential.host_keys) + "\n")
        code, _, err = await command(
            home, "credentials", "add", "deploy", "--ssh-key", "--user", "root", "--host", "ssh.test",
            "--known-hosts", tmp_path / "known", stdin=credential.secret,
        )  # fmt: skip
        assert code == 0, err
        yield server


@pytest.fixture
async def node(home, sshd):
    async with vallum.Node(home=home) as node:
        yield node


@pytest.fixture
def rules(tmp_path):
    def write(text):
        file = tmp_path / "rules.toml"
        file.write_text(text)
        return file

    return write


async def sh(sb, line, timeout_s=30):
    done = await sb.exec(["bash", "-c", line], timeout_s=timeout_s)
    return done.exit_code, done.stdout.decode(), done.stderr.decode()


async def denied(node, sb, rule):
    events = await node.events(run=sb.run)
    return [e for e in events if e.get("verdict") == "deny" and e.get("rule") == rule]


async def test_a_granted_command_over_ssh(home, node, sshd, rules):
    async with node.sandbox(rules=rules(EXEC)) as sb:
        assert await sh(sb, "test -s /etc/ssh/ssh_known_hosts; ls -A ~/.ssh 2>/dev/null | grep -c id_") == (
            1,
            "0\n",
            "",
        )
        code, out, err = await sh(sb, f"echo in | {LOGIN} -o StrictHostKeyChecking=yes root@ssh.test 'cat; exit 5'")
        assert (code, out) == (5, "in\n"), (
            err,
            [e for e in await node.events(run=sb.run) if e["kind"] in ("net.flow", "dns.query", "ssh.session")],
        )
        code, out, err = await sh(sb, f"{LOGIN} root@ssh.test </dev/null")
        assert (code, out) == (126, ""), err
        assert "session-mismatch" in err
        sessions = [e for e in await node.events(run=sb.run) if e["kind"] == "ssh.session"]
        assert [(e["state"], e["scope"]["step"]) for e in sessions] == [("opened", 1), ("closed", 1), ("denied", 2)]
        assert sshd.logins == 1


async def test_no_forward_of_any_kind(home, node, sshd, rules, target):
    """``-R``, ``-L``, ``-D`` on the command line, and all of them in a real ``~/.ssh/config``."""
    use = f"curl -s -m 3 --socks5 127.0.0.1:1080 http://{IP}:{target.port}/"
    through = f"{LOGIN} -D 1080 root@ssh.test 'sleep 3' & sleep 1.5; {use}; wait"
    local = f"{LOGIN} -L 8025:{IP}:{target.port} root@ssh.test 'sleep 3' & sleep 1.5; curl -s -m 3 http://127.0.0.1:8025/; wait"
    look = "ss -Hltn | grep -E ':(8022|8023)' ; echo looked"
    config = (
        f"Host *\n  RemoteForward 8023 127.0.0.1:22\n  LocalForward 8025 {IP}:{target.port}\n  DynamicForward 1080\n"
    )
    home_of = "$(python3 -c 'import os, pwd; print(pwd.getpwuid(os.getuid()).pw_dir)')"
    lines = [
        f'{LOGIN} -R 8022:127.0.0.1:22 root@ssh.test "{look}"',
        local,
        through,
        f"mkdir -p -m 700 {home_of}/.ssh && printf '{config}' > {home_of}/.ssh/config && {LOGIN} root@ssh.test \"{look}\"",
        f"{LOGIN} root@ssh.test 'sleep 3' & sleep 1.5; {use}; curl -s -m 3 http://127.0.0.1:8025/; wait",
    ]
    async with node.sandbox(rules=rules(EXEC)) as sb:
        for step, line in enumerate(lines):
            _, out, err = await sh(sb, line)
            assert target.connections == 0, line
            assert "secret" not in out and "LISTEN" not in out
            if look in line:
                assert "looked" in out, (out, err)
            refused = await denied(node, sb, "ssh-forwarding")
            assert [e for e in refused if e["scope"]["step"] == step], (line, out, err)
        # The twins: the command alone, and the target from where the command runs.
        curl = f"curl -s -m 3 http://{IP}:{target.port}/"
        code, out, err = await sh(sb, f"{LOGIN} -F /dev/null root@ssh.test '{curl}'")
        assert (code, out) == (0, "secret"), err
        assert target.connections == 1
        run = sb.run
    code, out, _ = await command(home, "show", run)
    assert code == 0 and "ssh-forwarding" in out
    code, out, err = await command(home, "report", run, "-o", "-")
    assert code == 0 and "ssh-forwarding" in html.unescape(out), err


async def test_ssh_that_nobody_says_what_for(home, node, sshd, rules):
    file = rules(SSH)
    async with node.sandbox(rules=file) as sb:
        code, out, _ = await sh(sb, f"{LOGIN} -o StrictHostKeyChecking=no root@ssh.test id")
        assert (code, out) == (255, "")
        assert sshd.logins == 0
        assert [e["scope"]["step"] for e in await denied(node, sb, "ssh-unread")] == [0]
    code, out, err = await command(home, "rules", "explain", file, "ssh.test:22", "--protocol", "ssh")
    assert code == 1, err
    assert "ssh-unread" in out
    code, out, err = await command(home, "rules", "explain", rules(EXEC), "ssh.test:22", "--protocol", "ssh")
    assert code == 0, err
    assert "ssh-unread" not in out


SPEAK = """
import socket, sys
host, port, said = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode().decode("unicode_escape").encode("latin-1")
try:
    with socket.create_connection((host, port), 3) as s:
        s.settimeout(2)
        s.sendall(said)
        got = b""
        while data := s.recv(65536):
            got += data
        print(got.decode("latin-1"))
except OSError as error:
    print(error)
"""
END = r"\r\nConnection: close\r\n\r\n"
FAMILIES = {
    "host-mismatch": ("web.test", "PORT", r"GET /EVIL HTTP/1.1\r\nHost: pool.test" + END),
    "malformed": ("web.test", "PORT", r"GET /EVIL HTTP/1.1\r\nHost: web.test\r\nHost: pool.test" + END),
    "method-mismatch": ("web.test", "PORT", r"DELETE /EVIL HTTP/1.1\r\nHost: web.test" + END),
    "protocol-mismatch": ("web.test", "PORT", r"\x05\x01\x00EVIL"),
    "metadata": ("169.254.169.254", "80", r"GET /EVIL HTTP/1.1\r\nHost: 169.254.169.254" + END),
    "private-range": ("10.77.0.5", "80", r"GET /EVIL HTTP/1.1\r\nHost: 10.77.0.5" + END),
    "default-deny": ("203.0.113.10", "853", r"EVIL"),
    "dns-exfiltration": ("nbswy3dpeb3w64tmmqqgc3tefvqw4zbamfxgi43bnzsa.wild.test", "80", "EVIL"),
}


async def test_the_record_and_the_report_name_every_family(home, node, rules, target):
    port = str(target.port)
    granted = (
        f'[[allow]]\nid = "web"\nhost = "web.test"\nports = [{port}]\nmethods = ["GET"]\n'
        '[[allow]]\nid = "wild"\nhost = "*.wild.test"\nports = [80]\n'
    )
    async with node.sandbox(rules=rules(granted)) as sb:
        for step, (rule, (host, to, said)) in enumerate(FAMILIES.items()):
            await sb.exec(["python3", "-c", SPEAK, host, to.replace("PORT", port), said])
            found = await denied(node, sb, rule)
            assert [e for e in found if e["scope"]["step"] == step], (rule, found)
            assert b"EVIL" not in target.got, rule
        done = await sb.exec(["python3", "-c", SPEAK, "web.test", port, r"GET / HTTP/1.1\r\nHost: web.test" + END])
        assert b"secret" in done.stdout
        run = sb.run
    code, out, err = await command(home, "events", run, "--json")
    assert code == 0, err
    refused = {e["rule"]: e for e in map(json.loads, out.splitlines()) if e.get("verdict") == "deny"}
    assert refused.keys() == FAMILIES.keys()
    assert all(e["reason"] for e in refused.values())
    for words in (["show", run], ["report", run, "-o", "-"]):
        code, out, err = await command(home, *words)
        assert code == 0, err
        assert [rule for rule in FAMILIES if rule not in html.unescape(out)] == [], words
