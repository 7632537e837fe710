"""What an agent would try in a cell, each with a twin that works. The kernel decides; nothing here is simulated."""

import os
import platform
import textwrap
from pathlib import Path

import pytest

from vallum.core.errors import InvalidInput, SandboxError
from vallum.sandbox.base import Command, Image, Layer
from vallum.testing.ns_cells import open_cell
from vallum.testing.sandbox_conformance.driving import close_pipes, python, read_until, run, sh, write_all

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

X86 = platform.machine() == "x86_64"
CALL = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "ok"
"""


@pytest.fixture
async def cell(tmp_path):
    async with open_cell(tmp_path) as cell:
        yield cell


# Above 423 the numbers are those of every architecture.
EVERYWHERE = {
    "io_uring_setup": "(425, 4, ctypes.create_string_buffer(256))",
    "open_tree": "(428, -100, b'/', 1)",
    "move_mount": "(429, -100, b'/', -100, b'/tmp', 0)",
    "fsopen": "(430, b'tmpfs', 0)",
    "fsmount": "(432, 0, 0, 0)",
    "mount_setattr": "(442, -100, b'/', 0, ctypes.create_string_buffer(32), 32)",
}
ON_X86 = {
    "bpf": "(321, 0, None, 0)",
    "perf_event_open": "(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "userfaultfd": "(323, 1)",
    "add_key": "(248, b'user', b'x', b'y', 1, -3)",
    "request_key": "(249, b'user', b'x', None, 0)",
    "keyctl": "(250, 0, -3, 1)",
    "setns": "(308, 0, 0)",
    "unshare a user namespace": "(272, 0x10000000)",
    "unshare a time namespace": "(272, 0x80)",
    "unshare with high bits": "(272, 0x1_1000_0000)",
    "clone a user namespace": "(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "clone a network namespace": "(56, 0x40000000 | 17, 0, 0, 0, 0)",
    "mount": "(165, b'none', b'/tmp', b'tmpfs', 0, None)",
    "umount2": "(166, b'/proc', 2)",
    "pivot_root": "(155, b'/', b'/tmp')",
    "chroot": "(161, b'/tmp')",
    "swapon": "(167, b'/tmp', 0)",
    "reboot": "(169, 0xfee1dead, 672274793, 0)",
    "init_module": "(175, None, 0, b'')",
    "kexec_load": "(246, 0, 0, None, 0)",
    "syslog": "(103, 3, None, 0)",
    "acct": "(163, None)",
    "quotactl": "(179, 0, None, 0, None)",
    "open_by_handle_at": "(304, -100, ctypes.create_string_buffer(64), 0)",
    "ioperm": "(173, 0, 1, 1)",
    "iopl": "(172, 3)",
    "modify_ldt": "(154, 0, None, 0)",
    "fanotify_init": "(300, 0, 0)",
    "settimeofday": "(164, None, None)",
    "sethostname": "(170, b'x', 1)",
    "personality READ_IMPLIES_EXEC": "(135, 0x400000)",
    "an AF_ALG socket": "(41, 38, 5, 0)",
    "an AF_VSOCK socket": "(41, 40, 1, 0)",
    "an AF_PACKET socket": "(41, 17, 3, 0)",
    "an AF_XDP socket": "(41, 44, 3, 0)",
    "an AF_KEY socket": "(41, 15, 3, 2)",
    "an nfnetlink socket": "(41, 16, 3, 12)",
    "a sock_diag socket": "(41, 16, 3, 4)",
    "an SCTP socket": "(41, 2, 1, 132)",
    "a raw socket": "(41, 2, 3, 255)",
    "an AF_ALG pair": "(53, 38, 5, 0, ctypes.create_string_buffer(8))",
}
REFUSALS = {"EPERM", "EAFNOSUPPORT", "EPROTONOSUPPORT"}


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_refused_system_calls(cell, user):
    names = {**EVERYWHERE, **(ON_X86 if X86 else {})}
    code = CALL + "\n".join(f"print({name!r}, call{args}, sep='|')" for name, args in names.items())
    result = await python(cell, code, user=user)
    answers = dict(line.split("|") for line in result.text.splitlines())
    assert answers.keys() == names.keys(), result.stderr
    assert {name: answer for name, answer in answers.items() if answer not in REFUSALS} == {}


@pytest.mark.skipif(not X86, reason="numbers of x86_64")
async def test_allowed_twins_of_the_refused(cell):
    names = {
        "clone3 is not there, so libraries fall back": "(435, None, 0)",
        "unshare files": "(272, 0x400)",
        "route netlink": "(41, 16, 3, 0)",
        "tcp": "(41, 2, 1, 6)",
        "udp6": "(41, 10, 2, 17)",
        "personality ask": "(135, 0xffffffff)",
        "memfd_create": "(319, b'x', 0)",
        "landlock version": "(444, None, 0, 1)",
    }
    result = await python(cell, CALL + "\n".join(f"print({n!r}, call{a}, sep='|')" for n, a in names.items()))
    answers = dict(line.split("|") for line in result.text.splitlines())
    assert answers.pop("clone3 is not there, so libraries fall back") == "ENOSYS"
    assert answers.pop("landlock version") in ("ok", "EOPNOTSUPP")
    assert set(answers.values()) == {"ok"}, answers


@pytest.mark.skipif(not X86, reason="x32 and int 0x80 are of x86_64")
async def test_foreign_architectures_kill_the_process(cell):
    x32 = await python(cell, CALL + "call(0x40000000 + 39)")
    assert x32.exit.signal == 31
    native = await python(cell, CALL + "print(call(39))")
    assert native.text == "ok"
    # mov eax, 20 (getpid of i386); int 0x80; ret
    code = """
    import ctypes, mmap
    m = mmap.mmap(-1, 4096, prot=7)
    m.write(bytes.fromhex("b814000000cd80c3"))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
    """
    i386 = await python(cell, textwrap.dedent(code))
    assert i386.exit.signal in (31, 11)


async def test_a_terminal_cannot_be_typed_into(cell):
    code = "import fcntl, os\nfor c in (0x5412, 0x541C, 0x5423, 0x1_0000_5412):\n  try:\n    fcntl.ioctl(0, c, b'x')\n    print('done')\n  except OSError as e:\n    print(e.errno)\nprint(os.get_terminal_size(0).columns, os.ttyname(0))\n"
    child = await cell.spawn(Command(argv=[b"python3", b"-c", code.encode()], pty=True, columns=91), step=0)
    text = await read_until(child.stdout, b"/dev/pts/")
    assert text.split()[:4] == [b"1"] * 4
    assert b"91 /dev/pts/" in text
    close_pipes(child)


async def test_pid_1_is_out_of_reach(cell):
    code = CALL + textwrap.dedent(
        """
        PTRACE, PRLIMIT, PIDFD_OPEN, PIDFD_GETFD = (101, 302, 434, 438) if os.uname().machine == "x86_64" else (117, 261, 434, 438)
        print(call(PTRACE, 16, 1, 0, 0), call(PTRACE, 0x4206, 1, 0, 0))
        print(call(PRLIMIT, 1, 7, ctypes.create_string_buffer(16), None))
        fd = libc.syscall(PIDFD_OPEN, 1, 0)
        print(call(PIDFD_GETFD, fd, 3, 0))
        print(os.readlink("/proc/self/exe").startswith("/usr"))
        child = os.fork()
        if child == 0:
            call(PTRACE, 0, 0, 0, 0); os.kill(os.getpid(), 19); os._exit(0)
        os.waitpid(child, 2); print(call(PTRACE, 7, child, 0, 0))
        """
    )
    for user in ("agent", "root"):
        lines = (await python(cell, code, user=user)).text.splitlines()
        assert lines == ["EPERM EPERM", "EPERM", "EPERM", "True", "ok"], user
    assert (await sh(cell, "ls -l /proc/1/exe /proc/1/fd /proc/1/root /proc/1/cwd", user="root")).exit.code != 0


async def test_the_hosts_paths_are_not_shown(cell):
    text = (await sh(cell, "cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/self/mountinfo; env")).text
    here = str(Path(__file__).resolve().parents[2])
    assert here not in text
    assert "/cells/" not in text
    assert text.startswith("vallum-cell launcher")


async def test_our_own_program_cannot_be_had_or_changed(cell):
    """CVE-2019-5736: a command named /proc/self/exe is our program, run from a memfd that nobody can write."""
    result = await run(cell, ["/proc/self/exe"], user="root")
    assert result.exit.code == 2
    assert b"does nothing by itself" in result.stderr
    loop = "import os, sys\nfor i in range(200):\n  for p in os.listdir('/proc'):\n    if p.isdigit():\n      try:\n        if 'memfd' in os.readlink(f'/proc/{p}/exe'):\n          open(f'/proc/{p}/exe', 'r+b'); print('written')\n      except OSError: pass\n"
    assert (await python(cell, loop, user="root")).text == ""


async def test_reserved_and_impossible_users(cell):
    for user in ("65535", "65535:0", "0:65535", "4294967295", "-1", "65536", "1000:", "nobody-here", "a" * 100):
        with pytest.raises(InvalidInput):
            await run(cell, ["id"], user=user)
    assert (await run(cell, ["id", "-u"], user="33:44")).text == "33"
    assert (await run(cell, ["id", "-g"], user="33:44")).text == "44"


async def test_a_hostile_passwd(cell):
    script = "rm /etc/passwd; mkfifo /etc/passwd"
    await sh(cell, script, user="0")
    assert (await run(cell, ["id", "-u"], user="1000")).text == "1000"
    with pytest.raises(InvalidInput):
        await run(cell, ["id"], user="agent")
    await sh(cell, "rm /etc/passwd; ln -s /dev/zero /etc/passwd", user="0")
    with pytest.raises(InvalidInput):
        await run(cell, ["id"], user="agent")
    evil = "rm /etc/passwd; (yes ::::::: | head -c 3000000; echo; echo evil:x:65535:65535::/:/x; echo ok:x:7:8::/tmp:/x) > /etc/passwd"
    await sh(cell, evil, user="0")
    for user in ("evil", "ok"):  # refused; and beyond the part that is read
        with pytest.raises(InvalidInput):
            await run(cell, ["id"], user=user)
    await sh(cell, "printf 'evil:x:65535:65535::/:/x\\nok:x:7:8::/tmp:/x\\n' > /etc/passwd", user="0")
    with pytest.raises(InvalidInput):
        await run(cell, ["id"], user="evil")
    assert (await sh(cell, "id -u; id -g; echo $HOME $USER", user="ok")).text.split() == ["7", "8", "/tmp", "ok"]


async def test_devices_and_setuid(cell):
    assert (await sh(cell, "mknod /tmp/d b 8 0", user="root")).exit.code != 0
    assert (await sh(cell, "mkfifo /tmp/f && test -p /tmp/f")).exit.code == 0
    assert (await sh(cell, "touch /dev/x || rm /dev/null || mv /dev/pts /tmp/p", user="root")).exit.code != 0
    assert (await sh(cell, "echo a > /dev/shm/a && echo b > /dev/null && head -c 2 /dev/zero | wc -c")).text == "2"
    await sh(cell, "cp /usr/bin/id /tmp/id && chmod 4755 /tmp/id", user="root")
    assert (await run(cell, ["/tmp/id", "-u"])).text == "1000"


async def test_standard_streams_can_be_opened_again(cell):
    """Container engines get this wrong: the pipes belong to the command's user."""
    assert (await sh(cell, "echo out > /dev/stdout; echo err > /dev/stderr; cat < /dev/stdin")).text == "out"


