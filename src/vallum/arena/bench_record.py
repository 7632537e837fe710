"""What it costs to remember an event: the ledger next to SQLite and a plain file. Prints its figures as JSON.

``python -m vallum.arena.bench_record REPETITIONS DIRECTORY``. A process of its own: nothing that
drives a node may hold the writer of ledgers.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vallum.arena.figures import OURS, Figure, summarise
from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import Flow, Process, encode
from vallum.core.scope import Attribution, Scope
from vallum.record.ledger import Ledger

BATCH = 1000
ONE, MANY = "append one event, acknowledged", f"append {BATCH} events at once"


def make_event() -> Flow:
    """An event as the gateway gives it."""
    return Flow(
        t_ns=wall_ns(), mono_ns=mono_ns(), scope=Scope(run="r-bench", episode="e-0", step=7, tool_call="call_7"),
        attribution=Attribution(method="cgroup"), state="denied", flow="f-1", verdict="deny", rule="default-deny",
        reason="nothing grants 203.0.113.10:3333", dst_ip="203.0.113.10", dst_port=3333, dst_host=None, protocol="stratum", bytes_out=0,
        bytes_in=0, process=Process(pid=4711, exe="/usr/bin/python3.11", argv=["python3", "worker.py", "-o", "203.0.113.10:3333"]), decision_ns=812_345,
    )  # fmt: skip


def _time(repetitions: int, action: Callable[[], object], per: float = 1.0) -> list[float]:
    """Microseconds of each repetition, divided by ``per``."""
    action()
    samples: list[float] = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        samples.append((time.perf_counter() - started) * 1e6 / per)
    return samples


def measure(repetitions: int, directory: Path) -> list[Figure]:
    """Every figure. Files are made in ``directory``."""
    event = make_event()
    batch = [event] * BATCH
    batches = max(5, repetitions // 100)
    with Ledger.create(directory, "r-bench") as ledger:
        figures = [
            summarise(ONE, OURS, "us", _time(repetitions, lambda: ledger.append(event))),
            summarise(MANY, OURS, "us each", _time(batches, lambda: ledger.append_many(batch), BATCH)),
        ]
    return figures + _measure_sqlite(repetitions, batches, directory) + _measure_file(repetitions, batches, directory)


def _measure_sqlite(repetitions: int, batches: int, directory: Path) -> list[Figure]:
    event, name = make_event(), "sqlite (WAL, synchronous=off), a commit each"
    base = sqlite3.connect(directory / "peer.sqlite", isolation_level=None)
    try:
        for statement in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=OFF",
            "CREATE TABLE events (id INTEGER PRIMARY KEY, json BLOB)",
        ):
            base.execute(statement)

        def insert_many() -> None:
            base.execute("BEGIN")
            base.executemany("INSERT INTO events (json) VALUES (?)", ((encode(event),) for _ in range(BATCH)))
            base.execute("COMMIT")

        return [
            summarise(
                ONE,
                name,
                "us",
                _time(repetitions, lambda: base.execute("INSERT INTO events (json) VALUES (?)", (encode(event),))),
            ),
            summarise(MANY, name, "us each", _time(batches, insert_many, BATCH)),
        ]
    finally:
        base.close()


def _measure_file(repetitions: int, batches: int, directory: Path) -> list[Figure]:
    event, name = make_event(), "plain JSONL, no chain"
    target = os.open(directory / "peer.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return [
            summarise(ONE, name, "us", _time(repetitions, lambda: os.write(target, encode(event) + b"\n"))),
            summarise(
                MANY,
                name,
                "us each",
                _time(batches, lambda: os.write(target, b"\n".join(encode(event) for _ in range(BATCH))), BATCH),
            ),
        ]
    finally:
        os.close(target)


def main() -> None:
    """Print the figures."""
    sys.stdout.buffer.write(msgspec.json.encode(measure(int(sys.argv[1]), Path(sys.argv[2]))) + b"\n")


if __name__ == "__main__":
    main()
