"""The public face as the design fixes it: Node, sandbox, exec, session, step, files, events; async and blocking."""

import asyncio
import time
from pathlib import Path

import pytest

import vallum
import vallum.sync

pytestmark = [pytest.mark.root, pytest.mark.e2e]


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


async def test_the_example_of_the_design(home):
    async with vallum.Node(home=home) as node, node.sandbox(image="host", containment="standard") as sb:
        r = await sb.exec(["python3", "-c", "print(1)"], timeout_s=10)
        assert (r.exit_code, r.stdout, r.stderr, r.step) == (0, b"1\n", b"", 0)
        async with sb.session() as sh:
            out = await sh.run("cd /tmp && ls")
            assert out.exit_code == 0
            assert (await sh.run("pwd")).stdout == b"/tmp\n"
        async with sb.step(tool_call="call_7") as step:
            first = await sb.exec(["sh", "-c", "echo a"])
            second = await sb.exec(["sh", "-c", "echo b"])
            assert first.step == second.step == step
        await sb.write_file("/tmp/a", b"\x00bytes")
        assert await sb.read_file("/tmp/a") == b"\x00bytes"
        events = await node.events(run=sb.run, episode=sb.episode)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "episode.started"
    calls = [e for e in events if e["kind"] == "tool.call" and e["scope"]["tool_call"] == "call_7"]
    assert len(calls) == 2
    assert {e["scope"]["step"] for e in calls} == {step}
    assert all(e.scope.run == sb.run for e in events), "fields can be read as attributes, too"
    assert [e["id"] for e in events] == sorted(e["id"] for e in events)


async def test_await_and_close(node):
    sb = await node.sandbox()
    assert (await sb.exec(["true"])).exit_code == 0
    await sb.close()
    with pytest.raises(vallum.CellGone):
        await sb.exec(["true"])


async def test_exit_codes(node):
    async with node.sandbox() as sb:
        assert (await sb.exec(["sh", "-c", "exit 7"])).exit_code == 7
        assert (await sb.exec(["sh", "-c", "kill -TERM $$"])).exit_code == 143
        missing = await sb.exec(["no-such-program"])
        assert missing.exit_code == 127
        assert b"no-such-program" in missing.stderr
        refused = await sb.exec(["/etc/passwd"])
        assert refused.exit_code == 126


async def test_stdin_environment_directory_and_user(node):
    async with node.sandbox(environ={"ONE": "1"}) as sb:
        big = bytes(range(256)) * 20_000
        assert (await sb.exec(["cat"], stdin=big)).stdout == big
        r = await sb.exec(["sh", "-c", "echo $ONE $TWO; pwd; id -un"], environ={"TWO": "2"}, cwd="/usr")
        assert r.stdout == b"1 2\n/usr\nagent\n"
        assert (await sb.exec(["id", "-u"], user="root")).stdout == b"0\n"
        with pytest.raises(vallum.InvalidInput, match="nobody-of-that-name"):
            await sb.exec(["id"], user="nobody-of-that-name")
        assert b"VALLUM" not in (await sb.exec(["env"])).stdout


async def test_output_keeps_head_and_tail_and_says_so(node):
    async with node.sandbox(limits=vallum.Limits(output_bytes=10_000)) as sb:
        r = await sb.exec(["sh", "-c", "echo FIRST; head -c 3000000 /dev/zero | tr '\\0' x; echo LAST"])
        assert r.truncated
        assert r.stdout.startswith(b"FIRST\n")
        assert r.stdout.endswith(b"LAST\n")
        assert b"bytes left out" in r.stdout
        assert len(r.stdout) < 11_000
        short = await sb.exec(["echo", "short"])
        assert not short.truncated


