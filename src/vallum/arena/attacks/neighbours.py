"""Two cells against each other."""

from __future__ import annotations

import asyncio
import contextlib

from vallum.arena.attacks.base import GUEST_PYTHON, Ground, Outcome
from vallum.arena.attacks.prelude import PRELUDE
from vallum.client.face import Sandbox
from vallum.core.errors import VallumError

_VICTIM = r"""
libc.shmget.restype = ctypes.c_int
shm = libc.shmget(facts["ipc_key"], 4096, 0o1666)
queue = libc.msgget(facts["ipc_key"], 0o1666)
open("/tmp/neighbour", "w").write("mine"); os.chmod("/tmp/neighbour", 0o666)
open("/dev/shm/neighbour", "w").write("mine"); os.chmod("/dev/shm/neighbour", 0o666)
a = socket.socket(socket.AF_UNIX); a.bind("\0neighbour"); a.listen(8)
b = socket.socket(socket.AF_UNIX); b.bind("/tmp/neighbour.sock"); b.listen(8); os.chmod("/tmp/neighbour.sock", 0o777)
t = socket.create_server(("", 8123))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(("", 8124))
print("ready", shm, queue, flush=True)
end = time.monotonic() + 60
touched = False
while time.monotonic() < end and not os.path.exists("/tmp/stop"):
    ready = select.select([a, b, t, u], [], [], 0.05)[0]
    touched = touched or bool(ready)
    for s in ready:
        s.recv(100) if s is u else s.accept()[0].close()
print("touched" if touched else "untouched", open("/tmp/neighbour").read(), open("/dev/shm/neighbour").read(), flush=True)
"""

_ATTACKER = r"""
attempt("its file in /tmp", lambda: read("/tmp/neighbour"))
attempt("its file in /dev/shm", lambda: read("/dev/shm/neighbour"))
attempt("its shared memory", lambda: libc.shmget(facts["ipc_key"], 4096, 0) if libc.shmget(facts["ipc_key"], 4096, 0) >= 0 else nothing())
attempt("its message queue", lambda: libc.msgget(facts["ipc_key"], 0) if libc.msgget(facts["ipc_key"], 0) >= 0 else nothing())
def reach(kind, address, family=socket.AF_UNIX):
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)
        if family != socket.AF_UNIX:
            s.send(b"x")
            if not s.recv(10):
                nothing("closed by the door")
attempt("its abstract socket", lambda: reach(1, "\0neighbour"))
attempt("its named socket", lambda: reach(1, "/tmp/neighbour.sock"))
for address in ("127.0.0.1", "0.0.0.0", "127.0.0.2", "10.0.0.1", "192.168.0.1", "172.17.0.1"):
    attempt(f"its server by {address}", lambda address=address: reach(1, (address, 8123), socket.AF_INET))
    attempt(f"its UDP server by {address}", lambda address=address: reach(2, (address, 8124), socket.AF_INET))
attempt("its server by ::1", lambda: reach(1, ("::1", 8123), socket.AF_INET6))
for n, pid in enumerate(facts["pids"]):
    attempt(f"a signal to its host pid + {n}", lambda: os.kill(pid, 9) if not os.path.exists(f"/proc/{pid}") else nothing())
    attempt(f"its host pid by pidfd + {n}", lambda: call(434, pid, 0) if not os.path.exists(f"/proc/{pid}") else nothing())
    attempt(f"its memory by host pid + {n}", lambda: call(nr(101, 117), 0x4206, pid, 0, 0) if not os.path.exists(f"/proc/{pid}") else nothing())
seen = [n for n in open("/proc/net/unix").read().split() if "neighbour" in n]
report("its sockets are not listed", not seen, seen)
seen = [l for l in open("/proc/net/tcp").read().splitlines() if ":1FBB " in l]
report("its connections are not listed", not seen, seen)
seen = [l for l in open("/proc/sysvipc/shm").read().splitlines()[1:]]
report("its shared memory is not listed", not seen, seen)
attempt("change a lower layer that both share", lambda: (os.chmod("/usr/bin/env", 0o777), nothing("copied up: only its own is changed")))
def through_cache():
    with open("/usr/bin/env", "rb") as f:
        m = mmap.mmap(f.fileno(), 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        m[0:1] = b"X"
attempt("write a page of the shared cache", through_cache)
def dirty_pipe():
    r, w = os.pipe()
    size = fcntl.fcntl(w, 1032)
    os.write(w, b"x" * size); os.read(r, size)
    with open("/usr/bin/env", "rb") as f:
        os.splice(f.fileno(), w, 1, offset_src=0) if hasattr(os, "splice") else None
    os.write(w, b"YYY")
    return open("/usr/bin/env", "rb").read(4)
report("dirty pipe (CVE-2022-0847)", dirty_pipe() == b"\x7fELF", dirty_pipe())
"""