async def test_a_crash_wakes_no_handler_of_the_host(cell):
    assert (await sh(cell, "ulimit -Hc; ulimit -c 0; ulimit -c")).text.split() == ["0", "0"]  # 1 byte is 0 blocks
    code = "import resource; resource.setrlimit(4, (0, 0)); print(resource.getrlimit(4)[0]); resource.setrlimit(7, (99, 99)); print(resource.getrlimit(7)[0])"
    assert (await python(cell, code)).text.split() == ["1", "99"]


async def test_a_command_cannot_be_seen_before_it_starts(cell):
    """Between fork and execve the child has the user already; it must show nothing of ours."""
    watcher = "import os\nseen = set()\nfor i in range(400):\n  for p in os.listdir('/proc'):\n    if p.isdigit() and p != '1':\n      try:\n        for fd in os.listdir(f'/proc/{p}/fd'):\n          t = os.readlink(f'/proc/{p}/fd/{fd}')\n          if t.startswith('socket:') or 'memfd' in t or 'cgroup' in t: seen.add(t)\n      except OSError: pass\nprint(len(seen))"
    child = await cell.spawn(Command(argv=[b"python3", b"-c", watcher.encode()]), step=1)
    for _ in range(60):
        assert (await run(cell, ["true"])).exit.code == 0
    assert await read_until(child.stdout, b"\n") == b"0\n"
    await write_all(child.stdin, b"")


async def test_images_cannot_lead_mounts_elsewhere(tmp_path):
    """/proc, /dev, or the place of a layer being a symlink in the image."""

    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("proc", "dev", "usr", "tmp"):
        root = tmp_path / f"root-{name}"
        root.mkdir()
        (root / name).symlink_to("/etc" if name != "tmp" else str(victim))
        layers = [Layer(at="/", lowers=[str(root)]), Layer(at="/usr", lowers=["/usr"])]
        image = Image(ref="bad", digest="", layers=layers, environ={}, user="0", workdir="/")
        with pytest.raises(SandboxError, match="not a link"):
            async with open_cell(tmp_path, image=image):
                pass
    assert list(victim.iterdir()) == []
