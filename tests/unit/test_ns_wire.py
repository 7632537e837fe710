"""The bytes of the wire, lineage from process tables, and the sentences for failures: all without I/O."""

import errno
import struct

import pytest

from vallum.core.errors import CommandNotExecutable, CommandNotFound, GuestFileError, InvalidInput
from vallum.sandbox.base import Layer
from vallum.sandbox.ns import wire
from vallum.sandbox.ns.backend import choose_layers
from vallum.sandbox.ns.explain import explain_build, explain_file, explain_spawn
from vallum.sandbox.ns.lineage import Keeper, ProcessStat, ancestry, descendants, find_step, parse_stat


def test_messages_survive_the_wire():
    message = wire.Message(3, 7, -1, 5, "héllo")
    assert wire.Message.decode(message.encode()) == message
    assert wire.Message.decode(b"short") is None
    assert wire.Message.decode(wire.HEAD.pack(1, 2, 3, 4) + b"\xff").text == "\\xff"


def test_payloads_are_counted_and_terminated():
    raw = wire.encode_spawn(user="agent", cwd="/", argv=[b"a", b""], environ=[b"K=v"])
    assert raw.startswith(
        struct.pack("=I", 5) + b"agent\0" + struct.pack("=I", 1) + b"/\0" + struct.pack("=II", 24, 80)
    )
    assert raw.endswith(struct.pack("=I", 1) + struct.pack("=I", 3) + b"K=v\0")


@pytest.mark.parametrize("argv", [[], [b"a\0b"]])
def test_impossible_commands_are_refused(argv):
    with pytest.raises(InvalidInput):
        wire.encode_spawn(user="u", cwd="/", argv=argv, environ=[])


def test_impossible_images_are_refused():
    def encode(layers):
        ids = wire.Ids(base=1, range_size=65536)
        placed = [wire.PlacedLayer(layer) for layer in layers]
        return wire.encode_create(ids=ids, port=1, processes=0, hostname="h", cgroups=[], layers=placed)

    assert encode([Layer(at="/", lowers=["/a"])])
    for layers in (
        [],
        [Layer(at="/usr", lowers=["/a"])],
        [Layer(at="/", lowers=[])],
        [Layer(at="/", lowers=["/a"] * 500)],
    ):
        with pytest.raises(InvalidInput):
            encode(layers)


def test_without_a_range_layers_of_others_are_read_only():
    layers = [
        Layer(at="/", lowers=["/root-owned"]),
        Layer(at="/usr", lowers=["/root-owned"]),
        Layer(at="/home", lowers=["/own"]),
    ]
    single = wire.Ids(inner=(1000, 1000), outer=(7, 7))
    owner = {"/root-owned": 0, "/own": 7}.__getitem__
    assert [layer.writable for layer in choose_layers(layers, single, owner)] == [True, False, True]
    assert choose_layers(layers, wire.Ids(base=1, range_size=65536), owner) == layers


def test_a_process_name_cannot_forge_its_stat():
    stat = parse_stat("42 (a) R 1 (b)) S 7 " + " ".join(str(n) for n in range(5, 53)))
    assert (stat.pid, stat.ppid, stat.state) == (42, 7, "S")
    assert stat.start_ticks == 22
    assert parse_stat("nonsense") is None


def table(*rows):
    return {pid: ProcessStat(pid, ppid, "S", start, 0) for pid, ppid, start in rows}


def test_lineage_leads_to_the_keeper():
    processes = table((1, 0, 0), (10, 1, 1), (11, 1, 1), (20, 10, 5), (21, 20, 6), (30, 11, 7), (40, 1, 8))
    keepers = {10: Keeper(3, 10), 11: Keeper(4, 11)}
    assert find_step(processes, 21, keepers)[0] == 3
    assert find_step(processes, 30, keepers)[0] == 4
    assert find_step(processes, 40, keepers) is None
    assert find_step(processes, 10, keepers) is None
    assert find_step(processes, 999, keepers) is None
    assert sorted(descendants(processes, 10)) == [20, 21]
    assert ancestry(processes, 21, 1) == [21, 20, 10]


def test_a_moved_shell_is_charged_by_time():
    # keeper 10 of step 0; shell 20; daemon 30 of step 0, reparented; command 40 of step 1; its daemon 50, reparented
    processes = table((1, 0, 0), (10, 1, 1), (20, 10, 5), (30, 10, 10), (31, 30, 99), (40, 20, 55), (50, 10, 60))
    keepers = {10: Keeper(0, 10, {20: [(0, 0), (50, 1)]})}
    assert {pid: find_step(processes, pid, keepers)[0] for pid in (20, 30, 31, 40, 50)} == {
        20: 1,
        30: 0,
        31: 0,
        40: 1,
        50: 1,
    }


@pytest.mark.parametrize(
    ("stage", "number", "kind"),
    [
        (wire.STAGE_EXEC, errno.ENOENT, CommandNotFound),
        (wire.STAGE_EXEC, errno.EACCES, CommandNotExecutable),
        (wire.STAGE_EXEC, errno.ENOEXEC, CommandNotExecutable),
        (wire.STAGE_EXEC, errno.E2BIG, InvalidInput),
        (wire.STAGE_USER, errno.ENOENT, InvalidInput),
        (wire.STAGE_CWD, errno.ENOENT, InvalidInput),
    ],
)
def test_why_a_command_did_not_start(stage, number, kind):
    error = explain_spawn(stage, number, argv0="x\x1b[2J", user="u", cwd="/c")
    assert type(error) is kind
    assert "\x1b" not in str(error)


def test_sentences_name_the_remedy():
    assert "nf_tables" in str(explain_build("load the nftables rules of the cell", errno.EPROTONOSUPPORT))
    assert "user namespaces" in str(explain_build("make namespaces (user, mount)", errno.EPERM))
    error = explain_file(wire.STAGE_FILE, errno.EFBIG, verb="read", path="/a", user="u")
    assert isinstance(error, GuestFileError)
    assert error.errno_name == "EFBIG"
