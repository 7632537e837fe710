"""Taking the machine, or the node, down with what a guest may do: and what others notice of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from vallum.arena.attacks.base import GUEST_PYTHON, Ground, Outcome, is_refused
from vallum.client.face import Sandbox
from vallum.core.errors import VallumError
from vallum.core.limits import MIB, Limits

PATIENCE_S = 10.0
GROWTH_BYTES = 160 * MIB

_PROGRAMS = {
    "a fork bomb": r"""
import os
made = 0
try:
    while made < 5000:
        if os.fork() == 0:
            import time; time.sleep(30); os._exit(0)
        made += 1
except OSError as error:
    print(made, error)
""",
    "open files": r"""
import os, resource
files = []
try:
    while len(files) < 200000:
        files.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(len(files), error)
""",
    "sockets": r"""
import socket
held = []
for n in range(2000):
    s = socket.socket(); s.setblocking(False)
    try:
        s.connect(("203.0.113.7", 80 + n % 60000))
    except OSError:
        pass
    held.append(s)
print(len(held))
""",
    "descriptors in flight": r"""
import array, os, socket
pairs = []
try:
    for n in range(400):
        a, b = socket.socketpair(); pairs.append((a, b))
        for m in range(50):
            a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))])
except OSError as error:
    print(error)
""",
    "file names": r"""
import os
os.makedirs("/tmp/names", exist_ok=True)
for n in range(2000):
    open(b"/tmp/names/" + bytes([1 + n % 46]) * 200 + b"\xff\x1b[31m\r\n" + str(n).encode(), "w").close()
deep = b"/tmp/deep"
os.makedirs(deep); os.chdir(deep)
for n in range(400):
    os.mkdir(b"d" * 250); os.chdir(b"d" * 250)
""",
    "timers and queues": r"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
made = 0
while made < 100000 and libc.shmget(0, 4096, 0o1600) >= 0:
    made += 1
print(made)
""",
    "signals to itself": r"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
for n in range(200000):
    os.kill(os.getpid(), signal.SIGRTMIN)
""",
}


class Exhaustion:
    """Each attempt in a limited cell, while a neighbour must go on answering."""

    name = "exhaustion"
    what = "memory, fork bomb, files, sockets, descriptors in flight, huge output, argv, environ, names, sessions, cpu"

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`vallum.arena.attacks.base.Family`."""
        limits = Limits(memory_bytes=96 * MIB, pids=64, output_bytes=64 * 1024) if ground.can_limit else None
        outcomes = []
        pid = (await ground.node.status()).pid
        before = _resident(pid)
        async with ground.cell() as neighbour:
            for what, program in _PROGRAMS.items():
                if what == "a fork bomb" and not ground.can_limit:
                    continue
                async with ground.cell(limits=limits) as cell:
                    outcomes.append(await self._alongside(ground, what, cell, program, neighbour))
            if ground.can_limit:
                async with ground.cell(limits=limits) as cell:
                    outcomes += await self._use_memory(ground, cell, neighbour)
            async with ground.cell(limits=limits) as cell:
                outcomes += await self._shout(ground, cell, neighbour)
        grown = _resident(pid) - before
        outcomes.append(
            ground.outcome(
                self.name, "the node stays small", held=grown < GROWTH_BYTES, detail=f"{grown // MIB} MiB more"
            )
        )
        return outcomes

    async def _alongside(self, ground: Ground, what: str, cell: Sandbox, program: str, neighbour: Sandbox) -> Outcome:
        attack = asyncio.create_task(cell.exec([GUEST_PYTHON, "-I", "-c", program], timeout_s=8))
        slowest = 0.0
        while not attack.done():
            slowest = max(slowest, await _ask(neighbour))
            await asyncio.sleep(0.05)
        with contextlib.suppress(VallumError):
            await attack
        slowest = max(slowest, await _ask(neighbour))
        return ground.outcome(
            self.name, what, held=slowest < PATIENCE_S, detail=f"a neighbour waited at most {slowest * 1000:.0f} ms"
        )

    async def _use_memory(self, ground: Ground, cell: Sandbox, neighbour: Sandbox) -> list[Outcome]:
        took = await cell.exec([GUEST_PYTHON, "-I", "-c", "x = bytearray(400 << 20); print(len(x))"], timeout_s=20)
        after = await is_refused(cell.exec(["/bin/true"]))
        # What is in /dev/shm stays when its writer is killed, so that the kernel may go on to kill the cell's PID 1.
        fill = "head -c 300000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x"
        why = await is_refused(cell.exec(["/bin/sh", "-c", fill], timeout_s=20))
        waited = await _ask(neighbour)
        return [
            ground.outcome(
                self.name, "more memory than its own", held=took.exit_code != 0, detail=f"exit {took.exit_code}"
            ),
            ground.outcome(self.name, "the cell goes on after it", held=not after, detail=after, twin=True),
            ground.outcome(
                self.name, "memory by /dev/shm", held=waited < PATIENCE_S, detail=why or f"{waited * 1000:.0f} ms"
            ),
        ]

    async def _shout(self, ground: Ground, cell: Sandbox, neighbour: Sandbox) -> list[Outcome]:
        loud = await cell.exec(
            ["/bin/sh", "-c", "head -c 200000000 /dev/zero; head -c 100000000 /dev/zero >&2"], timeout_s=30
        )
        kept = len(loud.stdout) + len(loud.stderr)
        outcomes = [
            ground.outcome(
                self.name, "300 MB of output", held=loud.truncated and kept < 24 * MIB, detail=f"{kept} bytes kept"
            )
        ]
        for what, argv, environ in (
            ("a long argv", ["/bin/true", *["x" * 1000] * 1000], {}),
            ("one argument of 1 MiB", ["/bin/true", "x" * MIB], {}),
            ("a large environment", ["/bin/true"], {f"V{n}": "x" * 1000 for n in range(1000)}),
        ):
            await is_refused(cell.exec(argv, environ=environ))
            waited = await _ask(neighbour)
            outcomes.append(ground.outcome(self.name, what, held=waited < PATIENCE_S, detail=f"{waited * 1000:.0f} ms"))
        sessions = []
        why = ""
        try:
            for _ in range(40):
                session = cell.session()
                sessions.append(await session.__aenter__())
        except VallumError as error:
            why = str(error)
        waited = await _ask(neighbour)
        outcomes.append(
            ground.outcome(
                self.name, "forty sessions", held=waited < PATIENCE_S, detail=why or f"{len(sessions)} were opened"
            )
        )
        return outcomes


async def _ask(neighbour: Sandbox) -> float:
    """How long a neighbour waits for a command, in seconds."""
    began = time.monotonic()
    why = await is_refused(neighbour.exec(["/bin/true"]))
    return PATIENCE_S if why else time.monotonic() - began


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
