"""Bytes of the kernel, whole, cut and hostile."""

import ipaddress
import socket
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.sensors import netlink, nflog, proc_events, procfs, socket_owner
from vallum.sensors.netlink import MalformedNetlinkError
from vallum.sensors.proc_events import Exec, Exit, Fork

FUZZ = settings(max_examples=400, deadline=None)


def proc_message(what: int, *words: int) -> bytes:
    event = struct.pack("=IIQ", what, 0, 0) + struct.pack(f"={len(words)}I", *words).ljust(24, b"\0")
    return netlink.make(3, 0, 0, struct.pack("=IIIIHH", 1, 1, 0, 0, len(event), 0) + event)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (proc_message(1, 10, 10, 20, 20), [Fork(parent=10, child=20)]),
        (proc_message(1, 11, 10, 20, 20), [Fork(parent=10, child=20)]),  # forked by a thread
        (proc_message(1, 10, 10, 21, 10), []),  # a thread
        (proc_message(2, 20, 20), [Exec(pid=20)]),
        (proc_message(0x80000000, 20, 20, 3 << 8, 17), [Exit(pid=20, code=3, signal=None)]),
        (proc_message(0x80000000, 20, 20, 9, 17), [Exit(pid=20, code=None, signal=9)]),
        (proc_message(0x80000000, 20, 20, 0x8B, 17), [Exit(pid=20, code=None, signal=11)]),  # with a core
        (proc_message(0x80000000, 21, 20, 0, 17), []),
        (proc_message(0, 0), []),
        (proc_message(0x200, 1, 1), []),
        (proc_message(2, 5, 5) + proc_message(2, 6, 6), [Exec(pid=5), Exec(pid=6)]),
        (b"", []),
    ],
)
def test_reads_process_events(data, expected):
    assert proc_events.parse(data) == expected


def nflog_message(packet: bytes, uid: int | None = None, kind: int = 4 << 8) -> bytes:
    attributes = b""
    for number, value in ((10, b"x\0"), (11, None if uid is None else struct.pack(">I", uid)), (9, packet)):
        if value is not None:
            attributes += struct.pack("=HH", 4 + len(value), number) + value + b"\0" * (-len(value) % 4)
    return netlink.make(kind, 0, 0, struct.pack(">BBH", 2, 0, 1) + attributes).ljust(4, b"\0")


def ipv4(protocol: int, payload: bytes, *, fragment: int = 0, words: int = 5) -> bytes:
    header = struct.pack(">BBHHHBBH", 0x40 | words, 0, words * 4 + len(payload), 1, fragment, 64, protocol, 0)
    return header + bytes([10, 0, 0, 1, 8, 8, 4, 4]) + b"\1" * (words * 4 - 20) + payload


def ipv6(first: int, payload: bytes) -> bytes:
    address = ipaddress.IPv6Address("2001:db8::9").packed
    return struct.pack(">IHBB", 6 << 28, len(payload), first, 64) + address + address + payload


UDP = struct.pack(">HHHH", 4000, 9999, 8, 0)


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (ipv4(17, UDP), ("udp", 4000, "8.8.4.4", 9999, 28)),
        (ipv4(17, UDP, words=8), ("udp", 4000, "8.8.4.4", 9999, 40)),
        (ipv4(17, UDP, fragment=5), ("udp", None, "8.8.4.4", None, 28)),
        (ipv4(17, UDP[:2]), ("udp", None, "8.8.4.4", None, 22)),
        (ipv4(1, b"\x08\0"), ("icmp", None, "8.8.4.4", None, 22)),
        (ipv4(47, b""), ("ip-47", None, "8.8.4.4", None, 20)),
        (ipv6(17, UDP), ("udp", 4000, "2001:db8::9", 9999, 48)),
        (
            ipv6(0, bytes([60, 0]) + b"\0" * 6 + bytes([17, 0]) + b"\0" * 6 + UDP),
            ("udp", 4000, "2001:db8::9", 9999, 64),
        ),
        (ipv6(44, bytes([17, 0, 0, 8]) + b"\0" * 4 + UDP), ("udp", None, "2001:db8::9", None, 56)),
        (ipv6(58, b"\x80"), ("icmpv6", None, "2001:db8::9", None, 41)),
        (ipv6(0, bytes([0, 0] * 4) * 40), ("ip-0", None, "2001:db8::9", None, 360)),
        (ipv6(0, b""), ("ip-0", None, "2001:db8::9", None, 40)),
    ],
)
def test_reads_dropped_packets(packet, expected):
    [(seen, uid)] = nflog.parse(nflog_message(packet, uid=1000))
    assert (seen.protocol, seen.src_port, seen.dst_ip, seen.dst_port, seen.bytes) == expected
    assert uid == 1000


def test_packet_without_a_socket_has_no_uid_and_other_messages_are_left_out():
    assert nflog.parse(nflog_message(ipv4(1, b"\x08")))[0][1] is None
    assert nflog.parse(nflog_message(ipv4(1, b""), kind=4 << 8 | 1)) == []
    assert nflog.parse(netlink.make(netlink.NLMSG_DONE, 0, 0, b"")) == []


def diag_answer(
    family: int, src: str, sport: int, dst: str, dport: int, inode: int = 7, stamp: int | None = 42
) -> bytes:
    def raw(text: str) -> bytes:
        return ipaddress.ip_address(text).packed.ljust(16, b"\0")

    body = struct.pack("=BBBB", family, 1, 0, 0) + struct.pack(">HH", sport, dport) + raw(src) + raw(dst)
    body += struct.pack("=III", 0, 0, 0) + struct.pack("=IIIII", 0, 0, 0, 1000, inode)
    return body if stamp is None else body + struct.pack("=HHQ", 12, 21, stamp)


