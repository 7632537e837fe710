"""Commands: output, exit, input, environment, users, sizes, pipes, terminals."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from vallum.core.errors import CommandNotExecutable, CommandNotFound, InvalidInput
from vallum.sandbox.base import Command
from vallum.testing.sandbox_conformance.driving import (
    MakeCell,
    close_pipes,
    python,
    read_all,
    read_until,
    run,
    sh,
    start,
    write_all,
)


async def test_output_and_exit_code(make_cell: MakeCell) -> None:
    """Both streams arrive apart and whole, with the code."""
    cell = await make_cell()
    result = await sh(cell, "echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit.code, result.exit.signal) == (b"out\n", b"err\n", 7, None)


async def test_death_by_signal(make_cell: MakeCell) -> None:
    """A signal is told as one, not as a code."""
    cell = await make_cell()
    result = await sh(cell, "kill -TERM $$")
    assert (result.exit.code, result.exit.signal, result.exit.status) == (None, signal.SIGTERM, 143)


async def test_a_missing_command(make_cell: MakeCell) -> None:
    """By name and by path; execve itself says so."""
    cell = await make_cell()
    for name in ("no-such-command-5e1f", "/no/such/command", ""):
        with pytest.raises(CommandNotFound):
            await run(cell, [name])
    assert (await run(cell, ["true"])).exit.code == 0


async def test_a_command_that_may_not_be_executed(make_cell: MakeCell) -> None:
    """A file without the mode, and a directory."""
    cell = await make_cell()
    await cell.write_file("/tmp/plain", b"#!/bin/sh\necho no\n", mode=0o644)
    for name in ("/tmp/plain", "/etc"):
        with pytest.raises(CommandNotExecutable):
            await run(cell, [name])
    await cell.write_file("/tmp/script", b"#!/bin/sh\necho yes\n", mode=0o755)
    assert (await run(cell, ["/tmp/script"])).stdout == b"yes\n"


async def test_standard_input(make_cell: MakeCell) -> None:
    """Binary, larger than any pipe, and empty."""
    cell = await make_cell()
    data = os.urandom(3 << 20)
    assert (await run(cell, ["cat"], stdin=data)).stdout == data
    assert (await run(cell, ["cat"])).stdout == b""


async def test_big_output(make_cell: MakeCell) -> None:
    """20 MiB on each stream at once."""
    cell = await make_cell()
    result = await sh(cell, "head -c 20971520 /dev/zero & head -c 20971520 /dev/zero >&2; wait", timeout_s=60)
    assert len(result.stdout) == len(result.stderr) == 20 << 20


async def test_big_arguments(make_cell: MakeCell) -> None:
    """1 MiB of them, in many and with every byte that may be in one."""
    cell = await make_cell()
    arguments = [b"x" * 100_000] * 10 + [bytes(range(1, 256)), b"", b"last"]
    code = "import sys,os; print(len(sys.argv), sum(len(os.fsencode(a)) for a in sys.argv[1:]), sys.argv[-1])"
    result = await run(cell, ["python3", "-c", code, *arguments])
    assert result.text == f"14 {1_000_000 + 255 + 4} last"


async def test_environment_is_clean_and_can_be_set(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours is inherited; what is given is added."""
    monkeypatch.setenv("VALLUM_CANARY", "CANARY")
    cell = await make_cell()
    result = await run(cell, ["/usr/bin/env"], environ={"EXTRA": "a=b c", "LANG": "C"})
    environ = dict(line.split("=", 1) for line in result.text.splitlines())
    assert environ["EXTRA"] == "a=b c"
    assert environ["LANG"] == "C"
    assert set(environ) <= {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "EXTRA"}


async def test_working_directory(make_cell: MakeCell) -> None:
    """The image's by default, absolute, relative to it; one that is missing is refused."""
    cell = await make_cell()
    assert (await run(cell, ["/bin/pwd"])).text == "/home/agent"
    assert (await run(cell, ["/bin/pwd"], cwd="/usr/bin")).text == "/usr/bin"
    assert (await sh(cell, "mkdir -p /home/agent/sub")).exit.code == 0
    assert (await run(cell, ["/bin/pwd"], cwd="sub")).text == "/home/agent/sub"
    with pytest.raises(InvalidInput):
        await run(cell, ["/bin/pwd"], cwd="/no/such/place")


