"""Tampering: whatever is done to a log, the first bad record is named."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vallum.core.errors import RecordError, VerificationError
from vallum.core.events import ToolCall
from vallum.core.scope import BY_NODE, Scope
from vallum.record.chain import GENESIS, link
from vallum.record.ledger import Ledger
from vallum.record.reader import read_lines, read_records
from vallum.record.verify import verify

COUNT = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with Ledger.create(runs, "r1") as ledger:
        for number in range(COUNT):
            ledger.append(
                ToolCall(
                    t_ns=number,
                    mono_ns=number,
                    scope=Scope(run="r1", episode="e", step=number),
                    attribution=BY_NODE,
                    name="exec",
                    arguments=f"call {number}",
                )
            )
    return runs / "r1"


def tampered(original: Path, tmp_path: Path, data: bytes) -> Path:
    copy = tmp_path / "r1"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    (copy / "ledger.log").write_bytes(data)
    return copy


def failure(directory: Path) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verify(directory)
    assert caught.value.exit_code == 4
    return caught.value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_names_the_record_it_is_in(original: Path, tmp_path: Path, where: float, bit: int) -> None:
    data = bytearray((original / "ledger.log").read_bytes())
    offset = int(where * len(data))
    record = data[:offset].count(b"\n")
    data[offset] ^= 1 << bit
    copy = tampered(original, tmp_path, bytes(data))
    error = failure(copy)
    assert error.seq == record
    assert f"record {record} (line {record + 1}, byte " in str(error)
    handed_on: list[int] = []
    with contextlib.suppress(RecordError):
        handed_on.extend(record.id for record in read_records(copy))
    assert len(handed_on) <= record


def lines(original: Path) -> list[bytes]:
    return (original / "ledger.log").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("at", range(COUNT))
def test_edited(original: Path, tmp_path: Path, at: int) -> None:
    parts = lines(original)
    parts[at] = parts[at].replace(b'"call ', b'"CALL ')
    error = failure(tampered(original, tmp_path, b"".join(parts)))
    assert error.seq == at
    assert "edited" in str(error)


def test_edited_hash(original: Path, tmp_path: Path) -> None:
    parts = lines(original)
    parts[3] = (b"0" if parts[3][:1] != b"0" else b"1") + parts[3][1:]
    error = failure(tampered(original, tmp_path, b"".join(parts)))
    assert error.seq == 3
    assert "hash was changed" in str(error)


def test_removed(original: Path, tmp_path: Path) -> None:
    for at in range(COUNT - 1):
        parts = lines(original)
        del parts[at]
        error = failure(tampered(original, tmp_path, b"".join(parts)))
        assert error.seq == at
        assert "removed" in str(error)


def test_reordered(original: Path, tmp_path: Path) -> None:
    for at in range(COUNT - 1):
        parts = lines(original)
        parts[at], parts[at + 1] = parts[at + 1], parts[at]
        error = failure(tampered(original, tmp_path, b"".join(parts)))
        assert error.seq == at
        assert "reordered" in str(error)


def test_inserted(original: Path, tmp_path: Path) -> None:
    forged = lines(original)[0].replace(b"call 0", b"call X")
    for at in range(1, COUNT):
        parts = lines(original)
        parts.insert(at, forged)
        error = failure(tampered(original, tmp_path, b"".join(parts)))
        assert error.seq == at
        assert "inserted" in str(error)


def test_truncated_between_records(original: Path, tmp_path: Path) -> None:
    for left in range(COUNT):
        error = failure(tampered(original, tmp_path, b"".join(lines(original)[:left])))
        assert error.seq == left
        assert "truncated" in str(error)


def test_truncated_inside_a_record(original: Path, tmp_path: Path) -> None:
    data = (original / "ledger.log").read_bytes()
    for length in range(1, len(data), 37):
        assert failure(tampered(original, tmp_path, data[:length])).seq == data[:length].count(b"\n")


def test_added_after_the_end(original: Path, tmp_path: Path) -> None:
    parts = lines(original)
    payload = parts[-1][65:-1]
    parts.append(link(parts[-1][:64], payload) + b" " + payload + b"\n")
    error = failure(tampered(original, tmp_path, b"".join(parts)))
    assert error.seq == COUNT
    assert "after" in str(error)
    assert failure(tampered(original, tmp_path, b"".join(lines(original)) + b"abc")).seq == COUNT


def test_a_chain_recomputed_from_end_to_end_is_caught_by_the_anchor(original: Path, tmp_path: Path) -> None:
    head, forged = GENESIS, b""
    for raw in lines(original):
        payload = raw[65:-1].replace(b"call 2", b"call X")
        head = link(head, payload)
        forged += head + b" " + payload + b"\n"
    assert "rewritten" in str(failure(tampered(original, tmp_path, forged)))


def test_the_log_of_another_run_in_its_place(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "r2")
    error = failure(tmp_path / "r2")
    assert error.seq == 0
    assert "'r1'" in str(error)
    assert verify(tmp_path / "r2", run="r1").count == COUNT


@pytest.mark.parametrize("anchor", [b"", b"{}", b"[1]", b'{"count":-1,"head":"","bytes":0,"closed":true}', b"\xff\xfe"])
def test_a_damaged_anchor_is_said(original: Path, tmp_path: Path, anchor: bytes) -> None:
    copy = tampered(original, tmp_path, (original / "ledger.log").read_bytes())
    (copy / "head.json").write_bytes(anchor)
    assert "anchor" in str(failure(copy))


def test_without_its_anchor_a_run_is_said_to_be_unclosed(original: Path, tmp_path: Path) -> None:
    copy = tampered(original, tmp_path, (original / "ledger.log").read_bytes())
    (copy / "head.json").unlink()
    result = verify(copy)
    assert not result.closed
    assert result.anchored == 0
    assert "cannot be told" in result.notes[0]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(original: Path, tmp_path: Path, data: bytes) -> None:
    copy = tampered(original, tmp_path, data)
    (copy / "head.json").unlink()
    try:
        assert list(read_lines(copy)) == []
        assert verify(copy).count == 0
    except VerificationError as error:
        assert error.seq == 0


def test_an_unreadable_record_says_what_to_do(original: Path, tmp_path: Path) -> None:
    copy = tampered(original, tmp_path, b"")
    os.unlink(copy / "ledger.log")
    with pytest.raises(RecordError, match="vallum runs"):
        verify(copy)
