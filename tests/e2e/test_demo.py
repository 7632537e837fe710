"""The incident, end to end: every act delivers nothing, is charged to its step and is in the report; granted, it passes."""

import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from vallum.arena import geography
from vallum.arena.incident import ACTS
from vallum.arena.judgement import Case
from vallum.arena.replay import Outcome
from vallum.arena.world import command_inside
from vallum.record.reader import read_lines
from vallum.record.verify import verify

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not all(map(shutil.which, ("ip", "ssh", "sshd"))), reason="needs iproute2, openssh-client and openssh-server"
    ),
]
VALLUM = [sys.executable, "-I", "-c", "from vallum.cli.main import main; main()"]
ATTACKS = [act for act in ACTS if not act.is_permitted]
PERMITTED = [act for act in ACTS if act.is_permitted]
BY_KEY = {act.key: act for act in ACTS}


class Demo(msgspec.Struct):
    """What one run of the command left."""

    outcome: Outcome
    exit_code: int
    report: str
    events: list[dict]
    home: Path

    def case(self, key: str) -> Case:
        return next(case for case in self.outcome.cases if case.key == key)

    def about(self, step: int, kind: str) -> list[dict]:
        return [event for event in self.events if event["kind"] == kind and event["scope"].get("step") == step]


@pytest.fixture(scope="module")
def short_home():
    """A home whose path is short enough for a Unix socket, and that anyone can enter."""
    with tempfile.TemporaryDirectory(prefix="vallum-e2e-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def demo(short_home: Path) -> Demo:
    target = short_home / "report.html"
    argv = [*VALLUM, "--home", str(short_home / "home"), "demo", "--json", "-o", str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110, cwd="/")
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("report") == str(target)
    outcome = msgspec.convert(said, Outcome)
    record = short_home / "home" / "runs" / outcome.run
    events = [json.loads(line.payload) for line in read_lines(record)]
    return Demo(
        outcome=outcome,
        exit_code=done.returncode,
        report=html.unescape(target.read_text("utf-8")),
        events=events,
        home=short_home / "home",
    )


@pytest.fixture(scope="module")
def granted(short_home: Path) -> Outcome:
    home = short_home / "granted"
    home.mkdir(mode=0o700)
    argv = command_inside([sys.executable, "-I", str(Path(__file__).with_name("granted_replay.py")), str(home)])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110, cwd="/")
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Outcome)


@pytest.mark.parametrize("act", ATTACKS, ids=lambda act: act.key)
def test_an_attack_works_without_walls(demo: Demo, act):
    assert demo.case(act.key).unwalled.payload_bytes > 0


@pytest.mark.parametrize("act", ATTACKS, ids=lambda act: act.key)
def test_nothing_of_an_attack_arrives_from_the_cell(demo: Demo, act):
    case = demo.case(act.key)
    assert case.cell.is_nothing(), case
    assert case.ok, case.why


@pytest.mark.parametrize("act", ATTACKS, ids=lambda act: act.key)
def test_it_is_charged_to_the_step_and_process_that_did_it(demo: Demo, act):
    case = demo.case(act.key)
    if act.kind == "packet" and case.attempt.step is None:
        assert case.attempt.method in ("", "netns")  # said, not guessed
        return
    started_in = next(played for played in demo.outcome.steps if played.key == act.started_in)
    assert case.attempt.step == started_in.step
    if act.kind == "flow":
        assert act.program in case.attempt.process
        assert case.attempt.decision_ns is not None
        assert case.attempt.decision_ns < 1_000_000_000


@pytest.mark.parametrize("act", ATTACKS, ids=lambda act: act.key)
def test_the_report_has_it(demo: Demo, act):
    case = demo.case(act.key)
    if case.attempt.events:
        assert case.attempt.rule in demo.report
        target = (
            act.names[0]
            if act.names
            else "10.77.0."
            if act.network
            else act.endpoints[0].rpartition(":")[0].strip("[]")
        )
        assert target in demo.report
        assert act.program in demo.report


def test_denied_flows_carry_what_the_public_face_says(demo: Demo):
    flows = [event for event in demo.events if event["kind"] == "net.flow" and event["verdict"] == "deny"]
    assert len(flows) > 254
    for flow in flows:
        assert {
            "t_ns",
            "scope",
            "attribution",
            "rule",
            "dst_ip",
            "dst_port",
            "dst_host",
            "protocol",
            "bytes_out",
        } <= flow.keys()
        assert flow["bytes_out"] == 0
        assert flow["scope"]["run"] == demo.outcome.run
        assert flow["scope"]["episode"] == demo.outcome.episode


