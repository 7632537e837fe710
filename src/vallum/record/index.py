"""An index over all runs: a view of the logs in SQLite that can be thrown away at any time.

Every reading first brings it up to date: of each log only what was appended since is read, and
checked against the chain. A log that shrank, was replaced, or does not continue what was indexed is
indexed afresh; a database that is damaged or of another version is made anew; where none can be
written (a full disk, somebody else's directory) one is made in memory. So reading never needs the
node, and the index never needs trust: who doubts it deletes it.

Not covered: a record changed in the part of a log that was indexed before. That is what ``verify`` is for.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from vallum.core.errors import RecordError, VerificationError
from vallum.record.chain import GENESIS, LOG, Position, read_anchor
from vallum.record.index_rows import SCHEMA, TABLES, VERSION, add_record
from vallum.record.reader import decode_line, is_live, list_ids, read_lines

NAME = "index.sqlite"


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run in a list."""

    run: str
    status: str
    """``running``; ``finished``, ``client_gone``, ``contained`` or ``node_stopped`` as the run's last event says;
    ``interrupted`` when its writer died; ``changed`` when the log is not what was written; ``unreadable``."""
    detail: str
    """Why it is changed or unreadable."""
    started_ns: int | None
    """Wall clock."""
    duration_ns: int | None
    """To its end, or to the newest event."""
    command: list[str]
    containment: str
    exit_code: int | None
    episodes: int
    steps: int
    processes: int
    denied: int
    """Attempts that were refused: connections, DNS queries, packets."""
    findings: int
    cpu_ns: int | None
    bytes_out: int
    """Payload bytes that left, of all flows."""
    bytes_in: int
    records: int


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a run. ``step`` is None for what could be charged to the cell only."""

    episode: str
    step: int | None
    tool_call: str | None
    cause: str
    command: str
    exit_code: int | None
    duration_ns: int | None
    cpu_ns: int | None
    memory_peak_bytes: int | None
    processes: int
    denied: int
    findings: int


class FindingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One finding."""

    run: str
    id: int
    t_ns: int
    episode: str | None
    step: int | None
    detector: str
    title: str
    severity: str
    attack: list[str]
    summary: str
    evidence: list[int]


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A run with its steps and findings."""

    run: RunRow
    steps: list[StepRow]
    findings: list[FindingRow]


class Index:
    """The index of one home. Several processes may use it at once."""

    def __init__(self, path: Path, runs: Path) -> None:
        self._runs = runs
        self._path = path
        self._db = self._open()

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def list_runs(self) -> list[RunRow]:
        """Every run, newest first.

        Raises:
            RecordError: the directory of the runs cannot be read.
        """
        with self._fresh(list_ids(self._runs)):
            rows = self._db.execute(f"{_RUNS} ORDER BY r.started_ns IS NULL, r.started_ns DESC, r.run DESC").fetchall()
            return [self._run_row(row) for row in rows]

    def run_summary(self, run: str) -> RunSummary:
        """One run by its full id.

        Raises:
            RecordError: there is none, or it cannot be read.
        """
        with self._fresh([run]):
            row = self._db.execute(f"{_RUNS} WHERE r.run = ?", (run,)).fetchone()
            if row is None:
                raise RecordError(f"there is no run {run} in {self._runs}: 'vallum runs' lists what there is")
            steps = [msgspec.convert(dict(step), StepRow) for step in self._db.execute(_STEPS, (run,))]
            return RunSummary(run=self._run_row(row), steps=steps, findings=self._findings(run))

    def list_findings(self, run: str | None = None) -> list[FindingRow]:
        """Findings of one run, or of all, newest run first, in the order they were made.

        Raises:
            RecordError: the directory of the runs cannot be read.
        """
        with self._fresh([run] if run is not None else list_ids(self._runs)):
            return self._findings(run)

    def _findings(self, run: str | None) -> list[FindingRow]:
        where = "WHERE f.run = ?" if run is not None else ""
        rows = self._db.execute(
            f"SELECT f.* FROM findings f JOIN runs r USING (run) {where} ORDER BY r.started_ns DESC, f.run DESC, f.id",  # noqa: S608 - constants
            (run,) if run is not None else (),
        )
        return [
            msgspec.convert(
                dict(row)
                | {"attack": msgspec.json.decode(row["attack"]), "evidence": msgspec.json.decode(row["evidence"])},
                FindingRow,
            )
            for row in rows
        ]

    def _run_row(self, row: sqlite3.Row) -> RunRow:
        values: dict[str, Any] = dict(row)
        values["command"] = msgspec.json.decode(values["command"])
        values["status"] = self._status(values.pop("outcome"), values.pop("damage"), values["run"])
        return msgspec.convert(values, RunRow)

    def _status(self, outcome: str, damage: str, run: str) -> str:
        if damage:
            return damage
        directory = self._runs / run
        try:
            if is_live(directory):
                return "running"
            anchor = read_anchor(directory)
        except VerificationError:
            return "changed"
        except RecordError:
            return "unreadable"
        return outcome if outcome and anchor is not None and anchor.closed else "interrupted"

    # ---- keeping it true ----

    def _open(self) -> sqlite3.Connection:
        for attempt in (1, 2):
            try:
                return _connect(self._path)
            except sqlite3.OperationalError:
                break  # cannot be opened or written here, or is held by another: do without a file
            except sqlite3.DatabaseError:
                if attempt == 1:
                    _discard(self._path)
        return _connect(None)

    @contextlib.contextmanager
    def _fresh(self, runs: list[str]) -> Iterator[None]:
        """Bring the index up to date with the logs of ``runs``; on damage start over, at last in memory."""
        try:
            self._refresh(runs)
        except sqlite3.OperationalError:
            self._db.close()
            self._db = _connect(None)
            self._refresh(runs)
        except sqlite3.DatabaseError:
            self._db.close()
            _discard(self._path)
            self._db = self._open()
            self._refresh(runs)
        yield

    def _refresh(self, runs: list[str]) -> None:
        for (run,) in self._db.execute("SELECT run FROM runs").fetchall():
            if not (self._runs / run / LOG).is_file():
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._drop(run)
        for run in runs:
            try:
                status = (self._runs / run / LOG).stat()
            except FileNotFoundError:
                continue
            row = self._db.execute("SELECT inode, offset, damage FROM runs WHERE run = ?", (run,)).fetchone()
            if row is None or tuple(row) != (status.st_ino, status.st_size, ""):
                with self._db:
                    # Others may be doing the same: where to go on is asked again with the write lock held.
                    self._db.execute("BEGIN IMMEDIATE")
                    self._extend(run, status)

    def _extend(self, run: str, status: os.stat_result) -> None:
        """Index what was appended; all of it when the log does not continue what was indexed."""
        row = self._db.execute("SELECT * FROM runs WHERE run = ?", (run,)).fetchone()
        if row is not None and (row["inode"] != status.st_ino or row["offset"] > status.st_size):
            self._drop(run)
            row = None
        start = Position(row["offset"], row["records"], row["head"]) if row is not None else Position()
        if not self._add(run, status.st_ino, start) and start.count:
            self._drop(run)
            self._add(run, status.st_ino, Position())

    def _add(self, run: str, inode: int, start: Position) -> bool:
        """Index what follows ``start``. False when the log does not continue there or cannot be read."""
        directory = self._runs / run
        at, damage, detail = start, "", ""
        self._db.execute("INSERT OR IGNORE INTO runs (run, inode, head) VALUES (?, ?, ?)", (run, inode, GENESIS))
        try:
            for line in read_lines(directory, start=start):
                add_record(self._db, run, decode_line(line, directory))
                at = line.after
        except VerificationError as error:
            damage, detail = "changed", str(error)
        except RecordError as error:
            damage, detail = "unreadable", str(error)
        self._db.execute(
            "UPDATE runs SET inode = ?, offset = ?, records = ?, head = ?, damage = ?, detail = ? WHERE run = ?",
            (inode, at.offset, at.count, at.head, damage, detail, run),
        )
        return not damage

    def _drop(self, run: str) -> None:
        for table in TABLES:
            self._db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))  # noqa: S608 - constants


def _connect(path: Path | None) -> sqlite3.Connection:
    """A database with our tables; in memory when ``path`` is None.

    Raises:
        sqlite3.OperationalError: it cannot be opened or written.
        sqlite3.DatabaseError: it is damaged or of another version.
    """
    db = sqlite3.connect(":memory:" if path is None else str(path), timeout=5, isolation_level=None)
    try:
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"version {version}")
        # A view needs no durability: when it is lost, it is made again.
        db.execute("PRAGMA synchronous = OFF")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version == VERSION and not tables.issuperset(TABLES):
            raise sqlite3.DatabaseError("tables are missing")
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        if path is not None:
            path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db


def _discard(path: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


_RUNS = """
SELECT r.run, r.outcome, r.damage, r.detail, r.started_ns, r.last_ns - r.started_ns AS duration_ns, r.command, r.containment,
  r.exit_code, r.records,
  (SELECT count(*) FROM episodes e WHERE e.run = r.run) AS episodes,
  (SELECT count(*) FROM steps s WHERE s.run = r.run AND s.step >= 0) AS steps,
  (SELECT coalesce(sum(s.processes), 0) FROM steps s WHERE s.run = r.run) AS processes,
  (SELECT coalesce(sum(s.denied), 0) FROM steps s WHERE s.run = r.run) AS denied,
  (SELECT count(*) FROM findings f WHERE f.run = r.run) AS findings,
  (SELECT sum(cpu) FROM (
     SELECT max(cpu) AS cpu FROM (
       SELECT episode, sum(cpu_ns) AS cpu FROM steps s WHERE s.run = r.run GROUP BY episode
       UNION ALL SELECT episode, cpu_ns FROM samples a WHERE a.run = r.run
     ) GROUP BY episode)) AS cpu_ns,
  (SELECT coalesce(sum(w.bytes_out), 0) FROM flows w WHERE w.run = r.run) AS bytes_out,
  (SELECT coalesce(sum(w.bytes_in), 0) FROM flows w WHERE w.run = r.run) AS bytes_in
FROM runs r
"""

_STEPS = """
SELECT episode, CASE WHEN step >= 0 THEN step END AS step, tool_call, cause, command, exit_code, closed_ns - opened_ns AS duration_ns,
  cpu_ns, memory_peak_bytes, processes, denied, findings
FROM steps WHERE run = ? ORDER BY first_id, step
"""