async def test_a_timeout_ends_the_whole_tree_in_time(node):
    async with node.sandbox() as sb:
        tree = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 777 & sleep 777' &) ; (sleep 777 & ) ; echo started; sleep 777"
        began = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            await sb.exec(["sh", "-c", tree], timeout_s=0.5)
        assert time.monotonic() - began < 1.0
        assert isinstance(caught.value, vallum.StepTimeout)
        assert caught.value.partial.stdout == b"started\n"
        left = await sb.exec(["sh", "-c", "grep -l [s]leep.777 /proc/[0-9]*/cmdline 2>/dev/null | wc -l"])
        assert int(left.stdout) == 0


async def test_a_session_survives_a_timeout_and_a_syntax_error(node):
    async with node.sandbox() as sb, sb.session() as sh:
        await sh.run("word=kept; cd /usr")
        with pytest.raises(vallum.StepTimeout):
            await sh.run("sleep 60", timeout_s=0.3)
        assert (await sh.run("if")).exit_code != 0
        r = await sh.run("echo $word; pwd; echo to-stderr >&2")
        assert (r.stdout, r.stderr) == (b"kept\n/usr\n", b"to-stderr\n")
        with pytest.raises(vallum.VallumError):
            await sh.run("exit 3")
            await sh.run("echo never")


async def test_every_run_of_a_session_is_a_step_and_background_work_stays_charged(node):
    async with node.sandbox() as sb, sb.session() as sh:
        first = await sh.run("(setsid sleep 55.5 >/dev/null 2>&1 &)")
        second = await sh.run("true")
        assert second.step == first.step + 1
        await asyncio.sleep(0.2)
        events = await node.events(run=sb.run)
        sleeper = [e for e in events if e["kind"] == "process.started" and "55.5" in e["process"]["argv"]]
        assert sleeper
        assert sleeper[0]["scope"]["step"] == first.step
        assert sleeper[0]["attribution"]["method"] == "cgroup"
        closed = [e for e in events if e["kind"] == "step.closed" and e["scope"]["step"] == first.step]
        assert closed[0]["left_running"] == 1


async def test_files_cannot_be_led_outside(node, tmp_path):
    secret = tmp_path / "host-secret"
    secret.write_text("of the host")
    secret.chmod(0o644)
    async with node.sandbox() as sb:
        await sb.exec(
            ["sh", "-c", f"ln -s {secret} /tmp/link; ln -s / /tmp/root; mkfifo /tmp/fifo; ln -s /proc/1/root /tmp/r1"]
        )
        for path in ("/tmp/link", f"/tmp/root/{secret}", f"/../../..{secret}", f"/tmp/r1{secret}"):
            with pytest.raises(vallum.GuestFileError) as caught:
                await sb.read_file(path)
            assert caught.value.errno_name in {"ENOENT", "EACCES", "ENOTDIR"}
        with pytest.raises(vallum.GuestFileError):
            await asyncio.wait_for(sb.read_file("/tmp/fifo"), 2)
        with pytest.raises(vallum.GuestFileError):
            await sb.write_file("/tmp/link", b"changed")
        assert secret.read_text() == "of the host"
        with pytest.raises(vallum.GuestFileError) as caught:
            await sb.read_file("/tmp")
        assert caught.value.errno_name == "EISDIR"
        await sb.write_file("/tmp/deep/er/file", "made")
        assert await sb.read_file("/tmp/deep/er/file") == b"made"


