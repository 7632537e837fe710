"""A closed world for the gateway's tests: three network namespaces on one machine, nothing else reachable.

    cell  --(doors)-->  gateway's namespace  --(veth)-->  fakes

The node's side runs in a thread of its own with its own network and mount namespace (so that /etc/hosts and
resolv.conf are the world's); it ends with the thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path

import dns.message
import dns.rrset

from vallum.core.scope import Attribution, Scope
from vallum.gateway.kit import Kit
from vallum.gateway.link import GatewayLink
from vallum.rules.grants import Ruleset

NEWNS, NEWNET = 0x00020000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)
PORT = 39321
TAPS_ARE_SERVERS = Kit(verify_upstream=False)
"""A tap speaks no TLS, so it has no certificate to show."""

FAKES_V4 = ["203.0.113.10", "192.0.2.20", "192.0.2.53", "198.51.100.7", "10.77.0.5", "169.254.169.254"]
FAKES_V6 = ["2001:db8::20", "fd00:ec2::254"]
HOSTS = """
127.0.0.1 localhost local.test
192.0.2.20 mirror.test
192.0.2.20 other.test
203.0.113.10 pool.test
198.51.100.7 ssh.test
2001:db8::20 six.test
10.77.0.5 inside.test
169.254.169.254 meta.test
"""
NFT = f"""
table inet cell {{
  chain out_nat {{
    type nat hook output priority -100;
    ip daddr != 127.0.0.0/8 meta l4proto tcp redirect to :{PORT}
    ip6 daddr != ::1 meta l4proto tcp redirect to :{PORT}
  }}
}}
"""


def check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_namespace(pid: int, make):
    """Run ``make`` in a thread inside the network namespace of ``pid`` and return what it returns."""
    box = []

    def work() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            check(libc.setns(fd, NEWNET))
            os.close(fd)
            box.append(make())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            box.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def listen(family: int, address: tuple, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(address)
    if kind == socket.SOCK_STREAM:
        sock.listen(1024)
    return sock


class Tap:
    """A fake server that counts what really arrives."""

    def __init__(self, world: World, ip: str, port: int, reply: bytes = b"", banner: bytes = b"") -> None:
        self.world, self.ip, self.port = world, ip, port
        self.reply, self.banner = reply, banner
        self.received = bytearray()
        self.connections = 0
        self.server = None
        self.writers = []

    async def __aenter__(self) -> Tap:
        family = socket.AF_INET6 if ":" in self.ip else socket.AF_INET
        sock = self.world.in_fakes(lambda: listen(family, (self.ip, self.port)))
        self.server = await asyncio.start_server(self.handle, sock=sock)
        return self

    async def handle(self, reader, writer) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            if self.banner:
                writer.write(self.banner)
                await writer.drain()
            while data := await reader.read(65536):
                self.received += data
                if self.reply:
                    writer.write(self.reply)
                    await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()
        for writer in self.writers:
            writer.close()
        await asyncio.sleep(0.01)


class World:
    """Make it in the thread that will run the node's side; see :func:`run_in_world`."""

    def __init__(self, tmp: Path) -> None:
        self.holders = []
        self.events = []
        self.queries: list[str] = []
        self.deaths: list[str] = []
        self.records_fail = False
        self.attribution_fails = False
        self.holds = []
        self.given_up = []
        self.decide = None
        check(libc.unshare(NEWNS | NEWNET))
        check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        for name, text in (("hosts", HOSTS), ("resolv.conf", "nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")):
            (tmp / name).write_text(text)
            check(libc.mount(str(tmp / name).encode(), f"/etc/{name}".encode(), None, MS_BIND, None))
        self.fakes, self.cell = self.hold_namespace(), self.hold_namespace()
        self.lines(
            "ip link set lo up",
            "ip link add vn type veth peer name vw",
            f"ip link set vw netns {self.fakes}",
            "ip addr add 100.127.0.1/30 dev vn",
            "ip -6 addr add 2001:db8:ffff::1/64 dev vn nodad",
            "ip link set vn up",
        )
        self.lines(
            "ip link set lo up",
            "ip addr add 100.127.0.2/30 dev vw",
            "ip -6 addr add 2001:db8:ffff::2/64 dev vw nodad",
            *(f"ip addr add {ip}/32 dev vw" for ip in FAKES_V4),
            *(f"ip -6 addr add {ip}/128 dev vw nodad" for ip in FAKES_V6),
            "ip link set vw up",
            pid=self.fakes,
        )
        self.lines("ip route add default via 100.127.0.2", "ip -6 route add default via 2001:db8:ffff::2")
        self.lay_cell(self.cell)
        self.link: GatewayLink | None = None

    def hold_namespace(self) -> int:
        holder = subprocess.Popen(["unshare", "-n", "sleep", "300"])
        self.holders.append(holder)
        own = os.stat(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net").st_ino
        while os.stat(f"/proc/{holder.pid}/ns/net").st_ino == own:
            threading.Event().wait(0.005)
        return holder.pid

    def lay_cell(self, pid: int) -> None:
        """Make a namespace one of a cell: everything is local, and led to the doors."""
        self.lines(
            "ip link set lo up",
            "ip route add local default dev lo",
            "ip -6 route add local default dev lo",
            pid=pid,
        )
        subprocess.run(
            ["nsenter", "-t", str(pid), "-n", "nft", "-f", "-"], input=NFT, text=True, check=True, timeout=10
        )

    def lines(self, *commands: str, pid: int | None = None) -> None:
        """Run ip(8) commands here, or in a holder's namespace."""
        enter = ["nsenter", "-t", str(pid), "-n"] if pid else []
        for command in commands:
            subprocess.run([*enter, *command.split()], check=True, timeout=10)

    def in_fakes(self, make):
        return in_namespace(self.fakes, make)

    def doors(self, pid: int | None = None) -> tuple[list[socket.socket], list[socket.socket]]:
        def make():
            v4, v6 = socket.AF_INET, socket.AF_INET6
            return (
                [listen(v4, ("127.0.0.1", PORT)), listen(v6, ("::1", PORT))],
                [listen(v4, ("0.0.0.0", 53), socket.SOCK_DGRAM), listen(v6, ("::", 53), socket.SOCK_DGRAM)],
            )

        return in_namespace(pid or self.cell, make)

    async def start(self, rules: Ruleset, kit: Kit = TAPS_ARE_SERVERS, cache_fd: int | None = None) -> None:
        """Start DNS fake and gateway, and serve the cell with ``rules``."""
        sock = self.in_fakes(lambda: listen(socket.AF_INET, ("192.0.2.53", 53), socket.SOCK_DGRAM))
        world = self

        class Dns(asyncio.DatagramProtocol):
            def connection_made(self, transport) -> None:
                self.transport = transport

            def datagram_received(self, data, addr) -> None:
                query = dns.message.from_wire(data)
                name = query.question[0].name.to_text(omit_final_dot=True).lower()
                world.queries.append(name)
                response = dns.message.make_response(query)
                answers = {"up.test": "192.0.2.20", "rebind.wild.test": "10.77.0.5", "loop.test": "127.0.0.1"}
                if name in answers and query.question[0].rdtype == 1:
                    response.answer = [dns.rrset.from_text(query.question[0].name, 5, "IN", "A", answers[name])]
                elif name not in answers:
                    response.set_rcode(3)
                self.transport.sendto(response.to_wire(), addr)

        self.dns, _ = await asyncio.get_running_loop().create_datagram_endpoint(Dns, sock=sock)
        self.link = await GatewayLink.start(
            uid=65534, gid=65534, node=self, on_death=self.deaths.append, cache_fd=cache_fd
        )
        tcp, udp = self.doors()
        await self.link.add_cell("c1", run="r1", episode="e1", rules=rules, kit=kit, tcp=tcp, dns=udp)

    async def attribute(self, cell, *, protocol, src, dst):
        if self.attribution_fails:
            raise LookupError("cannot tell")
        return Scope(run="r1", episode="e1", step=3), Attribution(method="cgroup"), None, None

    def emit(self, event) -> int:
        if self.records_fail:
            raise OSError("disk full")
        self.events.append(event)
        return len(self.events)

    async def hold(self, frame):
        """The person: see ``decide``."""
        self.holds.append(frame)
        try:
            return await self.decide(frame)
        except asyncio.CancelledError:
            self.given_up.append(frame)
            raise

    async def stop(self) -> None:
        if self.link is not None:
            await self.link.stop()
            self.dns.close()

    def tap(self, ip: str, port: int, reply: bytes = b"", banner: bytes = b"") -> Tap:
        return Tap(self, ip, port, reply, banner)

    async def connect(self, ip: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A guest's connection (the socket is made inside the cell)."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        sock = in_namespace(self.cell, lambda: socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (ip, port)), 5)
            return await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise

    async def say(self, ip: str, port: int, data: bytes, *, wait_s: float = 3.0) -> bytes:
        """Connect as a guest, send, and return everything until the end (b"RST" when reset)."""
        reader, writer = await self.connect(ip, port)
        got = b""
        try:
            writer.write(data)
            await writer.drain()
            while piece := await asyncio.wait_for(reader.read(65536), wait_s):
                got += piece
        except ConnectionError:
            got += b"RST"
        except TimeoutError:
            pass
        finally:
            writer.transport.abort()
        return got

    async def ask(self, name: str, kind: str = "A", server: str = "9.9.9.9", tcp: bool = False) -> dns.message.Message:
        """A guest's DNS query, to any server."""
        query = dns.message.make_query(name, kind, use_edns=0)
        wire = query.to_wire()
        if tcp:
            reader, writer = await self.connect(server, 53)
            writer.write(len(wire).to_bytes(2, "big") + wire)
            size = int.from_bytes(await asyncio.wait_for(reader.readexactly(2), 3), "big")
            answer = await asyncio.wait_for(reader.readexactly(size), 3)
            writer.close()
            return dns.message.from_wire(answer)
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        sock = in_namespace(self.cell, lambda: socket.socket(family, socket.SOCK_DGRAM))
        with sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            # connect(2): the kernel drops an answer that does not come from the address asked.
            await loop.sock_connect(sock, (server, 53))
            await loop.sock_sendall(sock, wire)
            return dns.message.from_wire(await asyncio.wait_for(loop.sock_recv(sock, 65535), 5))

    async def settled(self, count: int, kind: str = "net.flow") -> list:
        """Events of a kind, once there are ``count``."""
        for _ in range(300):
            found = [e for e in self.events if e.__struct_config__.tag == kind]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"{len(found)} events of {kind}, wanted {count}: {found}")

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()


def run_in_world(
    tmp: Path, rules: Ruleset, scenario, timeout_s: float = 60, kit: Kit = TAPS_ARE_SERVERS, cache_fd: int | None = None
) -> None:
    """Run the coroutine function ``scenario(world)`` on the node's side of a fresh world."""
    box = []

    async def live(world: World) -> None:
        try:
            await world.start(rules, kit, cache_fd)
            await scenario(world)
        finally:
            await world.stop()

    def work() -> None:
        world = None
        try:
            world = World(tmp)
            asyncio.run(asyncio.wait_for(live(world), timeout_s))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            box.append(error)
        finally:
            if world is not None:
                world.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if box:
        raise box[0]