class Neighbours:
    """One cell offers everything it can to everybody; another looks for it."""

    name = "neighbours"
    what = "files, shared memory, queues, sockets, signals, memory, network, shared lower layers, reused ids, freezing"

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`vallum.arena.attacks.base.Family`."""
        async with ground.cell() as victim, ground.cell() as attacker:
            told = PRELUDE + _VICTIM
            facts = '{"ipc_key": 1447119948}'
            watching = asyncio.create_task(victim.exec([GUEST_PYTHON, "-I", "-c", told, facts], timeout_s=90))
            await asyncio.sleep(0.7)
            outcomes = await ground.run(
                attacker, self.name, _ATTACKER, pids=[victim.pid, victim.pid + 1, victim.pid + 2]
            )
            elf = await victim.exec(["/usr/bin/head", "-c", "4", "/usr/bin/env"])
            outcomes.append(ground.outcome(self.name, "the shared layer is unchanged", held=elf.stdout == b"\x7fELF"))
            kill_all = await self._kill_everybody(attacker)
            await victim.write_file("/tmp/stop", b"")
            ended = await watching
            lines = ended.stdout.decode().splitlines()
            untouched = ended.exit_code == 0 and lines[-1:] == ["untouched mine mine"]
            ready = bool(lines) and lines[0].startswith("ready") and "-1" not in lines[0]
            outcomes += [
                ground.outcome(self.name, "SIGKILL to everybody it can see", held=untouched, detail=kill_all),
                ground.outcome(self.name, "the neighbour was not touched", held=untouched, detail=" ".join(lines[-1:])),
                ground.outcome(
                    self.name, "the neighbour had all it offers", held=ready, detail=" ".join(lines[:1]), twin=True
                ),
            ]
        outcomes.append(await self._inherit(ground))
        return outcomes

    @staticmethod
    async def _kill_everybody(attacker: Sandbox) -> str:
        with contextlib.suppress(VallumError):
            ran = await attacker.exec(["/bin/sh", "-c", "kill -KILL -1; echo survived"], timeout_s=10)
            return f"exit {ran.exit_code}"
        return "its own cell ended"

    async def _inherit(self, ground: Ground) -> Outcome:
        """Whether a cell finds anything of one whose host ids it may have got."""
        look = (
            "find /tmp /dev/shm /home /run /var/tmp -name 'left-*' 2>/dev/null | wc -l; cat /proc/sysvipc/shm | wc -l"
        )
        found = []
        for _ in range(4):
            async with ground.cell() as cell:
                ran = await cell.exec(
                    ["/bin/sh", "-c", f"{look}; touch /tmp/left-1 /dev/shm/left-2 /home/agent/left-3 2>/dev/null"]
                )
                found.append(ran.stdout.split())
        clean = all(seen == [b"0", b"1"] for seen in found)
        return ground.outcome(self.name, "nothing is left for whoever gets its ids next", held=clean, detail=str(found))
