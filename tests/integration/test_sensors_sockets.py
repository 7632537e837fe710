"""Who opened a connection: real sockets, real cgroups, and agents that would have another step pay."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vallum.core.scope import Scope
from vallum.sensors.attribution import SocketAttributor
from vallum.sensors.socket_owner import find_owner, find_sockets

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for cgroups")]

SRC = str(Path(__file__).parents[2] / "src")
NETLINK_SOCK_DIAG = 4


def cgroup2_mount() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(mount)
    return None


class Cell:
    """Steps as cgroups v2, and the view of them that the node's cell gives."""

    def __init__(self, base: Path):
        self.base = base
        self.children: list[subprocess.Popen] = []
        base.mkdir()

    def leaf(self, step: int) -> Path:
        path = self.base / f"s{step}"
        path.mkdir(exist_ok=True)
        return path

    def move(self, pid: int, step: int) -> None:
        (self.leaf(step) / "cgroup.procs").write_text(str(pid))

    def start(self, step: int, code: str) -> subprocess.Popen:
        """A Python program of ``step`` from its first instruction: lines in, lines out."""
        leaf = self.leaf(step) / "cgroup.procs"
        child = subprocess.Popen(
            ["/bin/sh", "-c", f'echo $$ > {leaf}; exec /usr/bin/python3 -uc "$0"', textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        return child

    def pids(self, step: int | None = None) -> list[int]:
        leaves = [self.leaf(step)] if step is not None else sorted(self.base.glob("s*"))
        return [int(pid) for leaf in leaves for pid in (leaf / "cgroup.procs").read_text().split()]

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            return None, "cgroup", 1.0
        path = next((line[3:] for line in lines if line.startswith("0::")), "")
        head, _, last = path.rpartition("/s")
        return (int(last), "cgroup", 1.0) if head.endswith(self.base.name) and last.isdigit() else (None, "cgroup", 1.0)

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        for leaf in self.base.glob("s*"):
            if leaf.stat().st_ino == cgroup_id:
                return int(leaf.name[1:])
        return None

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        deadline = time.monotonic() + 5
        for leaf in self.base.glob("s*"):
            with contextlib.suppress(OSError):
                (leaf / "cgroup.kill").write_text("1")
            while True:
                try:
                    leaf.rmdir()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        self.base.rmdir()


@pytest.fixture
def cell():
    mount = cgroup2_mount()
    if mount is None:
        pytest.skip("no cgroup v2 hierarchy here")
    made = Cell(mount / f"vallum-test-{os.getpid()}")
    yield made
    made.close()


@pytest.fixture
def diag():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as made:
        yield made


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(5)
        yield made


@pytest.fixture
def attributor(cell, diag):
    made = SocketAttributor()
    made.watch(
        "c", cell, root_pid=os.getpid(), diag=diag, scope_of_step=lambda step: Scope(run="r", episode="c", step=step)
    )
    return made


def say(child: subprocess.Popen, line: object = "") -> str:
    child.stdin.write(f"{line}\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def accept_and_charge(attributor, server):
    connection, peer = server.accept()
    with connection:
        return attributor.attribute("c", protocol="tcp", src=peer[:2], dst=server.getsockname()[:2])


CONNECT = """
    import socket, sys
    s = socket.socket()
    print("made"); port = int(input())
    s.connect(("127.0.0.1", port)); print("connected"); input()
"""


def test_ordinary_command_is_charged_and_named(cell, server, attributor):
    child = cell.start(3, CONNECT)
    child.stdout.readline()
    say(child, server.getsockname()[1])
    scope, attribution, process, socket_step = accept_and_charge(attributor, server)
    assert (scope.step, attribution.method, attribution.confidence, socket_step) == (3, "cgroup", 1.0, None)
    assert process.pid == child.pid and process.exe.startswith("/usr/bin/python3") and process.argv[1] == "-uc"


def test_attack_socket_made_in_one_step_and_connected_in_another(cell, server, attributor):
    shell = cell.start(1, CONNECT)
    shell.stdout.readline()
    cell.move(shell.pid, 5)  # what the node does with a persistent shell
    say(shell, server.getsockname()[1])
    scope, attribution, process, socket_step = accept_and_charge(attributor, server)
    assert (scope.step, attribution.method, attribution.confidence, socket_step) == (5, "cgroup", 1.0, 1)
    assert process.pid == shell.pid


RECEIVE = """
    import socket, sys
    u = socket.socket(socket.AF_UNIX); u.bind(sys.argv[1] if len(sys.argv) > 1 else "{path}"); u.listen(); print("ready")
    c, _ = u.accept()
    _, fds, _, _ = socket.recv_fds(c, 1, 1)
    s = socket.socket(fileno=fds[0])
    print("received"); port = int(input())
    if port: s.connect(("127.0.0.1", port))
    print("connected"); input()
"""
SEND = """
    import socket
    s = socket.socket(); u = socket.socket(socket.AF_UNIX); u.connect("{path}")
    socket.send_fds(u, [b"x"], [s.fileno()])
    print("sent"); port = int(input())
    if port: s.connect(("127.0.0.1", port)); print("connected")
    else: s.close(); print("closed")
    input()
"""


def test_attack_socket_handed_to_a_daemon(cell, server, attributor, tmp_path):
    path = tmp_path / "u"
    daemon = cell.start(1, RECEIVE.format(path=path))
    daemon.stdout.readline()
    giver = cell.start(5, SEND.format(path=path))
    giver.stdout.readline()
    daemon.stdout.readline()
    say(giver, 0)
    say(daemon, server.getsockname()[1])
    scope, attribution, process, socket_step = accept_and_charge(attributor, server)
    assert (scope.step, attribution.confidence, socket_step) == (1, 1.0, 5)
    assert process.pid == daemon.pid


def test_attack_copy_left_in_a_daemon_to_make_it_look_guilty(cell, server, attributor, tmp_path):
    path = tmp_path / "u"
    daemon = cell.start(1, RECEIVE.format(path=path))
    daemon.stdout.readline()
    giver = cell.start(5, SEND.format(path=path))
    giver.stdout.readline()
    daemon.stdout.readline()
    say(giver, server.getsockname()[1])
    scope, attribution, process, socket_step = accept_and_charge(attributor, server)
    assert (scope.step, attribution.method, attribution.confidence, socket_step) == (5, "socket", 0.5, None)
    assert process.pid == giver.pid


def test_attack_innocent_child_that_inherited_a_copy(cell, server, attributor):
    shell = cell.start(
        1,
        """
        import os, socket
        s = socket.socket(); s.set_inheritable(True)
        print("made"); input()
        pid = os.posix_spawn("/bin/sleep", ["sleep", "30"], {})
        print(pid); port = int(input())
        s.connect(("127.0.0.1", port)); print("connected"); input(); os.kill(pid, 9)
        """,
    )
    shell.stdout.readline()
    cell.move(shell.pid, 3)
    say(shell)  # step 3 only starts a sleep
    cell.move(shell.pid, 5)
    say(shell, server.getsockname()[1])
    scope, attribution, process, _ = accept_and_charge(attributor, server)
    say(shell)
    assert scope.step == 1, "step 3 did nothing, so it does not pay"
    assert attribution.method == "socket" and attribution.confidence < 1
    assert process.pid == shell.pid


def test_attack_socket_hidden_in_a_thread_with_descriptors_of_its_own(cell, server, attributor):
    child = cell.start(
        2,
        """
        import ctypes, socket, threading
        def run():
            ctypes.CDLL(None).unshare(0x400)  # CLONE_FILES
            s = socket.socket(); s.connect(("127.0.0.1", port)); print("connected"); threading.Event().wait()
        print("ready"); port = int(input())
        threading.Thread(target=run, daemon=True).start(); input()
        """,
    )
    child.stdout.readline()
    say(child, server.getsockname()[1])
    scope, attribution, process, _ = accept_and_charge(attributor, server)
    assert (scope.step, attribution.method, attribution.confidence) == (2, "cgroup", 1.0)
    assert process.pid == child.pid


def test_socket_that_nobody_holds_any_more_falls_to_its_maker(cell, server, attributor):
    child = cell.start(
        4,
        """
        import socket
        print("ready"); port = int(input())
        s = socket.create_connection(("127.0.0.1", port)); s.send(b"x"); s.close(); print("closed"); input()
        """,
    )
    child.stdout.readline()
    connection, peer = None, None
    say(child, server.getsockname()[1])
    connection, peer = server.accept()
    with connection:
        scope, attribution, process, _ = attributor.attribute(
            "c", protocol="tcp", src=peer[:2], dst=server.getsockname()[:2]
        )
    assert (scope.step, attribution.method, attribution.confidence, process) == (4, "socket", 0.8, None)


def test_socket_of_nobody_is_the_cells(attributor):
    scope, attribution, process, socket_step = attributor.attribute(
        "c", protocol="tcp", src=("127.0.0.1", 9), dst=("10.9.8.7", 9)
    )
    assert (scope.step, attribution.method, process, socket_step) == (None, "netns", None, None)
    assert attribution.confidence < 1
    with pytest.raises(KeyError):
        attributor.attribute("other", protocol="tcp", src=("127.0.0.1", 9), dst=("10.9.8.7", 9))


def test_without_a_diag_socket_or_with_a_dead_one_the_cell_pays(cell, attributor):
    other, unrelated = socket.socketpair()
    unrelated.close()
    for broken in (None, other):
        attributor.watch(
            "b", cell, root_pid=1, diag=broken, scope_of_step=lambda s: Scope(run="r", episode="b", step=s)
        )
        scope, attribution, _, _ = attributor.attribute("b", protocol="tcp", src=("127.0.0.1", 9), dst=("::1", 9))
        assert (scope.step, attribution.method) == (None, "netns")
        if broken is not None:
            broken.close()


def test_ipv6_and_mapped_addresses(diag):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        for host, family in (
            ("::1", socket.AF_INET6),
            ("::ffff:127.0.0.1", socket.AF_INET6),
            ("127.0.0.1", socket.AF_INET),
        ):
            with socket.socket(family) as client:
                client.connect((host, port))
                owner = find_owner(diag, "tcp", client.getsockname()[:2], (host, port), [os.getpid()])
                assert owner is not None and owner.inode == os.fstat(client.fileno()).st_ino
                assert owner.holders == [os.getpid()]


def test_a_listener_on_the_port_is_not_the_client(diag, server):
    port = server.getsockname()[1]
    assert find_sockets(diag, "tcp", ("127.0.0.1", port), ("1.2.3.4", 5)) == []


@pytest.mark.parametrize("is_connected", [False, True])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_udp_by_its_port(diag, family, is_connected):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        if is_connected:
            client.connect((host, 9))
        else:
            client.sendto(b"x", (host, 9))
        owner = find_owner(diag, "udp", (host, client.getsockname()[1]), (host, 9), [os.getpid()])
        assert owner is not None and owner.inode == os.fstat(client.fileno()).st_ino
        assert not owner.ambiguous


def test_attack_udp_port_shared_with_another_step_is_doubt_not_blame(cell, diag, attributor):
    code = """
        import socket
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = int(input()); s.bind(("127.0.0.1", port)); print(s.getsockname()[1]); input()
    """
    first = cell.start(1, code)
    port = int(say(first, 0))
    second = cell.start(5, code)
    say(second, port)
    _, attribution, _, _ = attributor.attribute("c", protocol="udp", src=("127.0.0.1", port), dst=("127.0.0.1", 53))
    assert attribution.confidence <= 0.5


def test_many_descriptors_do_not_hold_the_gateway(cell, server, attributor):
    child = cell.start(
        2,
        """
        import os, resource, socket
        resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
        fds = [os.dup(0) for _ in range(19000)]
        print("ready"); port = int(input())
        s = socket.create_connection(("127.0.0.1", port)); print("connected"); input()
        """,
    )
    child.stdout.readline()
    say(child, server.getsockname()[1])
    begun = time.monotonic()
    scope, attribution, _, _ = accept_and_charge(attributor, server)
    assert time.monotonic() - begun < 1
    assert scope.step == 2 and attribution.confidence <= 1


# -- the shape of a cell's network -------------------------------------------------------------------

ANYIP = """
import asyncio, ipaddress, os, socket, struct, subprocess, sys
sys.path.insert(0, SRC)
from vallum.core.scope import Attribution, Scope
from vallum.sensors.nflog import NflogReader
from vallum.sensors.socket_owner import find_owner

def sh(*argv):
    subprocess.run(argv, check=True)

sh("ip", "link", "set", "lo", "up")
sh("ip", "route", "add", "local", "default", "dev", "lo")
sh("ip", "-6", "route", "add", "local", "default", "dev", "lo")
sh("nft", '''
table inet t {
  chain nat { type nat hook output priority -100; ip daddr != 127.0.0.0/8 meta l4proto tcp redirect to :3128; ip6 daddr != ::1 meta l4proto tcp redirect to :3128; }
  chain out { type filter hook output priority 0; oif lo ip daddr 127.0.0.0/8 accept; meta l4proto tcp accept; udp dport 53 accept;
              meta l4proto { udp, icmp, icmpv6 } log group 1 snaplen 128 drop; }
}''')

listeners = [socket.create_server((h, 3128), family=f) for h, f in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))]
diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)

for host, family, listener in (("203.0.113.10", socket.AF_INET, listeners[0]), ("2001:db8::5", socket.AF_INET6, listeners[1])):
    with socket.socket(family) as client:
        client.connect((host, 3333))
        _, peer = listener.accept()
        owner = find_owner(diag, "tcp", peer[:2], (host, 3333), [os.getpid()])
        assert owner.inode == os.fstat(client.fileno()).st_ino, owner
        assert owner.holders == [os.getpid()]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
    dns.bind(("0.0.0.0", 53))
    client.sendto(b"q", ("8.8.8.8", 53))
    _, peer = dns.recvfrom(10)
    owner = find_owner(diag, "udp", peer, ("8.8.8.8", 53), [os.getpid()])
    assert owner.inode == os.fstat(client.fileno()).st_ino, owner

# A scanner closes at once. With the kernel's default the stamp is mostly gone before it can be asked for.
with open("/proc/sys/net/ipv4/tcp_fin_timeout", "w") as setting:
    setting.write("61")
for n in range(50):
    client = socket.create_connection(("203.0.113.11", 22))
    name = client.getsockname()
    client.close()
    accepted, peer = listeners[0].accept()
    owner = find_owner(diag, "tcp", peer, ("203.0.113.11", 22), [os.getpid()])
    assert peer == name and owner is not None and owner.holders == [] and owner.cgroup_id is not None, (n, owner)
    accepted.close()

log = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
log.bind((0, 0))
def configure(group, kind, value):
    attribute = struct.pack("=HH", 4 + len(value), kind) + value + b"\\0" * (-len(value) % 4)
    body = struct.pack(">BBH", 2, 0, group) + attribute
    log.send(struct.pack("=IHHII", 16 + len(body), 4 << 8 | 1, 5, 1, 0) + body)
    assert struct.unpack_from("=i", log.recv(4096), 16)[0] == 0
configure(1, 1, struct.pack("B", 1))              # bind to the group
configure(1, 2, struct.pack(">IBB", 128, 2, 0))   # copy packets
configure(1, 4, struct.pack(">I", 5))             # deliver within 50 ms (the kernel waits a second by itself)

class Node:
    events = []
    def emit(self, event):
        self.events.append(event)
        return len(self.events)
    def attribute(self, cell, *, protocol, src, dst):
        owner = find_owner(diag, protocol, src, dst, [os.getpid()])
        if owner is None:
            return Scope(run="r", episode="c"), Attribution(method="netns", confidence=0.5), None, None
        assert owner.holders == [os.getpid()]
        return Scope(run="r", episode="c", step=3), Attribution(method="cgroup"), None, None

async def main():
    node = Node()
    reader = NflogReader(node, "c", log, Scope(run="r", episode="c"), node)
    reader.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for size in (10, 20, 30):
            try: client.sendto(b"x" * size, ("198.51.100.1", 9999))
            except PermissionError: pass
        await asyncio.sleep(0.2)
        told = [e for e in node.events if e.__class__.__name__ == "PacketDropped"]
        assert len(told) == 1, told
        assert (told[0].protocol, told[0].dst_ip, told[0].dst_port, told[0].bytes) == ("udp", "198.51.100.1", 9999, 38)
        assert told[0].scope.step == 3 and told[0].uid == 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
        try: ping.sendto(b"\\x08\\0" + b"\\0" * 6, ("198.51.100.2", 0))
        except PermissionError: pass
    await asyncio.sleep(1.2)
    told = [e for e in node.events if e.__class__.__name__ == "PacketDropped"]
    assert [(e.protocol, e.dst_ip, e.bytes) for e in told] == [
        ("udp", "198.51.100.1", 38), ("icmp", "198.51.100.2", 28), ("udp", "198.51.100.1", 48 + 58)], told
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for n in range(4000):
            try: client.sendto(b"", ("198.51.100.1", 10000 + n))
            except PermissionError: pass
    await asyncio.sleep(1.5)
    reader.stop()
    assert reader.malformed == 0
    last = node.events[-1]
    assert last.__class__.__name__ == "SensorStatus" and last.state == "degraded" and last.dropped > 0, last
    assert len([e for e in node.events if e.__class__.__name__ == "PacketDropped"]) < 1100
    print("done")

asyncio.run(main())
"""


def test_in_a_namespace_where_every_address_is_local():
    code = f"SRC = {SRC!r}\n{ANYIP}"
    done = subprocess.run(["unshare", "--net", sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "done", done.stderr
