"""Walls: what a command in a cell cannot see, keep or do. Each has a twin that works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vallum.testing.sandbox_conformance.driving import MakeCell, close_pipes, python, run, sh, start


async def test_no_privilege_at_all(make_cell: MakeCell) -> None:
    """No capability in any set, none to gain, and the seccomp filter; for the cell's root too."""
    cell = await make_cell()
    for user in (None,) if cell.rootless else (None, "root"):
        text = (await run(cell, ["cat", "/proc/self/status"], user=user)).text
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, (name, user)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


async def test_only_the_cells_own_processes(make_cell: MakeCell) -> None:
    """PID 1 is ours, and no process of the host or of another cell has a number here."""
    cell, other = await make_cell(), await make_cell()
    child = await start(other, "exec sleep 4242")
    pids = (await sh(cell, "ls /proc | grep -c '^[0-9]'")).text
    assert int(pids) < 10
    assert "4242" not in (await sh(cell, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")).text
    for pid in (child.pid, os.getpid()):
        assert (await sh(cell, f"kill -0 {pid}")).exit.code != 0
    assert (await sh(cell, "sleep 5 & kill -0 $! && kill $!")).exit.code == 0
    close_pipes(child)


async def test_pid_1_cannot_be_touched(make_cell: MakeCell) -> None:
    """Neither killed, nor traced, nor read."""
    cell = await make_cell()
    for user in (None,) if cell.rootless else (None, "root"):
        await sh(cell, "kill -9 1; kill -STOP 1; kill -TERM 1", user=user)
        for name in ("mem", "environ", "root/etc/passwd", "fd/0", "cwd/etc/passwd"):
            assert (await sh(cell, f"cat /proc/1/{name}", user=user)).exit.code != 0, name
    assert (await sh(cell, "echo on")).text == "on"


async def test_hostname_and_mounts(make_cell: MakeCell) -> None:
    """The name given; no mount of the host, none that names a path of it as its source to the guest's use."""
    cell = await make_cell(hostname="fake-name")
    assert (await sh(cell, "cat /proc/sys/kernel/hostname")).text == "fake-name"
    assert Path("/proc/sys/kernel/hostname").read_text().strip() != "fake-name"
    text = (await sh(cell, "cat /proc/self/mountinfo")).text
    points = {line.split()[4] for line in text.splitlines()}
    allowed = ("/proc", "/dev", "/sys", "/usr", "/bin", "/sbin", "/lib", "/tmp", "/run")
    assert not [point for point in points if point != "/" and not point.startswith(allowed)]
    assert "cgroup" not in text
    assert (await sh(cell, "ls -A /sys")).text == ""


async def test_nothing_of_the_hosts_files(make_cell: MakeCell, tmp_path: Path) -> None:
    """Homes, credentials and this test's own directory are not there."""
    cell = await make_cell()
    for path in (tmp_path, Path(__file__).parent):
        if not str(path).startswith("/usr/"):
            assert (await run(cell, ["ls", str(path)])).exit.code != 0
    user = None if cell.rootless else "root"
    assert (await sh(cell, "cat /etc/shadow /etc/gshadow /etc/ssh/ssh_host_* /root/.ssh/*", user=user)).stdout == b""
    assert (await sh(cell, "ls -A /home /root /srv /mnt /opt /var/lib /run", user=user)).text.split().count(
        "agent"
    ) == 1
    assert b"agent" in await cell.read_file("/etc/passwd", limit_bytes=1 << 20)


async def test_the_tree_is_private_and_writable(make_cell: MakeCell) -> None:
    """What one cell writes, also over the host's programs, nobody else sees."""
    one, two = await make_cell(), await make_cell()
    user = None if one.rootless else "root"
    await one.write_file("/tmp/mark", b"1")
    result = await sh(one, "echo hacked >/usr/bin/env; cat /usr/bin/env | head -c 6", user=user)
    assert result.text == "hacked" or one.rootless
    assert (await sh(two, "cat /tmp/mark")).exit.code != 0
    assert (await run(two, ["/usr/bin/env", "true"])).exit.code == 0
    assert Path("/usr/bin/env").stat().st_size > 100


async def test_the_network_is_loopback_only(make_cell: MakeCell) -> None:
    """One interface; the doors are sockets of ours, open and listening."""
    cell = await make_cell()
    text = (await sh(cell, "cat /proc/net/dev")).text
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:]] == ["lo"]
    assert cell.doors.tcp
    assert cell.doors.dns
    for door in [*cell.doors.tcp, *cell.doors.dns]:
        assert door.fileno() >= 0
    code = (
        "import socket\ns = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "c = socket.create_connection(s.getsockname()); a, _ = s.accept(); c.sendall(b'own'); print(a.recv(9).decode())"
    )
    assert (await python(cell, code)).text == "own"


