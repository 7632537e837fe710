"""A writer is killed at random moments: what it acknowledged is there, what it did not finish is cut and noted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vallum.core.events import LedgerNote, ToolCall
from vallum.record.ledger import Ledger
from vallum.record.reader import read_records
from vallum.record.verify import verify

ROUNDS = 60

# One process forks a writer a round, so that a round costs a fork and not a start of Python. A writer
# tells each acknowledged id over a pipe; its own death is the only end it knows.
WRITERS = """
import os, sys
from pathlib import Path
from vallum.core.events import ToolCall
from vallum.core.scope import BY_NODE, Scope
from vallum.record.ledger import Ledger

runs = Path(sys.argv[1])

def write(seed):
    ledger = Ledger.create(runs, "r1") if not (runs / "r1").exists() else Ledger.open(runs, "r1")
    number = 0
    while True:
        number += 1
        size = (17, 300, 9000, 60000)[(number * 7 + seed) % 13 % 4]
        event = ToolCall(t_ns=number, mono_ns=seed, scope=Scope(run="r1"), attribution=BY_NODE, name="exec", arguments="a" * size)
        if number % 5 == 0:
            ids = ledger.append_many([event] * 3)
        else:
            ids = [ledger.append(event)]
        if number % 40 == 0:
            ledger.sync()
        os.write(1, b"".join(b"%d %d\\n" % (i, seed) for i in ids))

for order in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            write(int(order))
        finally:
            os._exit(1)
    os.write(2, b"%d\\n" % child)
    os.waitpid(child, 0)
    os.write(2, b"gone\\n")
"""


def ledger_line(log: Path) -> bytes:
    with log.open("rb") as file:
        return file.readline() or b"0" * 64 + b" {}\n"


@pytest.mark.timeout(120)
def test_kill_at_random_moments_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    randomness = random.Random(20261121)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    mother = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    os.close(writer)
    assert mother.stdin is not None
    assert mother.stderr is not None
    said = mother.stderr
    acknowledged: dict[int, int] = {}
    heard = b""

    def listen() -> None:
        nonlocal heard
        while True:
            try:
                data = os.read(reader, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            *whole, heard = (heard + data).split(b"\n")
            for line in whole:
                number, seed = line.split()
                assert int(number) not in acknowledged
                acknowledged[int(number)] = int(seed)

    try:
        for round_ in range(ROUNDS):
            mother.stdin.write(b"%d\n" % round_)
            child = int(said.readline())
            end = time.monotonic() + randomness.uniform(0.0, 0.06)
            while time.monotonic() < end:
                listen()
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            assert said.readline() == b"gone\n"
            listen()
            assert heard == b""
            log = tmp_path / "r1" / "ledger.log"
            if log.exists() and round_ % 4 == 0:
                # The kernel seldom tears one write(2); so that the repair is met for certain, some are torn here.
                whole = ledger_line(log)
                with log.open("ab") as file:
                    file.write(whole[: randomness.randrange(1, len(whole))])
            if log.exists() and round_ % 10 == 0:
                assert verify(tmp_path / "r1").count >= len(acknowledged)
    finally:
        mother.kill()
        mother.wait()
        os.close(reader)
        mother.stdin.close()
        said.close()

    check_what_is_there(tmp_path, acknowledged)


def check_what_is_there(runs: Path, acknowledged: dict[int, int]) -> None:
    Ledger.open(runs, "r1").close()
    assert verify(runs / "r1").closed
    found: dict[int, int] = {}
    notes = 0
    for record in read_records(runs / "r1"):
        if isinstance(record.event, ToolCall):
            found[record.id] = record.event.mono_ns
        elif isinstance(record.event, LedgerNote):
            notes += 1
    assert len(acknowledged) > ROUNDS
    assert {number: found.get(number) for number in acknowledged} == acknowledged
    torn = [entry for entry in (runs / "r1").iterdir() if entry.name.startswith("torn-")]
    assert notes == len(torn) > 2
