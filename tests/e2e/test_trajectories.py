"""From an agent in a cell to trajectories: what it said, what the kernel saw, and what a collector was told meanwhile."""

import json
import os
import time

import pytest

from vallum.testing.atif import check_document
from vallum.testing.target import Target, make_address

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(scope="module")
def address():
    with make_address() as address:
        yield address


@pytest.fixture
def target(address):
    target = Target(address)
    yield target
    assert target.received == [], "nothing that was refused reached it"
    target.close()


def bash(command):
    return {"name": "bash", "arguments": {"command": command}}


@pytest.fixture
def script(tmp_path, target):
    path = tmp_path / "script.json"
    replies = [
        {"text": "First.", "tool_calls": [bash(f"(sleep 0.6; curl -s -m 3 {target.url}/) >/dev/null 2>&1 &")]},
        {"tool_calls": [bash("echo quiet")]},
        {"tool_calls": [bash("sleep 1.5")]},
        {"tool_calls": [{"name": "submit", "arguments": {"answer": "done"}}]},
    ]
    path.write_text(json.dumps(replies))
    return path


def run_agent(cli, script):
    ran = cli("agent", "--model-upstream", f"scripted:{script}", "-q", "look around")
    assert ran.code == 0, ran.err


def test_a_late_attempt_stands_at_the_turn_that_began_it(cli, script, target, tmp_path):
    run_agent(cli, script)
    out = tmp_path / "out"
    ran = cli("data", "export", "-o", out)
    assert ran.code == 0, ran.err
    (path,) = out.glob("*.atif.json")
    assert path.stat().st_mode & 0o077 == 0
    document = json.loads(path.read_bytes())
    check_document(document)
    turns = [step for step in document["steps"] if step["source"] == "agent"]
    first, second = (turn["extra"]["vallum"]["containment"] for turn in turns[:2])
    assert turns[0]["message"] == "First."
    assert (first["denied"], first["denied_late"], first["contaminated"]) == (1, 1, True)
    assert first["denied_flows"][0]["target"] == f"{target.address}:{target.port}"
    assert first["denied_flows"][0]["bytes_out"] == 0
    assert (second["denied"], second["contaminated"]) == (0, False)
    assert "quiet" in turns[1]["observation"]["results"][0]["content"]
    assert second["commands"][0]["exit_code"] == 0
    said = cli("show").out
    assert "First." in said
    assert f"{target.address}:{target.port}" in said


def test_what_is_contaminated_is_left_out_and_what_is_not_stays(cli, script, target, tmp_path):
    run_agent(cli, script)
    quiet = tmp_path / "quiet.json"
    quiet.write_text(json.dumps([{"tool_calls": [{"name": "submit", "arguments": {"answer": "x"}}]}]))
    run_agent(cli, quiet)
    names = [row["run"] for row in map(json.loads, cli("runs", "--json").out.splitlines())]
    out = tmp_path / "out"
    ran = cli("data", "export", *names, "--exclude-contaminated", "-o", out)
    assert ran.code == 0, ran.err
    assert [path.name.startswith(names[0]) for path in out.glob("*.atif.json")] == [True]
    (left_out,) = json.loads((out / "excluded.json").read_bytes())
    assert left_out["run"] == names[1]
    assert any(f"{target.address}:{target.port}" in reason for reason in left_out["reasons"])


def test_a_collector_is_told_live_and_only_when_it_is_named(cli, script, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    from vallum.testing.collector import Collector

    with Collector() as collector:
        monkeypatch.setenv("VALLUM_OTLP_ENDPOINT", collector.url)
        run_agent(cli, script)
        deadline = time.monotonic() + 15
        while not any(s.name.startswith("invoke_agent") for s in collector.spans) and time.monotonic() < deadline:
            time.sleep(0.1)
        spans = {span.span_id: span for span in collector.spans}
        tools = [span for span in spans.values() if span.name == "execute_tool bash"]
        assert len(tools) == 3
        assert {spans[tool.parent_span_id].name for tool in tools} == {"chat default"}
        (agent,) = [span for span in spans.values() if span.name == "invoke_agent vallum"]
        counted = {one.key: one.value.int_value for one in agent.attributes}
        assert counted["vallum.denied"] == 1
        assert b"sleep 0.6" not in b"".join(span.SerializeToString() for span in spans.values())
        monkeypatch.delenv("VALLUM_OTLP_ENDPOINT")
        (started,) = cli.events(kind="run.started")
        assert started["tiers"]["export.otlp"] == "enforced"
        live = set(spans)
        collector.spans.clear()
        sent = cli("data", "export", "--format", "otlp", "--endpoint", collector.url)
        assert sent.code == 0, sent.err
        assert {span.span_id for span in collector.spans} == live, "what was sent live is the same trace"


def test_a_collector_that_is_not_there_stops_nothing_and_the_record_says_so(cli, script, monkeypatch):
    monkeypatch.setenv("VALLUM_OTLP_ENDPOINT", "not a url")
    run_agent(cli, script)
    (started,) = cli.events(kind="run.started")
    assert started["tiers"]["export.otlp"].startswith("missing: ")