async def test_users(make_cell: MakeCell) -> None:
    """The agent by default; others by name and number where the cell has them; unknown ones are refused."""
    cell = await make_cell()
    assert (await run(cell, ["id", "-u"])).text == "1000"
    assert (await run(cell, ["id", "-un"])).text == "agent"
    with pytest.raises(InvalidInput):
        await run(cell, ["id"], user="nobody-by-that-name")
    if cell.rootless:
        return
    assert (await run(cell, ["id", "-u"], user="root")).text == "0"
    assert (await run(cell, ["id", "-g"], user="33:44")).text == "44"
    assert (await run(cell, ["id", "-G"], user="1000")).text == "1000"


async def test_numbers_that_are_no_users(make_cell: MakeCell) -> None:
    """Out of range, PID 1's own, and what no parser should take."""
    cell = await make_cell()
    for user in ("65535", "65536", "4294967295", "-1", "0x0", "1000:", ":0", "1e3", "agent\n", "99999999999999999999"):
        with pytest.raises(InvalidInput):
            await run(cell, ["id"], user=user)


async def test_extra_pipes(make_cell: MakeCell) -> None:
    """Descriptor 3 is read by the guest, 4 is written by it."""
    cell = await make_cell()
    await cell.open_step(0)
    child = await cell.spawn(
        Command(argv=[b"/bin/sh", b"-c", b"read line <&3; echo got $line >&4; exec 4>&-; cat"], extra_pipes=2), step=0
    )
    assert child.stdin is not None
    assert len(child.extra) == 2
    await write_all(child.extra[0], b"hello\n")
    assert await read_all(child.extra[1]) == b"got hello\n"
    await write_all(child.stdin, b"")
    assert (await cell.wait(child)).code == 0
    child.extra.clear()
    for fd in (child.stdout, child.stderr):
        assert fd is not None
        os.close(fd)


async def test_no_descriptor_but_the_first_three(make_cell: MakeCell) -> None:
    """Nothing of the node, of PID 1 or of another command is inherited."""
    cell = await make_cell()
    other = await start(cell, "sleep 30", step=0)
    code = "import os\nfor n in sorted(map(int, os.listdir('/proc/self/fd'))):\n  try: print(n, os.readlink(f'/proc/self/fd/{n}'))\n  except OSError: pass"
    lines = (await python(cell, code)).text.splitlines()
    close_pipes(other)
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    # A kernel that is not the host's calls a pipe of the host by another name.
    assert all("pipe:" in line or "host:" in line for line in lines)


async def test_a_terminal(make_cell: MakeCell) -> None:
    """One of the cell's own, controlling, of the asked size, which can be changed; ^C reaches the foreground."""
    cell = await make_cell()
    await cell.open_step(0)
    script = b"trap 'stty size; exit 9' INT; tty; stty size; stty -echo; echo ready; while :; do sleep 0.05; done"
    child = await cell.spawn(Command(argv=[b"/bin/sh", b"-c", script], pty=True, rows=33, columns=101), step=0)
    assert child.stdin is not None
    assert child.stdout == child.stdin
    seen = await read_until(child.stdin, b"ready")
    assert b"/dev/pts/0" in seen
    assert b"33 101" in seen
    await cell.resize(child, 44, 55)
    await write_all(child.stdin, b"\x03", close=False)
    assert b"44 55" in await read_until(child.stdin, b"44 55")
    assert (await cell.wait(child)).code == 9
    os.close(child.stdin)


async def test_signals_reach_the_process_group(make_cell: MakeCell) -> None:
    """A command is the leader of its own group."""
    cell = await make_cell()
    child = await start(cell, "sleep 30 & sleep 30 & echo up; wait")
    assert child.stdout is not None
    await read_until(child.stdout, b"up")
    await cell.signal(child, signal.SIGKILL)
    async with asyncio.timeout(2):
        assert (await cell.wait(child)).signal == signal.SIGKILL
        assert await read_all(child.stdout) == b"", "its children, who held the pipe, are gone too"
    child.stdout = None
    close_pipes(child)


async def test_many_commands_at_once(make_cell: MakeCell) -> None:
    """Each gets its own output and status."""
    cell = await make_cell()
    results = await asyncio.gather(*(sh(cell, f"sleep 0.05; echo {n}; exit {n}", step=n % 5) for n in range(40)))
    assert [(result.text, result.exit.code) for result in results] == [(str(n), n) for n in range(40)]
