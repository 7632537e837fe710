"""Root of an owner cell, attacked from inside: it owns the cell's files and nothing else, and nobody becomes PID 1's user."""

import os
import shutil
import textwrap

import pytest

from vallum.core.errors import ControlMissing, GuestFileError, InvalidInput
from vallum.sandbox.base import Command, Image, Layer
from vallum.sandbox.images.resolve import resolve
from vallum.testing.ns_cells import make_spec, open_backend, open_cell
from vallum.testing.sandbox_conformance.driving import close_pipes, python, read_until, run, sh

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

OWNER = f"{(1 << 0) | (1 << 1) | (1 << 3) | (1 << 4) | (1 << 6) | (1 << 7):016x}"
NONE = "0" * 16
CALL = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(*args):
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "ok"
def attempt(what, *args):
    try:
        what(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
X86 = os.uname().machine == "x86_64"
"""


@pytest.fixture
async def cell(tmp_path):
    async with open_cell(tmp_path, root="owner") as cell:
        yield cell


async def capabilities(cell, user, prefix=()):
    result = await run(cell, [*prefix, "grep", "Cap", "/proc/self/status"], user=user)
    return dict(line.split(":\t") for line in result.text.splitlines())


async def test_who_has_what(cell, tmp_path):
    root = await capabilities(cell, "root")
    assert root == {"CapInh": OWNER, "CapPrm": OWNER, "CapEff": OWNER, "CapBnd": NONE, "CapAmb": OWNER}
    for user in ("agent", "33", "65534"):
        assert set((await capabilities(cell, user)).values()) == {NONE}, user
    became = await capabilities(cell, "root", ["setpriv", "--reuid=33", "--clear-groups"])
    assert became["CapPrm"] == became["CapEff"] == became["CapAmb"] == became["CapBnd"] == NONE
    async with open_cell(tmp_path) as plain:
        assert set((await capabilities(plain, "root")).values()) == {NONE}


async def test_what_an_owner_is_for(cell):
    script = """set -e
    adduser --disabled-password --gecos '' tester >/dev/null
    su tester -c 'id -un; touch ~/mine'
    stat -c %U /home/tester/mine
    mkdir /tmp/t; cd /tmp/t; touch a b; chown 33:42 a; chmod 600 a; cat a
    tar cf ../t.tar a b; mkdir out; tar xpf ../t.tar -C out; stat -c '%u:%g %a' out/a
    userdel -r tester 2>/dev/null; id tester 2>/dev/null || echo gone"""
    result = await sh(cell, script, user="root")
    assert result.text.splitlines() == ["tester", "tester", "33:42 600", "gone"], result.stderr


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="the host has no dpkg to show in a cell")
async def test_an_owner_installs_packages(cell):
    script = r"""set -e
    mkdir -p /tmp/p/DEBIAN /tmp/p/opt/x /tmp/db/info /tmp/db/updates /tmp/db/triggers; cd /tmp; : > db/status; : > db/available
    printf 'Package: x\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n' > p/DEBIAN/control
    printf '#!/bin/sh\nchown 33:33 /opt/x/f\n' > p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst
    echo hi > p/opt/x/f; dpkg-deb -b p x.deb > /dev/null; dpkg --admindir=/tmp/db -i x.deb > /dev/null
    stat -c %u:%g /opt/x/f"""
    result = await sh(cell, script, user="root")
    assert result.text == "33:33", result.stderr


async def test_files_are_handled_with_the_rights_of_the_user_who_was_named(cell):
    await sh(cell, "umask 077; echo secret > /home/agent/own; mkdir /home/agent/dir")
    assert await cell.read_file("/home/agent/own", user="root", limit_bytes=100) == b"secret\n"
    await cell.write_file("/home/agent/dir/new", b"x", user="root")
    with pytest.raises(GuestFileError):
        await cell.read_file("/home/agent/own", user="33", limit_bytes=100)
    await sh(cell, "ln -s /proc/1/environ /home/agent/link; ln -s /proc/1/fd/4 /home/agent/fd", user="root")
    for path in ("/home/agent/link", "/home/agent/fd", "/proc/1/mem"):
        with pytest.raises(GuestFileError):
            await cell.read_file(path, user="root", limit_bytes=100)


async def test_nobody_becomes_the_user_of_pid_1(cell):
    code = CALL + textwrap.dedent(
        """
        setuid, setreuid, setresuid, setfsuid = (105, 113, 117, 122) if X86 else (146, 145, 147, 151)
        setgid, setregid, setresgid, setfsgid = (106, 114, 119, 123) if X86 else (144, 143, 149, 152)
        W, K, HIGH = 65535, -1, 65535 | 1 << 32
        for single, double, triple, fs in ((setuid, setreuid, setresuid, setfsuid), (setgid, setregid, setresgid, setfsgid)):
            tried = [(single, W), (single, HIGH), (double, W, K), (double, K, W), (double, K, HIGH),
                     (triple, W, K, K), (triple, K, W, K), (triple, K, K, W), (triple, W, W, W)]
            print(*[call(*args) for args in tried])
            print(call(fs, W), call(triple, K, K, K))
        print(attempt(os.setgroups, [1, 2]), os.getresuid(), os.getresgid())
        print(open("/proc/self/status").read().split("Uid:")[1].split("\\n")[0].split())
        print(attempt(os.setresuid, 65534, 65534, 65534), attempt(os.setuid, 65535), attempt(os.setuid, 0))
        """
    )
    lines = (await python(cell, code, user="root")).text.splitlines()
    refused = " ".join(["EPERM"] * 9)
    assert lines == [
        refused, "EPERM ok", refused, "EPERM ok", "ok (0, 0, 0) (0, 0, 0)", "['0', '0', '0', '0']", "ok EPERM EPERM",
    ]  # fmt: skip
    with pytest.raises(InvalidInput):
        await run(cell, ["true"], user="65535")
    # Nor by a file that belongs to it: no program changes user in a cell.
    await sh(cell, "cp /usr/bin/id /tmp/id && chown 65535:65535 /tmp/id && chmod 6755 /tmp/id", user="root")
    assert (await sh(cell, "stat -c %u:%a /tmp/id; /tmp/id -u", user="root")).text.split() == ["65535:6755", "0"]


async def test_pid_1_is_out_of_reach_of_an_owner(cell):
    code = CALL + textwrap.dedent(
        """
        ptrace, prlimit, readv, affinity = (101, 302, 310, 203) if X86 else (117, 261, 270, 122)
        scheduler = 144 if X86 else 119
        import struct
        buffer = ctypes.create_string_buffer(64)
        vector = struct.pack("=QQ", ctypes.addressof(buffer), 8)
        print(call(ptrace, 16, 1, 0, 0), call(ptrace, 0x4206, 1, 0, 0), call(readv, 1, vector, 1, vector, 1, 0))
        print(call(prlimit, 1, 7, buffer, None), call(affinity, 1, 64, buffer), call(scheduler, 1, 5, buffer))
        print(call(438, libc.syscall(434, 1, 0), 3, 0), attempt(os.setpriority, os.PRIO_PROCESS, 1, 19))
        print(*[attempt(os.kill, 1, signum) for signum in (9, 19, 15, 17)])
        for path in ("mem", "environ", "maps", "oom_score_adj", "oom_adj", "timerslack_ns", "comm", "coredump_filter", "clear_refs"):
            print(path, attempt(lambda: os.write(os.open(f"/proc/1/{path}", os.O_RDWR), b"5")))
        for path in ("exe", "root", "cwd", "fd/3", "ns/net"):
            print(path, attempt(os.readlink, f"/proc/1/{path}"))
        print(attempt(os.listdir, "/proc/1/fd"), attempt(os.chmod, "/proc/1", 0o777), attempt(os.chown, "/proc/1", 0, 0))
        """
    )
    result = await python(cell, code, user="root")
    lines = result.text.splitlines()
    assert len(lines) == 19, result.stderr
    answers = {word for line in lines[:4] for word in line.split()} | {line.split()[-1] for line in lines[4:]}
    assert answers <= {"EPERM", "EACCES", "ENOENT"}, result.text
    assert (await run(cell, ["true"])).exit.code == 0


async def test_our_processes_are_out_of_reach_before_they_are_a_command(cell):
    """A child of PID 1 has the user already but still is ours; an owner may neither look into it, stop it nor take from it."""
    watcher = CALL + textwrap.dedent(
        """
        ptrace = 101 if X86 else 117
        taken, mine = set(), {1, os.getpid()}
        print("watching", flush=True)
        import time
        end = time.monotonic() + 4
        while time.monotonic() < end:
            for name in os.listdir("/proc"):
                if not name.isdigit() or int(name) in mine:
                    continue
                pid = int(name)
                try:
                    if "vallum" not in open(f"/proc/{pid}/cmdline").read():
                        continue
                except OSError:
                    continue
                # What is tried now may meet the command that it has become; so only what shows the socket or memfd of ours counts.
                try:
                    for fd in os.listdir(f"/proc/{pid}/fd"):
                        target = os.readlink(f"/proc/{pid}/fd/{fd}")
                        if target.startswith("socket:") or "memfd" in target or "cgroup" in target:
                            taken.add(target)
                except OSError:
                    pass
        print("taken", len(taken), flush=True)
        """
    )
    child = await cell.spawn(Command(argv=[b"python3", b"-c", watcher.encode()], user="root"), step=1)
    await read_until(child.stdout, b"watching\n")
    for number in range(40):
        assert (await run(cell, ["true"], user=("root", "agent", "33")[number % 3])).exit.code == 0
    assert b"taken 0\n" in await read_until(child.stdout, b"\n")
    close_pipes(child)


async def test_the_rights_end_at_the_cell(cell):
    code = CALL + textwrap.dedent(
        """
        mknodat, chroot, mount, unshare, prctl = (259, 161, 165, 272, 157) if X86 else (33, 51, 40, 97, 167)
        print(call(mknodat, -100, b"/tmp/sda", 0o60666, 0x800), call(chroot, b"/tmp"), call(mount, b"x", b"/tmp", b"tmpfs", 0, None))
        print(call(unshare, 0x10000000), call(prctl, 24, 0, 0, 0, 0), call(prctl, 28, 0, 0, 0, 0))
        print(call(prctl, 47, 2, 5, 0, 0), call(prctl, 47, 2, 21, 0, 0))
        for path in ("/dev/null", "/dev/urandom", "/proc/sys/kernel/core_pattern", "/proc/version"):
            print(path, attempt(os.chown, path, 33, 33), attempt(os.chmod, path, 0o777))
        for path in ("kernel/core_pattern", "net/ipv4/ip_forward", "net/ipv4/ip_unprivileged_port_start", "vm/overcommit_memory", "user/max_user_namespaces"):
            print(path, attempt(lambda: os.open(f"/proc/sys/{path}", os.O_WRONLY)))
        print("capability", attempt(os.setxattr, "/tmp", "security.capability", b"\\0\\0\\0\\2" + b"\\0" * 16))
        print("trusted", attempt(os.setxattr, "/tmp", "trusted.overlay.opaque", b"y"))
        print("handle", call(304 if X86 else 265, -100, ctypes.create_string_buffer(64), 0))
        """
    )
    result = await python(cell, code, user="root")
    words = [word for line in result.text.splitlines() for word in line.split() if word.isupper() or word == "ok"]
    assert len(result.text.splitlines()) == 15, result.stderr
    assert "ok" not in words, result.text
    assert set(words) <= {"EPERM", "EACCES", "EROFS"}, result.text


async def test_no_more_capabilities_can_be_had(cell):
    code = CALL + textwrap.dedent(
        """
        import struct
        capset = 126 if X86 else 91
        def want(permitted, inheritable):
            head = struct.pack("=Ii", 0x20080522, 0)
            return call(capset, head, struct.pack("=6I", permitted, permitted, inheritable, 0, 0, 0))
        OWNER = 0xdb
        print(want(OWNER | 1 << 5, OWNER), want(OWNER | 1 << 21, OWNER), want(OWNER, OWNER | 1 << 12), want(OWNER, OWNER))
        print(want(OWNER & ~1, OWNER), want(OWNER, OWNER))  # what was given up does not come back
        """
    )
    assert (await python(cell, code, user="root")).text.splitlines() == ["EPERM EPERM EPERM ok", "ok EPERM"]


async def test_the_layers_below_stay_as_they_are(tmp_path):
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "theirs").write_text("of the host")
    os.chown(lower / "theirs", 33, 33)
    (lower / "theirs").chmod(0o600)
    before = (lower / "theirs").stat()
    base = resolve("host", images_dir=tmp_path / "images", rootless=False)
    image = Image(
        ref="t", digest="", environ=base.environ, layers=[*base.layers, Layer(at="/work", lowers=[str(lower)])]
    )
    async with open_cell(tmp_path, image=image, root="owner") as cell:
        script = "cat /work/theirs && chown 1000 /work/theirs && chmod 4777 /work/theirs && echo new > /work/theirs && ls -ln /work/theirs"
        result = await sh(cell, script, user="root")
        assert result.exit.code == 0, result.stderr
        assert "1000" in result.text
    after = (lower / "theirs").stat()
    assert (after.st_uid, after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_uid, before.st_mode, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip
    assert (lower / "theirs").read_text() == "of the host"


async def test_an_ordinary_user_of_an_owner_cell_gains_nothing(cell):
    assert (await sh(cell, "su -c id root < /dev/null")).exit.code != 0
    assert (await sh(cell, "chown 0 /home/agent || setpriv --reuid=0 true || cat /etc/shadow /root/.x")).exit.code != 0


async def test_where_there_is_one_user_root_cannot_own(tmp_path):
    async with open_backend(tmp_path, with_range=False) as backend:
        with pytest.raises(ControlMissing, match="run the node as root, or leave root=plain"):
            await backend.create(make_spec(tmp_path, rootless=True, root="owner"))
