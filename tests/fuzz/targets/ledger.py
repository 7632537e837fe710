"""Logs of runs. One that is not byte for byte what was written never verifies, and fails by the documented errors.

The first byte: take the rest as a log, or as what happened to a log (where, which byte, how much of it is left).
"""

from __future__ import annotations

import atexit
import contextlib
import tempfile
from pathlib import Path

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import RecordError, VerificationError
from vallum.core.events import decode
from vallum.record.chain import ANCHOR, GENESIS, LOG, Anchor, link
from vallum.record.reader import read_records
from vallum.record.verify import verify

_folder = tempfile.TemporaryDirectory()
atexit.register(_folder.cleanup)
_run = Path(_folder.name) / "r"
_run.mkdir()


def _write() -> bytes:
    head, lines = GENESIS, []
    for number in range(4):
        note = {"kind": "ledger.note", "t_ns": number, "scope": {"run": "r"}, "note": "x"}
        payload = msgspec.json.encode(note)
        head = link(head, payload)
        lines.append(head + b" " + payload + b"\n")
    log = b"".join(lines)
    anchor = Anchor(count=4, head=head.decode(), bytes=len(log), closed=True)
    (_run / ANCHOR).write_bytes(msgspec.json.encode(anchor))
    return log


WRITTEN = _write()
(_run / LOG).write_bytes(WRITTEN)
verify(_run)
SEEDS = (b"\x00" + WRITTEN, b"\x01\x00\x10\x41\xff\xff", b"\x01\x00\x50\x20\x01\x00", b"\x02" + WRITTEN[65:130])


def fuzz(data: bytes) -> None:
    if len(data) < 2:
        return
    if data[0] % 3 == 2:
        with contextlib.suppress(*MALFORMED):
            decode(data[1:])
        return
    log = data[1:]
    if data[0] % 3 == 1:
        at = int.from_bytes(data[1:3], "big") % len(WRITTEN)
        end = len(WRITTEN) - int.from_bytes(data[4:6], "big") % 64
        log = (WRITTEN[:at] + data[3:4] + WRITTEN[at + 1 :])[:end] + data[6:]
    (_run / LOG).write_bytes(log)
    try:
        verify(_run)
        assert log == WRITTEN, "a log that was changed verifies"
    except (VerificationError, RecordError):
        assert log != WRITTEN
    try:
        for _ in read_records(_run):
            pass
    except RecordError:
        pass
