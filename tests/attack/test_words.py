"""What a guest names reaches a terminal or a client only as inert text."""

import asyncio
import json
import os
import struct
import subprocess
import sys

import msgspec
import pytest

import vallum
from vallum.client import wire
from vallum.client.places import Places

pytestmark = [pytest.mark.root, pytest.mark.e2e]

EVIL = "\x1b]0;owned\x07\x1b[2J\u202etxt\u2066\x9b31m<script>alert(1)</script>[bold]\\ud800"


def vallum_command(home, *arguments):
    environ = {**os.environ, "VALLUM_HOME": str(home), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "vallum", *arguments]
    return subprocess.run(command, capture_output=True, env=environ, timeout=60, stdin=subprocess.DEVNULL)


def drives_a_terminal(raw, *, allowed=b"\n\t"):
    text = raw.decode("utf-8")
    return [
        c for c in text if (ord(c) < 32 and c not in allowed.decode()) or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066"
    ]


async def test_names_of_a_guest_drive_no_terminal(home):
    script = (
        "import os,socket,sys\n"
        "n = sys.argv[1].encode('utf-8', 'surrogateescape')\n"
        "open(b'/tmp/' + n.replace(b'/', b'_')[:200], 'w').close()\n"
        "os.link('/bin/true', b'/tmp/x') if False else None\n"
        "import shutil; p = b'/tmp/p' + n.replace(b'/', b'_')[:200]; shutil.copy('/bin/true', p); os.spawnv(os.P_WAIT, p, [n, b'\\xff\\xfe', n])\n"
        "q = lambda l: bytes([len(l)]) + l\n"
        "s = socket.socket(2, 2); s.sendto(b'ab\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0' + q(n[:60]) + q(b'\\x1b[2J') + b'\\0\\0\\1\\0\\1', ('9.9.9.9', 53)); s.settimeout(2)\n"
        "try: s.recv(999)\nexcept OSError: pass\n"
        "s = socket.create_connection(('203.0.113.9', 80)); s.sendall(b'GET /' + n.replace(b' ', b'') + b' HTTP/1.1\\r\\nHost: ' + n + b'\\r\\n\\r\\n')\n"
        "try: s.recv(999)\nexcept OSError: pass\n"
        "s = socket.socket(2, 2); \n"
        "try: s.sendto(n, ('203.0.113.9', 5000))\nexcept OSError: pass\n"
    )
    ran = vallum_command(home, "run", "--", "python3", "-c", script, EVIL)
    assert ran.returncode == 0, ran.stderr
    assert not drives_a_terminal(ran.stderr)
    assert b"denied" in ran.stderr
    for arguments in (
        ["show"],
        ["runs"],
        ["incidents"],
        ["events"],
        ["events", "--json"],
        ["runs", "--json"],
        ["verify"],
    ):
        shown = vallum_command(home, *arguments)
        assert shown.returncode == 0, shown.stderr
        assert not drives_a_terminal(shown.stdout + shown.stderr), arguments
        if "--json" in arguments:
            assert [json.loads(line) for line in shown.stdout.splitlines()]
    report = home / "report.html"
    assert vallum_command(home, "report", "latest", "-o", str(report)).returncode == 0
    assert "<script>alert(1)" not in report.read_text()


async def talk(home, raw, *, seconds=5):
    """Send raw bytes on a connection of its own; what came back until the node hung up."""
    places = Places.from_environ({"VALLUM_HOME": str(home)}, os.geteuid())
    reader, writer = await asyncio.open_unix_connection(str(places.socket))
    try:
        writer.write(raw)
        await writer.drain()
        return await asyncio.wait_for(reader.read(-1), seconds)
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.close()


async def test_a_client_that_speaks_nonsense_is_hung_up_on_alone(home):
    async with vallum.Node(home=home) as node, node.sandbox() as sb:
        deep = b"\x91" * 100_000
        for raw in (
            struct.pack(">I", 0xFFFFFFFF),
            struct.pack(">I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
            struct.pack(">I", len(deep)) + deep,
            wire.frame({"op": "exec", "seq": "x"}),
            wire.frame({"op": "status", "seq": 1, "more": 1}),
            os.urandom(4096),
        ):
            await talk(home, raw, seconds=2)
            assert (await sb.exec(["true"])).exit_code == 0


async def test_a_client_reaches_no_cell_of_another(home):
    async with vallum.Node(home=home) as mine, vallum.Node(home=home) as other, mine.sandbox() as sb:
        shell = await sb.session()
        connection = other.connection
        attempts = [
            wire.ReadFile(seq=connection.next_seq(), sandbox=sb.id, path="/etc/hosts", user=None, limit_bytes=9),
            wire.CloseSandbox(seq=connection.next_seq(), sandbox=sb.id, exit_code=None),
            wire.SessionRun(
                seq=connection.next_seq(), session=shell.id, command="id", step=None, tool_call=None, timeout_s=1.0
            ),
        ]
        for request in attempts:
            with pytest.raises(vallum.CellGone):
                await connection.call(request, msgspec.Raw)
        assert (await shell.run("echo alive")).stdout == b"alive\n"
