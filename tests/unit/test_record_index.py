"""The index: what it says is what the logs say, and it can be lost at any time."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from vallum.core.errors import RecordError
from vallum.core.events import RunStarted
from vallum.core.scope import BY_NODE, Scope
from vallum.record.index import NAME, Index
from vallum.record.ledger import Ledger
from vallum.record.reader import read_records
from vallum.record.story import fold
from vallum.testing.incident import tell_incident


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Ledger.create(tmp_path / "runs", "r-1") as ledger:
        ledger.append_many(tell_incident("r-1"))
    return tmp_path


def open_index(home: Path) -> Index:
    return Index(home / NAME, home / "runs")


def started(run: str, t_ns: int) -> RunStarted:
    return RunStarted(
        t_ns=t_ns,
        mono_ns=t_ns,
        scope=Scope(run=run),
        attribution=BY_NODE,
        command=["x"],
        containment="standard",
        version="0",
        host="h",
        kernel="k",
        tiers={},
    )


def test_it_counts_as_the_story_does(home: Path) -> None:
    totals = fold(read_records(home / "runs" / "r-1")).count()
    with open_index(home) as index:
        (row,) = index.list_runs()
        summary = index.run_summary("r-1")
    assert (row.steps, row.denied, row.findings, row.cpu_ns) == (totals.steps, totals.denied, 6, totals.cpu_ns)
    assert (row.bytes_out, row.bytes_in, row.processes) == (totals.bytes_out, totals.bytes_in, totals.processes)
    assert (row.status, row.exit_code, row.episodes, row.command) == (
        "finished",
        0,
        1,
        ["agent", "--task", "train.toml"],
    )
    assert [step.denied for step in summary.steps if step.step is not None] == [0, 6, 6, 1, 255, 1, 2, 0, 0]
    assert summary.steps[4].command == "python3 sweep.py 10.0.8.0/24"
    assert summary.findings[0].attack == ["T1496.001"]
    assert (home / NAME).stat().st_mode & 0o777 == 0o600


def test_it_follows_a_growing_log(tmp_path: Path) -> None:
    events = tell_incident("r-1")
    with Ledger.create(tmp_path / "runs", "r-1") as ledger, open_index(tmp_path) as index:
        for place in range(0, len(events), 50):
            ledger.append_many(events[place : place + 50])
            (row,) = index.list_runs()
            assert row.records == ledger.count
            assert row.status == "running"
    with open_index(tmp_path) as index:
        grown = index.list_runs()
    (tmp_path / NAME).unlink()
    with open_index(tmp_path) as index:
        assert index.list_runs() == grown


def test_several_readers_at_once_count_nothing_twice(home: Path) -> None:
    denied: list[int] = []

    def read() -> None:
        with open_index(home) as index:
            denied.append(index.list_runs()[0].denied)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert denied == [271] * 6


@pytest.mark.parametrize("damage", ["garbage", "truncated", "version", "tables", "directory"])
def test_a_damaged_index_is_made_anew(home: Path, damage: str) -> None:
    with open_index(home) as index:
        before = index.list_runs()
    path = home / NAME
    if damage == "garbage":
        path.write_bytes(b"not a database" * 1000)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2 + 100)
    elif damage == "version":
        sqlite3.connect(path).execute("PRAGMA user_version = 999").connection.close()
    elif damage == "tables":
        sqlite3.connect(path, isolation_level=None).execute("DROP TABLE steps").connection.close()
    else:
        path.unlink()
        path.mkdir()
    with open_index(home) as index:
        assert index.list_runs() == before


def test_without_a_place_to_write_it_works_in_memory(home: Path) -> None:
    with Index(home / "missing" / NAME, home / "runs") as index:
        assert index.list_runs()[0].denied == 271


def test_a_log_that_was_replaced_is_indexed_afresh(home: Path) -> None:
    with open_index(home) as index:
        assert index.list_runs()[0].denied == 271
        shutil.rmtree(home / "runs" / "r-1")
        assert index.list_runs() == []
        with Ledger.create(home / "runs", "r-1") as ledger:
            ledger.append(started("r-1", 5))
        (row,) = index.list_runs()
        assert (row.denied, row.records, row.started_ns) == (0, 1, 5)


def test_a_changed_log_is_called_so_and_is_well_again_when_restored(home: Path) -> None:
    log = home / "runs" / "r-1" / "ledger.log"
    whole = log.read_bytes()
    with open_index(home) as index:
        log.write_bytes(whole.replace(b"10.0.8.77", b"10.0.9.77"))
        (row,) = index.list_runs()
        assert row.status == "changed"
        assert "record" in row.detail
        log.write_bytes(whole)
        (row,) = index.list_runs()
        assert (row.status, row.denied) == ("finished", 271)


def test_the_newest_run_comes_first_and_a_dead_writer_shows(tmp_path: Path) -> None:
    for run, t_ns in (("b", 10), ("a", 30), ("c", 20)):
        with Ledger.create(tmp_path / "runs", run) as ledger:
            ledger.append(started(run, t_ns))
    with open_index(tmp_path) as index:
        assert [row.run for row in index.list_runs()] == ["a", "c", "b"]
        assert {row.status for row in index.list_runs()} == {"interrupted"}
        with pytest.raises(RecordError, match="no run"):
            index.run_summary("zz")


def test_findings_of_one_run_and_of_all(home: Path) -> None:
    with Ledger.create(home / "runs", "r-2") as ledger:
        ledger.append_many(tell_incident("r-2"))
    with open_index(home) as index:
        assert {finding.run for finding in index.list_findings()} == {"r-1", "r-2"}
        assert len(index.list_findings("r-2")) == 6