async def test_every_connection_arrives_at_a_door(make_cell: MakeCell) -> None:
    """Whatever address is dialled; and another cell's door hears nothing of it."""
    cell, other = await make_cell(), await make_cell()
    code = (
        "import socket\n"
        "for family, address in ((2, '93.184.216.34'), (2, '169.254.169.254'), (2, '10.0.0.1'), (10, 'fd00:ec2::254')):\n"
        "  s = socket.socket(family); s.settimeout(5); s.connect((address, 443)); s.close()\n"
        "print('dialled')"
    )
    assert (await python(cell, code)).text == "dialled"
    accepted = 0
    for door in cell.doors.tcp:
        door.setblocking(False)
        while True:
            try:
                connection, _ = door.accept()
            except BlockingIOError:
                break
            connection.close()
            accepted += 1
    assert accepted == 4
    for door in other.doors.tcp:
        door.setblocking(False)
        with pytest.raises(BlockingIOError):
            door.accept()


DENIED = {
    "user namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x10000000)",
    "mount namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x00020000)",
    "mount": "ctypes.CDLL(None, use_errno=True).mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "chroot": "ctypes.CDLL(None, use_errno=True).chroot(b'/tmp')",
    "bpf": "ctypes.CDLL(None, use_errno=True).syscall({'x86_64': 321}.get(os.uname().machine, 280), 0, None, 0)",
    "io_uring": "ctypes.CDLL(None, use_errno=True).syscall(425, 8, ctypes.create_string_buffer(256))",
    "userfaultfd": "ctypes.CDLL(None, use_errno=True).syscall({'x86_64': 323}.get(os.uname().machine, 282), 1)",
    "keyctl": "ctypes.CDLL(None, use_errno=True).syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 1)",
    "setns": "ctypes.CDLL(None, use_errno=True).setns(os.open('/proc/self/ns/net', 0), 0)",
}
"""Name of a wall -> Python that must give -1."""


@pytest.mark.parametrize("wall", sorted(DENIED))
async def test_a_denied_system_call(make_cell: MakeCell, wall: str) -> None:
    """For the agent and the cell's root."""
    cell = await make_cell()
    for user in (None,) if cell.rootless else (None, "root"):
        result = await python(cell, f"import ctypes, os; print({DENIED[wall]})", user=user)
        assert result.text == "-1", (user, result.stderr)


@pytest.mark.parametrize("family", ["AF_PACKET", "AF_ALG", "AF_VSOCK", "AF_INET raw"])
async def test_a_denied_kind_of_socket(make_cell: MakeCell, family: str) -> None:
    """And the usual kinds work."""
    cell = await make_cell()
    name, _, raw = family.partition(" ")
    kind = "SOCK_RAW" if raw or name == "AF_PACKET" else "SOCK_SEQPACKET" if name == "AF_ALG" else "SOCK_STREAM"
    for user in (None,) if cell.rootless else (None, "root"):
        result = await python(cell, f"import socket; socket.socket(socket.{name}, socket.{kind})", user=user)
        assert result.exit.code == 1
        assert b"Error" in result.stderr
    usual = "import socket\nfor f in (1, 2, 10):\n  for k in (1, 2):\n    socket.socket(f, k).close()\nprint('ok')"
    assert (await python(cell, usual)).text == "ok"


async def test_kernel_settings_cannot_be_changed(make_cell: MakeCell) -> None:
    """Not even those that belong to the cell's namespaces."""
    cell = await make_cell()
    user = None if cell.rootless else "root"
    for path in ("kernel/hostname", "kernel/core_pattern", "net/ipv4/ip_forward", "vm/drop_caches"):
        assert (await sh(cell, f"echo 1 >/proc/sys/{path}", user=user)).exit.code != 0, path
    assert (await sh(cell, "echo b >/proc/sysrq-trigger", user=user)).exit.code != 0
    assert (await sh(cell, "head -c 1 /proc/kcore", user=user)).stdout == b""


async def test_ordinary_work_works(make_cell: MakeCell) -> None:
    """Threads, pipes, subprocesses, mappings, temporary files, device files."""
    cell = await make_cell()
    code = (
        "import threading, subprocess, mmap, tempfile, multiprocessing as mp\n"
        "t = [threading.Thread(target=sum, args=([1],)) for _ in range(8)]\n"
        "[x.start() for x in t]; [x.join() for x in t]\n"
        "assert subprocess.run('echo a | tr a b', shell=True, capture_output=True).stdout == b'b\\n'\n"
        "m = mmap.mmap(-1, 1 << 20); m[0] = 1\n"
        "tempfile.NamedTemporaryFile().write(b'x')\n"
        "q = mp.get_context('fork').SimpleQueue(); q.put(1); assert q.get() == 1\n"
        "open('/dev/null', 'w').write('x'); assert len(open('/dev/urandom', 'rb').read(4)) == 4\n"
        "print('ok')"
    )
    result = await python(cell, code)
    assert result.text == "ok", result.stderr
