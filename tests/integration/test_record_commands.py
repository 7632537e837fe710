"""The commands over a record, as a user calls them: output, exit codes, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vallum.record.ledger import Ledger
from vallum.testing.incident import Tale, tell_incident

RUN = "r-20261121-000000-abc123"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Ledger.create(tmp_path / "runs", RUN) as ledger:
        ledger.append_many(tell_incident(RUN))
    return tmp_path


def vallum(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "vallum", "--home", str(home), *words], capture_output=True, text=True, env=environ
    )


def test_runs(home: Path) -> None:
    done = vallum(home, "runs")
    assert done.returncode == 0, done.stderr
    assert RUN in done.stdout
    assert "271" in done.stdout
    (row,) = [json.loads(line) for line in vallum(home, "runs", "--json").stdout.splitlines()]
    assert (row["run"], row["denied"], row["status"]) == (RUN, 271, "finished")


def test_an_empty_home_is_no_error(tmp_path: Path) -> None:
    done = vallum(tmp_path / "nowhere", "runs")
    assert done.returncode == 0
    assert "vallum run -- CMD" in done.stdout
    assert not (tmp_path / "nowhere").exists()


def test_show(home: Path) -> None:
    done = vallum(home, "show", "latest")
    assert done.returncode == 0, done.stderr
    for expected in (
        "271 attempts denied",
        "0 B delivered",
        "6 (late)",
        "miner-protocol",
        "254 addresses in 10.0.8.0/24",
        "Reverse SSH tunnel",
    ):
        assert expected in done.stdout


def test_events_have_the_public_form(home: Path) -> None:
    lines = vallum(home, "events", RUN[:12], "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["id"] for event in events] == list(range(len(tell_incident())))
    for event in events:
        assert {"t_ns", "kind", "scope", "attribution"} <= set(event)
        assert set(event["scope"]) == {"run", "episode", "step", "tool_call"}
        assert set(event["attribution"]) == {"method", "confidence"}
    denied = next(event for event in events if event["kind"] == "net.flow" and event["verdict"] == "deny")
    assert {"rule", "dst_ip", "dst_port", "dst_host", "protocol", "bytes_out"} <= set(denied)
    finding = next(event for event in events if event["kind"] == "finding")
    assert finding["attack"] == ["T1496.001"]
    assert all(number < finding["id"] for number in finding["evidence"])


def test_events_are_filtered(home: Path) -> None:
    picked = [
        json.loads(line)
        for line in vallum(
            home, "events", RUN, "--json", "--kind", "net.flow", "--kind", "finding", "--step", "6"
        ).stdout.splitlines()
    ]
    assert [event["kind"] for event in picked] == ["net.flow", "net.flow", "finding"]
    assert {event["scope"]["step"] for event in picked} == {6}
    assert "state=denied" in vallum(home, "events", RUN, "--kind", "net.flow", "--step", "3").stdout


def test_events_follow_a_live_run_to_its_end(tmp_path: Path) -> None:
    events = tell_incident(RUN)
    ledger = Ledger.create(tmp_path / "runs", RUN)
    ledger.append_many(events[:10])
    with subprocess.Popen(
        [sys.executable, "-m", "vallum", "--home", str(tmp_path), "events", RUN, "--json", "--follow"],
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        for event in events[10:]:
            ledger.append(event)
        time.sleep(0.3)
        ledger.close()
        assert reader.stdout is not None
        assert len(reader.stdout.readlines()) == len(events)
        assert reader.wait(10) == 0


def test_report(home: Path, tmp_path: Path) -> None:
    done = vallum(home, "report", RUN)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_absolute()
    assert "not one byte delivered" in path.read_text()
    target = tmp_path / "a.html"
    assert vallum(home, "report", "latest", "-o", str(target)).returncode == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert vallum(home, "report", "-o", "-").stdout.startswith("<!doctype html>")
    missing = vallum(home, "report", RUN, "-o", str(tmp_path / "no" / "a.html"))
    assert missing.returncode == 2
    assert "-o" in missing.stderr
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_verify(home: Path, tmp_path: Path) -> None:
    done = vallum(home, "verify", RUN)
    assert done.returncode == 0, done.stderr
    assert "intact and closed" in done.stdout
    assert json.loads(vallum(home, "verify", RUN, "--json").stdout)["closed"] is True
    shutil.copytree(home / "runs" / RUN, tmp_path / "copy" / RUN)
    assert vallum(home, "verify", str(tmp_path / "copy" / RUN)).returncode == 0


def test_the_chain_is_followed_by_the_shell_line_of_the_report(home: Path) -> None:
    """What the report tells a reader to type says the same as we do."""
    html = vallum(home, "report", "-o", "-").stdout
    script = (
        html[html.index("h=000") : html.index("</pre>")].replace("&lt;", "<").replace("&#34;", '"').replace("&gt;", ">")
    )
    log = home / "runs" / RUN / "ledger.log"
    short = b"".join(log.read_bytes().splitlines(keepends=True)[:40])
    (home / "ledger.log").write_bytes(short)
    done = subprocess.run(["sh", "-c", script], cwd=home, capture_output=True, text=True)
    assert done.stdout.split() == [short.splitlines()[-1][:64].decode()]
    (home / "ledger.log").write_bytes(short.replace(b"left-pad", b"left-pat", 1))
    assert "changed: " in subprocess.run(["sh", "-c", script], cwd=home, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", ["verify", "report", "show", "events"])
def test_a_changed_record_is_named_with_exit_code_4(home: Path, command: str) -> None:
    log = home / "runs" / RUN / "ledger.log"
    data = log.read_bytes()
    number = data[: data.index(b"10.0.8.77")].count(b"\n")
    log.write_bytes(data.replace(b"10.0.8.77", b"10.0.9.77"))
    done = vallum(home, command, RUN)
    assert done.returncode == 4
    assert f"record {number} (line {number + 1}, byte " in done.stderr
    assert "Traceback" not in done.stderr
    assert "changed" in vallum(home, "runs").stdout


def test_bad_input_gets_a_sentence(home: Path) -> None:
    for words, code, expected in (
        (("show", "zz"), 2, "no run"),
        (("show", "../../etc"), 2, "no run"),
        (("events", RUN, "--kind", "nope"), 2, "net.flow"),
        (("events", RUN, "--step", "-1"), 2, "--step"),
        (("incidents", "zz"), 2, "no run"),
    ):
        done = vallum(home, *words)
        assert done.returncode == code, (words, done.stderr)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_that_cannot_be_read_gives_exit_code_3(home: Path) -> None:
    log = home / "runs" / RUN / "ledger.log"
    other = Path(shutil.move(log, home / "moved"))
    log.symlink_to(other)
    done = vallum(home, "verify", RUN)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_incidents_are_joined_per_step(home: Path) -> None:
    joined = [json.loads(line) for line in vallum(home, "incidents", "--json").stdout.splitlines()]
    assert [(incident["step"], incident["severity"]) for incident in joined] == [
        (1, "critical"), (2, "critical"), (3, "high"), (4, "high"), (5, "high"), (6, "medium"),
    ]  # fmt: skip
    assert "T1572" in vallum(home, "incidents", RUN).stdout


def test_no_output_drives_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]x[/]"
    tale = Tale(RUN)
    call = tale.open(0, ["sh", "-c", evil])
    process = tale.start(0, [evil, evil])
    denied = tale.deny(0, process, evil, 80, evil, evil, host=evil, first_bytes=evil)
    tale.ask(0, process, evil, verdict="deny", answers=[evil], rule=evil)
    tale.find(0, "d", evil, "high", [evil], evil, [denied])
    tale.close(0, call, 0, 1)
    with Ledger.create(tmp_path / "runs", RUN) as ledger:
        ledger.append_many(tale.events)
    for words in (
        ("runs",),
        ("show",),
        ("events",),
        ("events", "--json"),
        ("incidents",),
        ("incidents", "--json"),
        ("verify",),
        ("runs", "--json"),
    ):
        done = vallum(tmp_path, *words)
        assert done.returncode == 0, (words, done.stderr)
        assert not set(done.stdout) & set("\x1b\x07\x9b\u202e\x7f"), words
    assert "[bold red]" in vallum(tmp_path, "show").stdout
    picked = json.loads(vallum(tmp_path, "events", "--json", "--kind", "dns.query").stdout)
    assert picked["qname"] == evil
