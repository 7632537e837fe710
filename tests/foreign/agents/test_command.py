"""`vallum agent --harness`."""

import json
import os
import subprocess
import sys

import pytest

from vallum.agent.harness.catalog import find_harness
from vallum.agent.harness.install import cache_directory, is_installed

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CALLS = [{"name": "exec_command", "arguments": {"cmd": "touch /work/made; sleep 0.2"}}]


@pytest.fixture
def run_command(tmp_path):
    if not is_installed(find_harness("codex"), cache_directory(os.environ)):
        pytest.skip("codex is not installed here: python -m vallum.agent.harness.install codex")

    def run(script, *options):
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "script.json").write_text(json.dumps(script))
        upstream = f"scripted:{tmp_path / 'script.json'}"
        argv = ["agent", "--harness", "codex", "--model-upstream", upstream, "--work", str(tmp_path / "work"), *options]
        environ = {**os.environ, "VALLUM_HOME": str(tmp_path / "h")}
        return subprocess.run(
            [sys.executable, "-m", "vallum", *argv], capture_output=True, text=True, timeout=60, env=environ
        )

    return run


def test_progress_is_told_from_the_record(run_command, tmp_path):
    ran = run_command([{"tool_calls": CALLS}, {"text": "finished"}], "--diff", "go")
    assert ran.returncode == 0, ran.stderr
    assert '"text":"finished"' in ran.stdout
    assert "step 1   exec_command  touch /work/made" in ran.stderr
    assert "2 turns  1 tool call " in ran.stderr
    assert "/work/made" in ran.stderr.split("finished")[-1]
    assert list((tmp_path / "work").iterdir()) == []  # copy-on-write


def test_the_summary_is_one_object(run_command):
    ran = run_command([{"tool_calls": CALLS}, {"text": "finished"}], "--json", "go")
    summary = json.loads(ran.stdout)
    assert (summary["exit_code"], summary["turns"], summary["steps"]) == (0, 2, [1])
    assert (summary["harness"], ran.returncode) == ("codex", 0)


def test_a_budget_of_turns_is_kept_by_the_gateway(run_command):
    ran = run_command([{"tool_calls": CALLS, "repeat": True}], "--max-turns", "2", "--json", "go")
    summary = json.loads(ran.stdout)
    assert summary["turns"] == 2
    assert ran.returncode != 0
    assert {e["rule"] for e in summary["denied_attempts"] if e["kind"] == "model.call"} == {"model-budget"}


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--hook", "x", "go"], "--hook"), (["--interactive", "go"], "--interactive"), ([], "say what to do")],
)
def test_options_that_do_not_fit_are_named(run_command, options, says):
    ran = run_command([], *options)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
