"""The network of a cell, seen from both sides: what arrives at the doors, what dies, what stays the guest's own."""

import asyncio
import os
import socket
import struct

import pytest

from vallum.testing.ns_cells import open_cell
from vallum.testing.sandbox_conformance.driving import python, sh

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

SO_ORIGINAL_DST, IP_PKTINFO = 80, 8


@pytest.fixture(params=["root", "rootless"])
async def cell(request, tmp_path):
    async with open_cell(tmp_path, with_range=request.param == "root", with_groups=request.param == "root") as cell:
        yield cell


def original(connection):
    if connection.family == socket.AF_INET:
        raw = connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]
    raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]


async def test_where_a_connection_wanted_to_go(cell):
    wanted = {
        ("169.254.169.254", 80), ("10.1.2.3", 22), ("93.184.216.34", 443), ("255.255.255.254", 1), ("126.255.255.255", 53), ("128.0.0.1", 65535),
        ("fd00:ec2::254", 80), ("2001:db8::1", 3333), ("fe80::1", 25), ("::2", 443),
    }  # fmt: skip
    code = f"""
import socket
for host, port in {sorted(wanted)!r}:
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    s.connect((host, port, 0, 1) if host.startswith("fe80") else (host, port)); s.sendall(b"hello"); s.close()
s = socket.socket(socket.AF_INET6); s.connect(("::ffff:8.8.4.4", 443)); s.close()
"""
    result = await python(cell, code)
    assert result.exit.code == 0, result.stderr
    seen, got = set(), []
    for door in cell.doors.tcp:
        while True:
            try:
                connection, _ = door.accept()
            except BlockingIOError:
                break
            seen.add(original(connection))
            got.append(connection.recv(9))
            connection.close()
    assert seen == wanted | {("8.8.4.4", 443)}
    assert sorted(got) == [b""] + [b"hello"] * 10


async def test_a_name_server_at_every_address(cell):
    code = """
import socket
for host in ("1.1.1.1", "10.0.0.53", "127.0.0.53", "2001:4860:4860::8888", "::1"):
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
    s.connect((host, 53)); s.send(host.encode()); print(s.recv(100).decode())
"""
    task = asyncio.get_running_loop().create_task(python(cell, code))
    doors = {door.family: door for door in cell.doors.dns}
    for _ in range(5):
        while True:
            try:
                door, (data, ancillary, _, peer) = next((d, r) for d in doors.values() if (r := receive(d)) is not None)
                break
            except StopIteration:
                await asyncio.sleep(0.01)
        info = [(level, kind, raw) for level, kind, raw in ancillary if kind in (IP_PKTINFO, socket.IPV6_PKTINFO)]
        level, kind, raw = info[0]
        if level == socket.IPPROTO_IP:
            asked = socket.inet_ntop(socket.AF_INET, raw[8:12])
            answer_from = struct.pack("=I4s4s", 0, raw[8:12], b"\0" * 4)
        else:
            asked = socket.inet_ntop(socket.AF_INET6, raw[:16])
            answer_from = raw[:16] + struct.pack("=I", 0)
        assert data.decode() == asked
        door.sendmsg([b"answer to " + data], [(level, kind, answer_from)], 0, peer)
    result = await task
    assert [line.split()[-1] for line in result.text.splitlines()] == [
        "1.1.1.1",
        "10.0.0.53",
        "127.0.0.53",
        "2001:4860:4860::8888",
        "::1",
    ]


def receive(door):
    try:
        return door.recvmsg(4096, 256)
    except BlockingIOError:
        return None


async def test_other_packets_die_at_once_and_are_told(cell):
    code = """
import socket, time
for family, host, port in ((2, "8.8.8.8", 443), (2, "10.0.0.1", 5353), (10, "2001:db8::1", 443), (2, "224.0.0.251", 5353)):
    s = socket.socket(family, socket.SOCK_DGRAM)
    t = time.monotonic()
    try:
        s.sendto(b"x" * 300, (host, port)); print("sent")
    except OSError as e:
        print(e.errno, time.monotonic() - t < 0.5)
"""
    result = await python(cell, code)
    assert result.text.splitlines() == ["1 True"] * 4
    told = []
    deadline = asyncio.get_running_loop().time() + 3
    while asyncio.get_running_loop().time() < deadline and len(told) < 4:
        try:
            told.append(cell.doors.packets.recv(65536))
        except BlockingIOError:
            await asyncio.sleep(0.02)
    assert [b"x" * 40 in packet for packet in told] == [True] * 4
    packets = b"".join(told)
    assert b"x" * 128 not in packets  # only the first bytes are copied
    for address in ("8.8.8.8", "10.0.0.1", "224.0.0.251"):
        assert socket.inet_aton(address) in packets
    assert socket.inet_pton(socket.AF_INET6, "2001:db8::1") in packets


