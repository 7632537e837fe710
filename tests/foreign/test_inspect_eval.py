"""A whole Inspect evaluation, in a network namespace of its own that has no way out: it contacts nothing.

The example of the documentation is what runs.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: pip install 'vallum[inspect]'")

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What the example said, and every event of its run."""
    home = tmp_path_factory.mktemp("h")
    environ = {**os.environ, "VALLUM_HOME": str(home), "NO_COLOR": "1"}
    ran = subprocess.run(
        ["unshare", "--net", sys.executable, str(ROOT / "examples/inspect_task.py")],
        capture_output=True, text=True, timeout=110, env=environ, cwd=home,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    [run] = [path.name for path in (home / "runs").iterdir()]
    listed = subprocess.run(
        [sys.executable, "-m", "vallum", "events", run, "--json"],
        capture_output=True, text=True, timeout=60, env=environ, check=True,
    )  # fmt: skip
    return ran.stdout, run, [json.loads(line) for line in listed.stdout.splitlines()]


def test_the_run_is_the_evaluation_and_an_episode_is_a_sample(evaluated):
    _, run, events = evaluated
    assert re.fullmatch(r"inspect-[A-Za-z0-9]+", run)
    started = [event for event in events if event["kind"] == "episode.started"]
    assert {event["scope"]["episode"].split("-e1-")[0] for event in started} == {"count", "dial"}
    assert {event["root"] for event in started} == {"owner"}
    assert [event["reason"] for event in events if event["kind"] == "episode.ended"] == ["closed"] * 2
    assert next(event for event in events if event["kind"] == "run.started")["command"] == ["inspect", "shell"]


def test_what_a_tool_call_did_carries_the_sample_and_the_call(evaluated):
    out, _, events = evaluated
    said = dict(re.findall(r"^(\w+): bash\((\S+)\) started", out, re.MULTILINE))
    assert set(said) == {"count", "dial"}
    for sample, call in said.items():
        mine = [event for event in events if event["scope"]["tool_call"] == call]
        assert {event["scope"]["episode"].split("-e1-")[0] for event in mine} == {sample}
        assert len({event["scope"]["step"] for event in mine}) == 1
        kinds = {event["kind"] for event in mine}
        assert {"step.opened", "tool.call", "process.started", "tool.result", "step.closed"} <= kinds
    # What Inspect and the provider do by themselves belongs to no tool call.
    own = [e for e in events if e["kind"] == "tool.call" and '"pwd"' in e["arguments"]]
    assert len(own) == 2
    assert all(event["scope"]["tool_call"] is None for event in own)


def test_a_denied_attempt_is_charged_to_the_sample_that_made_it(evaluated):
    out, _, events = evaluated
    [denied] = [event for event in events if event["kind"] == "net.flow"]
    assert (denied["verdict"], denied["dst_ip"], denied["dst_port"]) == ("deny", "203.0.113.7", 3333)
    assert denied["bytes_out"] == 0
    assert denied["scope"]["episode"].startswith("dial-e1-")
    assert denied["scope"]["tool_call"] in out
    assert "dial: denied 203.0.113.7:3333" in out


def test_inspect_finds_the_provider_by_its_entry_point():
    try:
        distribution("vallum")
    except PackageNotFoundError:
        pytest.skip("vallum is not installed as a package here (make setup does)")
    [found] = [entry for entry in entry_points(group="inspect_ai") if entry.name == "vallum"]
    assert found.load().VallumSandboxEnvironment.__name__ == "VallumSandboxEnvironment"


def test_vallum_needs_no_inspect():
    code = (
        "import sys; sys.modules['inspect_ai'] = None\n"
        "import vallum, vallum.sync, vallum.compat, vallum.cli.main, vallum.node.house"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
