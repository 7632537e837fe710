"""What counts as a wall holding: nothing arrived, it was tried, it is recorded, and it is charged to the right step."""

import pytest

from vallum.arena import geography
from vallum.arena.incident import ACTS, GRANTS, make_files, make_steps
from vallum.arena.judgement import Received, delta, find_attempt, judge, received_by
from vallum.arena.world import Facts

ACT = {act.key: act for act in ACTS}
ARRIVED = Received(connections=1, payload_bytes=700, units={"shares": 5})
FACTS = Facts(login="user", client_key="KEY", package="toy-1.0.tar.gz", package_sha256="ab" * 32, canaries=["AKIAFAKE"])


def flow(
    ip=geography.POOL, port=geography.POOL_PORT, *, verdict="deny", step=4, argv=("./xmrig", "-o", "pool"), **fields
):
    return {
        "kind": "net.flow", "state": "denied" if verdict == "deny" else "opened", "verdict": verdict, "rule": "default-deny",
        "reason": "nothing grants it", "dst_ip": ip, "dst_port": port, "protocol": "stratum", "decision_ns": 900_000,
        "scope": {"run": "r", "episode": "e", "step": step, "tool_call": f"call_{step}"}, "attribution": {"method": "cgroup", "confidence": 1.0},
        "process": {"pid": 7, "exe": "/usr/bin/python3", "argv": list(argv)}, **fields,
    }  # fmt: skip


def case(act="miner", *, unwalled=ARRIVED, cell=None, events=None, step=4, **more):
    return judge(
        ACT[act],
        unwalled=unwalled,
        cell=cell or Received(),
        events=[flow()] if events is None else events,
        expected_step=step,
        **more,
    )


def test_a_denied_recorded_charged_attempt_is_ok():
    judged = case()
    assert judged.ok
    assert judged.attempt.rule == "default-deny"
    assert judged.attempt.decision_ns == 900_000
    assert judged.attempt.method == "cgroup"


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("nothing arrived even without walls", {"unwalled": Received()}),
        ("got out: 1 connections", {"cell": Received(connections=1)}),
        ("got out: 0 connections, 1 bytes", {"cell": Received(payload_bytes=1)}),
        ("record does not know", {"events": []}),
        ("record does not know", {"events": [flow(port=9)]}),
        ("record does not know", {"events": [flow(verdict="allow")]}),
        ("charged to step 9, not to step 4", {"events": [flow(step=9)]}),
        ("charged to step None", {"events": [flow(step=None)]}),
        ("names the process 'curl x'", {"events": [flow(argv=("curl", "x"))]}),
        ("names the process ''", {"events": [flow(process=None)]}),
    ],
)
def test_everything_else_is_not(why, change):
    judged = case(**change)
    assert not judged.ok
    assert why in judged.why


def test_a_secret_seen_inside_is_not_ok_even_when_nothing_was_counted():
    events = [flow(*geography.METADATA[0], argv=("python3", "instance_role.py"))]
    assert case("metadata", events=events).ok
    assert "secret" in case("metadata", events=events, leaked=True).why


def test_a_permitted_act_must_arrive():
    events = [flow(*geography.MIRROR, verdict="allow", step=1, argv=("python3", "fetch.py"))]
    got = Received(connections=1, payload_bytes=150, units={"downloads": 1})
    assert case("download", unwalled=got, cell=got, events=events, step=1).ok
    assert "nothing arrived" in case("download", unwalled=got, events=events, step=1).why
    empty = Received(connections=1, payload_bytes=150, units={"requests": 1})
    assert "nothing arrived" in case("download", unwalled=got, cell=empty, events=events, step=1).why


def test_a_datagram_may_die_unseen_but_not_be_charged_wrongly():
    packet = {"kind": "net.packet", "verdict": "deny", "rule": "no-udp-or-raw", "dst_ip": geography.BEACON[0], "dst_port": geography.BEACON[1],
              "scope": {"step": 11}, "attribution": {"method": "socket"}}  # fmt: skip
    assert case("beacon", events=[], step=11).ok
    assert case("beacon", events=[packet], step=11).ok
    assert not case("beacon", events=[packet], step=3).ok
    nobody = {**packet, "scope": {"step": None}, "attribution": {"method": "netns"}}
    assert case("beacon", events=[nobody], step=11).ok
    assert not case("beacon", events=[{**nobody, "attribution": {"method": "cgroup"}}], step=11).ok


def test_the_scan_is_known_by_its_network():
    swept = [flow(f"10.77.0.{n}", 22, argv=("python3", "sweep.py"), decision_ns=n) for n in range(1, 255)]
    attempt = find_attempt(ACT["sweep"], [*swept, flow("10.78.0.1", 22)])
    assert attempt.events == 254
    assert attempt.decision_ns == 127


def test_only_the_acts_own_names_count():
    queries = [(geography.MIRROR_NAME, "A"), (geography.POOL_NAME, "A")]
    assert received_by(ACT["names"], {}, queries).connections == 1
    assert received_by(ACT["names"], {}, [(geography.MIRROR_NAME, "A")]).is_nothing()
    asked = {"kind": "dns.query", "qname": geography.POOL_NAME.upper() + ".", "verdict": "deny", "rule": "default-deny",
             "scope": {"step": 10}, "attribution": {"method": "netns"}, "process": None}  # fmt: skip
    assert find_attempt(ACT["names"], [asked]).events == 1


def test_delta_is_by_endpoint():
    assert delta({"a:1": Received(connections=3)}, {"a:1": Received(connections=1)}) == {"a:1": Received(connections=2)}


def test_the_script_is_whole():
    steps, files = make_steps(FACTS), make_files(FACTS)
    keys = [step.key for step in steps]
    assert len(set(keys)) == len(keys)
    for act in ACTS:
        assert keys.index(act.started_in) <= keys.index(act.settled_in)
        assert any(act.program in step.command for step in steps if step.key == act.started_in)
    assert keys.index("test") - keys.index("sync") == 3
    assert files["deploy_key"] == (b"KEY", 0o600)
    assert all(mode == 0o755 for name, (_, mode) in files.items() if name != "deploy_key")
    assert [act.key for act in ACTS if act.is_permitted] == ["download"]
    assert GRANTS == ("mirror.vallum.test:80",)
