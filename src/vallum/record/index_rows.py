"""What one record adds to the index: the tables, and the one function that fills them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

from vallum.core.events import (
    DnsQuery,
    EpisodeEnded,
    EpisodeStarted,
    Event,
    Finding,
    Flow,
    PacketDropped,
    ProcessStarted,
    Record,
    ResourceSample,
    RunEnded,
    RunStarted,
    StepClosed,
    StepOpened,
    ToolCall,
)
from vallum.record.calls import describe_call

VERSION = 1
"""Of the tables; another one means: make the index anew."""

TABLES = ("runs", "episodes", "steps", "flows", "queries", "packets", "findings", "samples")

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  run TEXT PRIMARY KEY, inode INTEGER NOT NULL, offset INTEGER NOT NULL DEFAULT 0, records INTEGER NOT NULL DEFAULT 0,
  head BLOB NOT NULL, damage TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT '', started_ns INTEGER, last_ns INTEGER,
  command TEXT NOT NULL DEFAULT '[]', containment TEXT NOT NULL DEFAULT '', outcome TEXT NOT NULL DEFAULT '', exit_code INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS episodes (
  run TEXT, episode TEXT, sandbox TEXT, image TEXT, level TEXT, started_ns INTEGER, ended_ns INTEGER, reason TEXT, survivors INTEGER,
  PRIMARY KEY (run, episode)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS steps (
  run TEXT, episode TEXT, step INTEGER, first_id INTEGER NOT NULL, tool_call TEXT, cause TEXT NOT NULL DEFAULT '',
  command TEXT NOT NULL DEFAULT '', opened_ns INTEGER, closed_ns INTEGER, exit_code INTEGER, cpu_ns INTEGER, memory_peak_bytes INTEGER,
  processes INTEGER NOT NULL DEFAULT 0, denied INTEGER NOT NULL DEFAULT 0, findings INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (run, episode, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS flows (
  run TEXT, flow TEXT, id INTEGER, episode TEXT, step INTEGER, t_ns INTEGER, state TEXT, verdict TEXT, rule TEXT, dst_ip TEXT,
  dst_port INTEGER, dst_host TEXT, protocol TEXT, bytes_out INTEGER, bytes_in INTEGER, exe TEXT, argv TEXT,
  PRIMARY KEY (run, flow)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queries (
  run TEXT, id INTEGER, episode TEXT, step INTEGER, t_ns INTEGER, qname TEXT, qtype TEXT, verdict TEXT, rule TEXT, PRIMARY KEY (run, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packets (
  run TEXT, episode TEXT, step INTEGER, protocol TEXT, dst_ip TEXT, dst_port INTEGER, count INTEGER, first_ns INTEGER, last_ns INTEGER,
  PRIMARY KEY (run, episode, step, protocol, dst_ip, dst_port)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS findings (
  run TEXT, id INTEGER, t_ns INTEGER, episode TEXT, step INTEGER, detector TEXT, title TEXT, severity TEXT, attack TEXT, summary TEXT,
  evidence TEXT, PRIMARY KEY (run, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (run TEXT, episode TEXT, cpu_ns INTEGER, memory_peak_bytes INTEGER, PRIMARY KEY (run, episode)) WITHOUT ROWID;
"""
"""Step -1 stands for what could be charged to the cell only, the empty episode for what belongs to the run as a whole."""


def add_record(db: sqlite3.Connection, run: str, record: Record) -> None:
    """Add one record of ``run`` to the tables, inside the caller's transaction."""
    event = record.event
    db.execute(
        "UPDATE runs SET started_ns = coalesce(started_ns, ?1), last_ns = max(coalesce(last_ns, 0), ?1) WHERE run = ?2",
        (event.t_ns, run),
    )
    add = _ADD.get(type(event))
    if add is not None:
        add(db, run, record.id, event)


def _place(event: Event) -> tuple[str, int]:
    return event.scope.episode or "", -1 if event.scope.step is None else event.scope.step


def _touch_step(db: sqlite3.Connection, run: str, number: int, event: Event, sets: str, *values: Any) -> None:
    """Change the event's row in ``steps``, made first where there is none."""
    place = _place(event)
    db.execute("INSERT OR IGNORE INTO steps (run, episode, step, first_id) VALUES (?, ?, ?, ?)", (run, *place, number))
    db.execute(f"UPDATE steps SET {sets} WHERE run = ? AND episode = ? AND step = ?", (*values, run, *place))  # noqa: S608 - constants


def _run_started(db: sqlite3.Connection, run: str, number: int, event: RunStarted) -> None:
    # A resumed run starts again: the first start says what it was for.
    if number == 0:
        db.execute(
            "UPDATE runs SET command = ?, containment = ? WHERE run = ?",
            (json.dumps(event.command), event.containment, run),
        )
    db.execute("UPDATE runs SET outcome = '', exit_code = NULL WHERE run = ?", (run,))


def _run_ended(db: sqlite3.Connection, run: str, number: int, event: RunEnded) -> None:
    db.execute("UPDATE runs SET outcome = ?, exit_code = ? WHERE run = ?", (event.outcome, event.exit_code, run))


