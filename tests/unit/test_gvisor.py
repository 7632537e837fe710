"""The pure parts of the gvisor level: reports as bytes, lineage, what runsc is told, which flags it gets."""

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.errors import ControlMissing
from vallum.core.limits import Limits
from vallum.sandbox.gvisor import bundle
from vallum.sandbox.gvisor.backend import KERNEL_THREADS, leave_room
from vallum.sandbox.gvisor.lineage import CONFIDENCE, Lineage
from vallum.sandbox.gvisor.points import Clone, Connect, Exec, Exited, MalformedPoint, parse
from vallum.sandbox.gvisor.runsc import Runsc, find_path, find_runsc, parse_flags, platforms


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def datagram(kind, *fields, lost=0, pid=7, uid=1000):
    common = field(4, pid) + field(7, field(1, uid) + field(2, uid))
    return struct.pack("<HHI", 8, kind, lost) + field(1, common) + b"".join(field(*each) for each in fields)


def test_every_kind_of_report():
    assert parse(datagram(2, (4, 9))).point == Clone(7, 9)
    assert parse(datagram(3, (2, b"/bin/sh"), (3, b"sh"), (3, b"-c"))).point == Exec(7, 1000, "/bin/sh", ["sh", "-c"])
    assert parse(datagram(4, (2, 9))).point == Exited(7, 9)
    four = struct.pack("=H", 2) + struct.pack(">H", 443) + bytes([10, 1, 2, 3]) + bytes(8)
    found = parse(datagram(10, (6, four))).point
    assert isinstance(found, Connect)
    assert (str(found.address), found.port) == ("10.1.2.3", 443)
    six = struct.pack("=H", 10) + struct.pack(">H", 22) + bytes(4) + bytes(15) + b"\1" + bytes(4)
    found = parse(datagram(10, (6, six))).point
    assert isinstance(found, Connect)
    assert (str(found.address), found.port) == ("::1", 22)


def test_what_says_nothing_is_no_point():
    assert parse(datagram(1)).point is None
    assert parse(datagram(500)).point is None
    assert parse(datagram(10, (6, struct.pack("=H", 1) + b"/run/socket"))).point is None
    assert parse(datagram(10, (6, b""))).point is None
    assert parse(datagram(500, lost=17)).lost == 17


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08\x00\x02",
        struct.pack("<HHI", 99, 2, 0),
        struct.pack("<HHI", 0, 2, 0) + b"x",
        struct.pack("<HHI", 8, 2, 0) + b"\xff" * 20,
        struct.pack("<HHI", 8, 2, 0) + field(1, field(4, 0)),
        datagram(2, (4, 0)),
        datagram(2, (4, 1 << 40)),
        datagram(2, (4, b"text")),
        datagram(3, (3, 5)),
        datagram(10, (6, 5)),
        datagram(2, (4, 9))[:-1],
    ],
)
def test_nonsense_is_refused(raw):
    with pytest.raises(MalformedPoint):
        parse(raw)


@given(st.binary(max_size=300), st.sampled_from([2, 3, 4, 10]))
def test_any_bytes_parse_or_are_refused(body, kind):
    with contextlib.suppress(MalformedPoint):
        parse(struct.pack("<HHI", 8, kind, 0) + body)


def test_lineage_follows_double_forks_and_moves():
    tree = Lineage()
    tree.clone(1, 10)
    tree.begin(10, 0)
    tree.clone(10, 11)
    tree.clone(11, 12)
    tree.end(11)
    tree.end(10)
    assert tree.step_of(12) == (0, "lineage", CONFIDENCE)
    assert tree.pids(0) == [12]
    tree.begin(20, 1)  # heard of before its clone was reported
    tree.clone(1, 20)
    tree.clone(20, 21)
    assert tree.move(20, 2)
    tree.clone(20, 22)
    assert [tree.step_of(pid)[0] for pid in (20, 21, 22)] == [2, 1, 2]
    assert not tree.move(99, 2)


def test_lineage_of_threads_helpers_and_strangers():
    tree = Lineage()
    tree.begin(10, 3)
    tree.clone(10, 10)
    assert tree.pids() == [10]
    tree.clone(1, 11)  # PID 1 reads a file for the node
    assert tree.pids() == [10]
    tree.clone(77, 78)  # the clone of 77 was lost
    assert sorted(tree.pids()) == [10, 78]
    assert tree.step_of(78) == (None, "none", 0.0)
    tree.clone(10, 78)  # the number again
    assert tree.step_of(78)[0] == 3


def test_pid_1_is_nobodys():
    tree = Lineage()
    tree.clone(10, 1)
    assert tree.pids() == []
    assert tree.step_of(1)[0] is None


def test_what_runsc_is_told():
    config = bundle.make_config(hostname="name", program="init")
    assert config["process"]["noNewPrivileges"]
    assert config["process"]["user"]["uid"] == 65535
    assert not [mount for mount in config["mounts"] if mount["type"] == "bind"]
    assert {"type": "network"} not in config["linux"]["namespaces"], "it stays in the cell's"
    json.dumps([config, bundle.make_session()])
    request = bundle.add_runtime(struct.pack("=I", 2) + b"rest", ["/usr/bin/runsc"], hostname="h", program="p")
    assert struct.unpack_from("=I", request) == (2 | bundle.SPEC_RUNTIME,)
    assert request[4:8] == b"rest"


def test_flags_are_those_it_has():
    flags = parse_flags("  -root string\n\troot directory\n  --network value\n  -overlay2 value\n  -ignore-cgroups\n")
    assert flags == {"root", "network", "overlay2", "ignore-cgroups"}
    runsc = Runsc("/usr/bin/runsc", "release-20250101.0", frozenset(flags))
    argv = runsc.arguments(platform="systrap")
    assert argv[0] == "/usr/bin/runsc"
    assert "--network=host" in argv
    assert "--overlay2=none" in argv
    assert not [word for word in argv if word.startswith("--platform")], "it has no such flag"


def test_platforms_by_version():
    assert platforms("0.0~20221219.0") == ["ptrace"]
    assert platforms("release-20240807.0") == ["systrap", "ptrace"]
    assert platforms("unknown") == ["ptrace"]


def test_a_missing_runsc_is_one_sentence():
    assert find_path((), search="") is None
    with pytest.raises(ControlMissing, match=r"not installed; install it .*or use --level ns"):
        find_runsc(None)
    with pytest.raises(ControlMissing, match="cannot be run"):
        find_runsc("/no/such/runsc")
    with pytest.raises(ControlMissing, match="not usable"):
        find_runsc("/bin/echo")


def test_room_for_the_kernels_threads():
    assert leave_room(Limits(pids=100)).pids == 100 + KERNEL_THREADS
    assert leave_room(Limits(pids=None)).pids is None
