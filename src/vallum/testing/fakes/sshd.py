"""A real OpenSSH server that permits forwarding, behind a relay that counts.

It accepts one throwaway key and runs no command; all it is good for is a tunnel. When a client has
it open a listener (``ssh -R``), the fake connects to that listener from the outside, as whoever
waits at the far end would, and counts what comes back through the tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vallum.core.errors import InvalidInput, NodeError
from vallum.testing.fakes.base import CountedReader, Endpoint, TcpFake

SSHD = "/usr/sbin/sshd"
START_TIMEOUT_S = 10.0
_CONFIG = """\
ListenAddress 127.0.0.1:{port}
HostKey {home}/host_key
AuthorizedKeysFile {home}/client_key.pub
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PubkeyAuthentication yes
UsePAM no
StrictModes no
UseDNS no
PrintMotd no
AllowTcpForwarding yes
GatewayPorts yes
X11Forwarding no
AllowAgentForwarding no
PermitTTY no
ForceCommand /bin/false
LogLevel VERBOSE
"""


class Sshd(TcpFake):
    """Units: ``banners`` (SSH clients), ``forward_listeners`` (opened by ``-R``), ``tunnel_bytes`` (read through them).

    Needs openssh-server. As root it needs an unlocked root account (``*`` will do) and makes
    ``/run/sshd`` where that is missing; as another user it lets in that user only.
    """

    def __init__(self, endpoints: Iterable[Endpoint | tuple[str, int]]) -> None:
        super().__init__(endpoints)
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._inner_port = 0
        self._probed: set[int] = set()
        self.login = pwd.getpwuid(os.geteuid()).pw_name
        """User name to log in with."""
        self.client_key = ""
        """Private key that is let in; made at start, gone at stop."""

    @property
    def log(self) -> str:
        """What sshd said so far."""
        return Path(self._home.name, "log").read_text("utf-8", "replace") if self._home else ""

    async def start(self) -> None:
        """Make keys, start sshd on a loopback port and the relay on the endpoints.

        Raises:
            NodeError: openssh-server is missing or does not start; says what it said.
        """
        self._home = tempfile.TemporaryDirectory(prefix="vallum-sshd-")
        try:
            await self._start_inner(Path(self._home.name))
            await super().start()
        except BaseException:
            await self.stop()
            raise

    async def _start_inner(self, home: Path) -> None:
        for name in ("host_key", "client_key"):
            await _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throwaway", "-f", str(home / name))
        self._inner_port = _find_port()
        self.client_key = _prepare(home, self._inner_port)
        with (home / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                SSHD, "-D", "-e", "-f", str(home / "config"), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        await self._wait_ready()

    async def stop(self) -> None:
        """End the relay, sshd and its connections; delete the keys."""
        await super().stop()
        if self._process is not None and self._process.returncode is None:
            for pid in [*_descendants(self._process.pid), self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            await self._process.wait()
        self._process = None
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Relay to sshd, counting; watch for a listener that the client has opened."""
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._inner_port)
        watch = asyncio.create_task(self._watch_forwards(reader))
        back = asyncio.create_task(_pump(inner_reader, writer))
        try:
            first = await reader.read()
            reader.count.count("banners", int(first.startswith(b"SSH-")))
            data = first
            while data:
                inner_writer.write(data)
                await inner_writer.drain()
                data = await reader.read()
        finally:
            watch.cancel()
            back.cancel()
            await asyncio.gather(watch, back, return_exceptions=True)
            inner_writer.close()
            with contextlib.suppress(ConnectionError):
                await inner_writer.wait_closed()

    async def _watch_forwards(self, reader: CountedReader) -> None:
        while True:
            await asyncio.sleep(0.05)
            assert self._process is not None
            listening = _listening_ports(_descendants(self._process.pid))
            self._probed &= listening  # a later tunnel may have the same port
            for port in listening - self._probed - {self._inner_port}:
                self._probed.add(port)
                reader.count.count("forward_listeners")
                reader.count.count("tunnel_bytes", await _read_through(port))

    async def _wait_ready(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                assert self._process is not None
                if self._process.returncode is not None:
                    raise NodeError(f"sshd did not start: {self.log.strip() or 'it said nothing'}")
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self._inner_port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


async def _read_through(port: int) -> int:
    """Connect to a forwarded port as a stranger outside would; bytes that the far end of the tunnel sent."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"hello from outside\n")
                return len(await reader.read(4096))
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise InvalidInput(f"{argv[0]} failed with {process.returncode}: {said.decode('utf-8', 'replace').strip()}")


def _prepare(home: Path, port: int) -> str:
    """Write the configuration; return the client's private key."""
    if not Path(SSHD).exists():
        raise NodeError(f"{SSHD} is missing: install openssh-server")
    home.chmod(0o711)  # sshd reads the list of keys as the user who logs in
    (home / "config").write_text(_CONFIG.format(port=port, home=home), "ascii")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return (home / "client_key").read_text("ascii")


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _descendants(pid: int) -> list[int]:
    """Pids below ``pid``, deepest last; processes that go away meanwhile are left out."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split():
            found += [int(child), *_descendants(int(child))]
    return found


def _listening_ports(pids: list[int]) -> set[int]:
    """TCP ports that these processes listen on, from /proc."""
    inodes: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    ports: set[int] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(table).read_text("ascii").splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