async def test_ordinary_traffic_makes_no_noise(cell):
    await python(cell, "import socket\ns = socket.socket(); s.connect(('1.2.3.4', 80)); s.close()")
    await asyncio.sleep(0.2)
    with pytest.raises(BlockingIOError):
        cell.doors.packets.recv(65536)


async def test_the_guests_own_loopback_is_its_own(cell):
    code = """
import socket, threading
for family, host in ((2, "127.0.0.1"), (2, "127.3.2.1"), (10, "::1")):
    for port in (0, 80, 443):
        s = socket.socket(family); s.bind((host, port)); s.listen()
        c = socket.create_connection(s.getsockname()[:2]); a, _ = s.accept(); c.sendall(b"tcp"); assert a.recv(9) == b"tcp"
        s.close(); c.close(); a.close()
    u = socket.socket(family, socket.SOCK_DGRAM); u.bind((host, 0))
    v = socket.socket(family, socket.SOCK_DGRAM); v.sendto(b"udp", u.getsockname()[:2]); assert u.recv(9) == b"udp"
s = socket.socket(); s.bind(("0.0.0.0", 8080)); s.listen(); socket.create_connection(("127.0.0.1", 8080)).close()
try:
    socket.create_connection(("127.0.0.1", 9)); print("connected")
except ConnectionRefusedError:
    print("ok")
"""
    result = await python(cell, code)
    assert result.text == "ok", result.stderr
    for door in cell.doors.tcp:
        with pytest.raises(BlockingIOError):
            door.accept()


async def test_the_doors_places_cannot_be_taken(cell):
    port = cell.doors.tcp[0].getsockname()[1]
    code = f"""
import socket
taken = 0
for family, host, kind, port in ((2, "127.0.0.1", 1, {port}), (2, "0.0.0.0", 1, {port}), (10, "::1", 1, {port}), (10, "::", 1, {port}),
                                 (2, "127.0.0.1", 2, 53), (2, "1.1.1.1", 2, 53), (2, "0.0.0.0", 2, 53), (10, "::", 2, 53), (10, "::1", 2, 53)):
    for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        s = socket.socket(family, kind)
        if option: s.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            s.bind((host, port))
            if kind == 1: s.listen()
            taken += 1; print(host, port, option)
        except OSError: pass
        s.close()
print(taken)
"""
    assert (await python(cell, code, user=None if cell.rootless else "root")).text == "0"


async def test_rules_and_routes_cannot_be_changed(cell):
    user = None if cell.rootless else "root"
    code = """
import socket, struct
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
s.bind((0, 0))
# RTM_DELROUTE of table local, RTM_NEWLINK lo down
for kind, body in ((25, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 3, 254, 2, 0)), (16, struct.pack("=BxHiII", 0, 0, 1, 0, 1))):
    s.send(struct.pack("=IHHII", 16 + len(body), kind, 5, 1, 0) + body)
    answer = s.recv(4096)
    print(struct.unpack_from("=i", answer, 16)[0])
"""
    assert (await python(cell, code, user=user)).text.split() == ["-1", "-1"]
    assert "00000000000000000000000000000000 00" in (await sh(cell, "cat /proc/net/ipv6_route")).text


async def test_who_owns_a_connection_can_be_asked(cell):
    task = asyncio.get_running_loop().create_task(
        python(cell, "import socket, time\ns = socket.socket(); s.connect(('10.9.8.7', 4242)); time.sleep(1)")
    )
    door = cell.doors.tcp[0]
    await asyncio.sleep(0.5)
    connection, peer = door.accept()
    # sock_diag dump of IPv4 TCP: struct inet_diag_req_v2 after the netlink header
    body = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + b"\0" * 48
    cell.doors.diag.send(struct.pack("=IHHII", 16 + len(body), 20, 0x301, 1, 0) + body)
    await asyncio.sleep(0.05)
    answer = cell.doors.diag.recv(65536)
    assert struct.pack("!H", peer[1]) in answer
    connection.close()
    assert (await task).exit.code == 0


async def test_a_closed_door_refuses(cell):
    cell.doors.close()
    code = "import socket\ntry:\n  socket.create_connection(('8.8.8.8', 443), 5)\nexcept ConnectionRefusedError:\n  print('refused')"
    assert (await python(cell, code)).text == "refused"