async def test_a_mount_is_copy_on_write(node, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/file").write_text("before")
    (tmp_path / "work").chmod(0o755)
    async with node.sandbox(mounts=[f"{tmp_path}/work:/work"], user="root", workdir="/work") as sb:
        r = await sb.exec(["sh", "-c", "cat file; echo after > file; echo new > other; cat file"])
        assert r.stdout == b"beforeafter\n"
    assert (tmp_path / "work/file").read_text() == "before"
    assert not (tmp_path / "work/other").exists()


async def test_two_cells_share_nothing(node):
    async with node.sandbox() as one, node.sandbox() as two:
        assert one.run == two.run
        assert one.episode != two.episode
        await one.exec(["sh", "-c", "echo mine > /tmp/x; python3 -m http.server 8123 >/dev/null 2>&1 &"])
        assert (await two.exec(["cat", "/tmp/x"])).exit_code != 0
        assert (await two.exec(["sh", "-c", "ls /proc | grep -c '^[0-9]'"])).stdout.strip() in {b"3", b"4", b"5"}
        probe = "import socket; s = socket.socket(); s.settimeout(2); print(s.connect_ex(('127.0.0.1', 8123)))"
        await asyncio.sleep(0.5)
        assert (await one.exec(["python3", "-c", probe])).stdout == b"0\n", "its own loopback works"
        assert (await two.exec(["python3", "-c", probe])).stdout != b"0\n"


async def test_when_the_client_goes_its_cells_go(home):
    async with vallum.Node(home=home) as keeper:
        other = vallum.Node(home=home)
        await other.__aenter__()
        sb = await other.sandbox()
        await sb.exec(["sh", "-c", "setsid sleep 4242 >/dev/null 2>&1 &"])
        pid = sb.pid
        assert Path(f"/proc/{pid}").exists()
        await other.close()
        for _ in range(100):
            if (await keeper.status()).cells == 0:
                break
            await asyncio.sleep(0.02)
        assert not Path(f"/proc/{pid}").exists()
        ended = [e for e in await keeper.events(run=sb.run) if e["kind"] == "episode.ended"]
        assert ended[0]["reason"] == "client_gone"
        assert ended[0]["survivors"] == 1


async def test_fifty_cells_at_once(node):
    async def one(number):
        async with node.sandbox() as sb:
            r = await sb.exec(["sh", "-c", f"echo {number}; sleep 0.5"])
            return r.stdout

    found = await asyncio.gather(*(one(n) for n in range(50)))
    assert found == [b"%d\n" % n for n in range(50)]
    assert (await node.status()).cells == 0


def test_the_same_names_blocking(home):
    with vallum.sync.Node(home=home) as node, node.sandbox() as sb:
        assert sb.exec(["echo", "hello"]).stdout == b"hello\n"
        with sb.session() as sh:
            sh.run("cd /tmp")
            assert sh.run("pwd").stdout == b"/tmp\n"
        with sb.step(tool_call="t1") as step:
            assert sb.exec(["true"]).step == step
        sb.write_file("/tmp/f", "x")
        assert sb.read_file("/tmp/f") == b"x"
        assert [e for e in node.events(run=sb.run) if e["kind"] == "file.write"]


async def test_limits_hold(node):
    limits = vallum.Limits(memory_bytes=64 * 2**20, pids=30, cpus=0.25)
    async with node.sandbox(limits=limits) as sb:
        r = await sb.exec(["python3", "-c", "x = bytearray(200 * 2**20); print('got it')"], timeout_s=30)
        assert r.exit_code == 137, "killed inside the cell"
        assert (await sb.exec(["true"])).exit_code == 0, "the cell lives"
        bomb = "i=0; while [ $i -lt 100 ]; do sleep 3 & i=$((i+1)); done; wait"
        r = await sb.exec(["bash", "-c", bomb], timeout_s=60)
        assert b"fork" in r.stderr.lower() or b"resource" in r.stderr.lower()
        r = await sb.exec(
            [
                "python3",
                "-c",
                "import time\nt=time.monotonic()\nwhile time.monotonic()-t<1.5: pass\nprint(time.process_time())",
            ]
        )
        assert float(r.stdout) < 0.9


async def test_many_commands_of_one_cell_at_once_all_end(node):
    """The child that waits for the next step's command may be let go while a command is waiting for it."""
    for _ in range(8):
        async with node.sandbox() as sb:
            commands = (sb.exec(["sh", "-c", f"sleep 0.05; echo {n}"]) for n in range(20))
            results = await asyncio.wait_for(asyncio.gather(*commands), 20)
            assert [r.stdout for r in results] == [f"{n}\n".encode() for n in range(20)]