def test_reads_a_socket():
    found = socket_owner.parse_socket(diag_answer(socket.AF_INET, "10.0.0.1", 4000, "1.2.3.4", 443))
    assert (str(found.src[0]), found.src[1], str(found.dst[0]), found.dst[1]) == ("10.0.0.1", 4000, "1.2.3.4", 443)
    assert (found.uid, found.inode, found.cgroup_id) == (1000, 7, 42)
    mapped = socket_owner.parse_socket(
        diag_answer(socket.AF_INET6, "::ffff:10.0.0.1", 1, "::ffff:1.2.3.4", 2, stamp=None)
    )
    assert (str(mapped.src[0]), str(mapped.dst[0]), mapped.cgroup_id) == ("10.0.0.1", "1.2.3.4", None)


@pytest.mark.parametrize(
    ("family", "src", "dst", "fit"),
    [
        (socket.AF_INET, ("10.0.0.1", 4000), ("1.2.3.4", 443), 3),
        (socket.AF_INET, ("0.0.0.0", 4000), ("0.0.0.0", 0), 2),
        (socket.AF_INET6, ("::", 4000), ("::", 0), 2),
        (socket.AF_INET, ("10.0.0.1", 4000), ("9.9.9.9", 53), 1),
        (socket.AF_INET, ("10.0.0.2", 4000), ("0.0.0.0", 0), 0),
        (socket.AF_INET, ("10.0.0.1", 4001), ("1.2.3.4", 443), 0),
    ],
)
def test_ranks_how_a_socket_fits(family, src, dst, fit):
    found = socket_owner.parse_socket(diag_answer(family, *src, *dst))
    want = (socket_owner.plain("10.0.0.1"), 4000), (socket_owner.plain("1.2.3.4"), 443)
    assert socket_owner.rank(found, *want) == fit


def test_ipv4_socket_cannot_have_sent_ipv6():
    found = socket_owner.parse_socket(diag_answer(socket.AF_INET, "0.0.0.0", 4000, "0.0.0.0", 0))
    assert socket_owner.rank(found, (socket_owner.plain("::1"), 4000), (socket_owner.plain("::2"), 53)) == 0


@pytest.mark.parametrize(
    "data", [b"\0" * 15, struct.pack("=IHHII", 15, 3, 0, 0, 0), struct.pack("=IHHII", 100, 3, 0, 0, 0), b"\xff" * 64]
)
def test_lengths_are_not_believed(data):
    with pytest.raises(MalformedNetlinkError):
        list(netlink.split(data))
    for parse in (proc_events.parse, nflog.parse):
        with pytest.raises(MalformedNetlinkError):
            parse(data)


@FUZZ
@given(st.binary(max_size=300), st.integers(0, 200), st.binary(max_size=6))
def test_no_bytes_break_the_parsers(noise, cut, patch):
    whole = [
        proc_message(1, 10, 10, 20, 20),
        nflog_message(ipv6(0, bytes([60, 0]) + b"\0" * 6 + UDP), 5),
        nflog_message(ipv4(17, UDP)),
    ]
    for data in [
        noise,
        *whole,
        *(each[:cut] + patch + each[cut + len(patch) :] for each in whole),
        *(w[:cut] for w in whole),
    ]:
        for parse in (proc_events.parse, nflog.parse):
            with suppress(MalformedNetlinkError):
                parse(data)
    for data in (noise, diag_answer(2, "1.1.1.1", 1, "2.2.2.2", 2)[:cut] + patch):
        with suppress(MalformedNetlinkError):
            socket_owner.parse_socket(data)
    with suppress(MalformedNetlinkError):
        nflog.parse_packet(noise)


@FUZZ
@given(st.binary(max_size=300))
def test_no_bytes_break_procfs(noise):
    procfs.parse_stat(noise)
    procfs.parse_uid(noise)
    procfs.parse_uid_map(noise)
    procfs.parse_argv(noise, complete=True)


def test_stat_of_a_process_with_a_hostile_name():
    line = b"42 (a) R 1 (\n) S 7 " + b" ".join(b"%d" % n for n in range(5, 53))
    stat = procfs.parse_stat(line)
    assert stat is not None and (stat.state, stat.ppid, stat.start_ticks, stat.start_stack) == ("S", 7, 22, 28)
    assert procfs.parse_stat(b"42 (a") is None
    assert procfs.parse_stat(b"1 (a) S x " + b"y " * 50) is None


def test_argv_is_kept_whole_or_says_that_it_is_not():
    assert procfs.parse_argv(b"a\0\0b\xff\0", complete=True) == ["a", "", "b\\xff"]
    assert procfs.parse_argv(b"", complete=True) == []
    many = procfs.parse_argv(b"x\0" * 300, complete=True)
    assert len(many) == 257 and "not kept" in many[-1]
    assert "not kept" in procfs.parse_argv(b"xxx", complete=False)[-1]


def test_uid_of_the_guest():
    uid_map = procfs.parse_uid_map(b"         0     200000      65536\n     70000 1000 1\nrubbish\n")
    assert [procfs.guest_uid(uid_map, uid) for uid in (200000, 201000, 265535, 265536, 1000, 0)] == [
        0,
        1000,
        65535,
        None,
        70000,
        None,
    ]