def test_the_daemon_is_charged_to_the_step_that_started_it_three_steps_before(demo: Demo):
    steps = {played.key: played.step for played in demo.outcome.steps}
    assert steps["test"] - steps["sync"] == 3
    dialled = [
        event
        for event in demo.events
        if event["kind"] == "net.flow" and event["dst_port"] == geography.POOL_DAEMON_PORT
    ]
    assert dialled
    assert {event["scope"]["step"] for event in dialled} == {steps["sync"]}
    closed = next(event for event in demo.about(steps["sync"], "step.closed"))
    assert all(event["t_ns"] > closed["t_ns"] for event in dialled)


def test_a_miner_is_known_by_what_it_says_not_by_its_name(demo: Demo):
    assert demo.case("renamed").attempt.protocol == "stratum"


def test_secrets_stay_outside(demo: Demo):
    assert "AKIAFAKE" not in demo.report
    assert not any("AKIAFAKE" in json.dumps(event) for event in demo.events)


def test_findings_name_the_techniques(demo: Demo):
    found = {technique for event in demo.events if event["kind"] == "finding" for technique in event["attack"]}
    assert {"T1496.001", "T1572", "T1046", "T1552.005"} <= found


@pytest.mark.parametrize("act", PERMITTED, ids=lambda act: act.key)
def test_what_is_permitted_works(demo: Demo, act):
    case = demo.case(act.key)
    assert case.ok, case.why
    assert case.cell.units["downloads"] == 1
    played = {played.key: played for played in demo.outcome.steps}
    assert (
        played["fetch"].exit_code
        == played["build"].exit_code
        == played["test"].exit_code
        == played["answer"].exit_code
        == 0
    )


def test_the_exit_code_and_the_record_say_the_same(demo: Demo):
    assert demo.outcome.ok
    assert demo.exit_code == 0
    verify(demo.home / "runs" / demo.outcome.run)
    shown = subprocess.run(
        [*VALLUM, "--home", str(demo.home), "show", demo.outcome.run], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert demo.outcome.run in shown.stdout


@pytest.mark.parametrize("key", [act.key for act in ACTS if act.kind != "packet"])
def test_its_granted_twin_arrives(granted: Outcome, key: str):
    """Without this, an agent that fails for another reason would look like a wall."""
    case = next(case for case in granted.cases if case.key == key)
    assert case.cell.payload_bytes > 0, case
    for unit in {"miner": ["shares"], "renamed": ["shares"], "daemon": ["shares"], "tunnel": ["forward_listeners", "tunnel_bytes"],
                 "sweep": ["probes"], "metadata": ["secrets_read"], "names": ["queries"], "download": ["downloads"]}[key]:  # fmt: skip
        assert case.cell.units.get(unit), case.cell


def test_udp_has_no_twin_because_nothing_grants_it(granted: Outcome):
    case = next(case for case in granted.cases if case.key == "beacon")
    assert case.unwalled.payload_bytes > 0
    assert case.cell.is_nothing()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="this is the ordinary user already")
def test_an_ordinary_user_can_run_it(tmp_path_factory):
    with tempfile.TemporaryDirectory(prefix="vallum-e2e-") as directory:
        os.chown(directory, 65534, 65534)
        user = [
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "env",
            "-i",
            "PATH=/usr/bin:/bin",
            f"HOME={directory}",
        ]
        if subprocess.run([*user, sys.executable, "-c", "import vallum"], capture_output=True).returncode:
            pytest.skip("an ordinary user may not read this checkout")
        done = subprocess.run(
            [*user, *VALLUM, "--home", f"{directory}/h", "demo", "--json"],
            capture_output=True,
            text=True,
            timeout=110,
            cwd="/",
        )
        assert done.stdout, done.stderr
        outcome = msgspec.convert({k: v for k, v in json.loads(done.stdout).items() if k != "report"}, Outcome)
        assert outcome.rootless
        assert [case.key for case in outcome.cases if not case.permitted and not case.cell.is_nothing()] == []
        assert done.returncode == (0 if outcome.ok else 1)