def _episode_started(db: sqlite3.Connection, run: str, number: int, event: EpisodeStarted) -> None:
    db.execute(
        "INSERT OR REPLACE INTO episodes (run, episode, sandbox, image, level, started_ns) VALUES (?, ?, ?, ?, ?, ?)",
        (run, event.scope.episode or "", event.sandbox, event.image, event.level, event.t_ns),
    )


def _episode_ended(db: sqlite3.Connection, run: str, number: int, event: EpisodeEnded) -> None:
    db.execute(
        "UPDATE episodes SET ended_ns = ?, reason = ?, survivors = ? WHERE run = ? AND episode = ?",
        (event.t_ns, event.reason, event.survivors, run, event.scope.episode or ""),
    )


def _step_opened(db: sqlite3.Connection, run: str, number: int, event: StepOpened) -> None:
    _touch_step(
        db,
        run,
        number,
        event,
        "tool_call = ?, cause = ?, opened_ns = ?",
        event.scope.tool_call,
        event.cause,
        event.t_ns,
    )


def _step_closed(db: sqlite3.Connection, run: str, number: int, event: StepClosed) -> None:
    _touch_step(
        db,
        run,
        number,
        event,
        "closed_ns = ?, exit_code = ?, cpu_ns = max(coalesce(cpu_ns, ?), coalesce(?, cpu_ns)), "
        "memory_peak_bytes = coalesce(?, memory_peak_bytes), processes = max(processes, ?)",
        event.t_ns,
        event.exit_code,
        event.cpu_ns,
        event.cpu_ns,
        event.memory_peak_bytes,
        event.processes or 0,
    )


def _tool_call(db: sqlite3.Connection, run: str, number: int, event: ToolCall) -> None:
    _touch_step(db, run, number, event, "command = CASE command WHEN '' THEN ? ELSE command END", describe_call(event))


def _process_started(db: sqlite3.Connection, run: str, number: int, event: ProcessStarted) -> None:
    _touch_step(db, run, number, event, "processes = processes + 1")


def _flow(db: sqlite3.Connection, run: str, number: int, event: Flow) -> None:
    episode, step = _place(event)
    process = event.process
    known = db.execute("SELECT state FROM flows WHERE run = ? AND flow = ?", (run, event.flow)).fetchone()
    if event.state == "denied" and known is None:
        _touch_step(db, run, number, event, "denied = denied + 1")
    db.execute(
        "INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, flow) DO UPDATE SET "
        "state = excluded.state, bytes_out = excluded.bytes_out, bytes_in = excluded.bytes_in, protocol = excluded.protocol",
        (
            run, event.flow, number, episode, step, event.t_ns, event.state, event.verdict, event.rule, event.dst_ip, event.dst_port,
            event.dst_host, event.protocol, event.bytes_out, event.bytes_in, process.exe if process else None,
            json.dumps(process.argv) if process else None,
        ),
    )  # fmt: skip


def _query(db: sqlite3.Connection, run: str, number: int, event: DnsQuery) -> None:
    if event.verdict == "deny":
        _touch_step(db, run, number, event, "denied = denied + 1")
    db.execute(
        "INSERT OR IGNORE INTO queries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (run, number, *_place(event), event.t_ns, event.qname, event.qtype, event.verdict, event.rule),
    )


def _packet(db: sqlite3.Connection, run: str, number: int, event: PacketDropped) -> None:
    if event.verdict == "deny":
        _touch_step(db, run, number, event, "denied = denied + 1")
    db.execute(
        "INSERT INTO packets VALUES (?, ?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT DO UPDATE SET count = count + 1, last_ns = excluded.last_ns",
        (
            run,
            *_place(event),
            event.protocol,
            event.dst_ip,
            -1 if event.dst_port is None else event.dst_port,
            event.t_ns,
            event.t_ns,
        ),
    )


def _finding(db: sqlite3.Connection, run: str, number: int, event: Finding) -> None:
    _touch_step(db, run, number, event, "findings = findings + 1")
    db.execute(
        "INSERT OR IGNORE INTO findings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            run, number, event.t_ns, event.scope.episode, event.scope.step, event.detector, event.title, event.severity,
            json.dumps(event.attack), event.summary, json.dumps(event.evidence),
        ),
    )  # fmt: skip


def _sample(db: sqlite3.Connection, run: str, number: int, event: ResourceSample) -> None:
    if event.scope.step is not None:
        _touch_step(
            db,
            run,
            number,
            event,
            "cpu_ns = max(coalesce(cpu_ns, ?), coalesce(?, cpu_ns)), memory_peak_bytes = coalesce(?, memory_peak_bytes)",
            event.cpu_ns,
            event.cpu_ns,
            event.memory_peak_bytes,
        )
    elif event.cpu_ns is not None:
        db.execute(
            "INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?)",
            (run, event.scope.episode or "", event.cpu_ns, event.memory_peak_bytes),
        )


_ADD: dict[type[Event], Callable[[sqlite3.Connection, str, int, Any], None]] = {
    RunStarted: _run_started,
    RunEnded: _run_ended,
    EpisodeStarted: _episode_started,
    EpisodeEnded: _episode_ended,
    StepOpened: _step_opened,
    StepClosed: _step_closed,
    ToolCall: _tool_call,
    ProcessStarted: _process_started,
    Flow: _flow,
    DnsQuery: _query,
    PacketDropped: _packet,
    Finding: _finding,
    ResourceSample: _sample,
}
