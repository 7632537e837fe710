"""The ledger: what was acknowledged is there, what is there was written by it, and nothing else passes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vallum.core.errors import InvalidInput, RecordError, VerificationError
from vallum.core.events import DnsQuery, LedgerNote, ProcessExited, ToolCall, decode, encode
from vallum.core.scope import BY_NODE, Attribution, Scope
from vallum.record.chain import read_anchor
from vallum.record.ledger import Ledger
from vallum.record.reader import find_run, is_live, list_ids, read_records
from vallum.record.verify import verify


def call(run: str, number: int, text: str = "x") -> ToolCall:
    return ToolCall(
        t_ns=number,
        mono_ns=number,
        scope=Scope(run=run, episode="e", step=number),
        attribution=BY_NODE,
        name="exec",
        arguments=text,
    )


def write(runs: Path, run: str = "r1", count: int = 5) -> Path:
    with Ledger.create(runs, run) as ledger:
        for number in range(count):
            assert ledger.append(call(run, number, f"call {number}")) == number
    return runs / run


def test_round_trip_and_chain_that_sha256sum_can_follow(tmp_path: Path) -> None:
    directory = write(tmp_path)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "ledger.log").stat().st_mode) == 0o600
    head = "0" * 64
    for number, raw in enumerate((directory / "ledger.log").read_bytes().splitlines()):
        stated, payload = raw[:64].decode(), raw[65:]
        assert hashlib.sha256(head.encode() + b"\n" + payload).hexdigest() == stated
        assert json.loads(payload)["scope"]["step"] == number
        head = stated
    assert [r.event for r in read_records(directory)] == [call("r1", n, f"call {n}") for n in range(5)]
    result = verify(directory)
    assert (result.count, result.head, result.closed, result.anchored, result.notes) == (5, head, True, 5, [])


def test_append_many_is_one_chain_with_append(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1") as ledger:
        assert ledger.append(call("r1", 0)) == 0
        assert list(ledger.append_many(call("r1", n) for n in range(1, 4))) == [1, 2, 3]
        assert len(ledger.append_many([])) == 0
        assert ledger.append(call("r1", 4)) == 4
    assert verify(tmp_path / "r1").count == 5


def test_events_of_another_run_or_of_broken_text_are_refused_and_hurt_nothing(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1") as ledger:
        with pytest.raises(RecordError, match="run r2"):
            ledger.append(call("r2", 0))
        with pytest.raises(RecordError, match="not Unicode"):
            ledger.append(call("r1", 0, "\udc80"))
        with pytest.raises(RecordError, match="not Unicode"):
            ledger.append_many([call("r1", 0), call("r1", 1, "\udc80")])
        assert ledger.append(call("r1", 0)) == 0
    assert verify(tmp_path / "r1").count == 1


def test_there_is_one_writer(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, "r1")
    ledger.append(call("r1", 0))
    with pytest.raises(RecordError, match="another process"):
        Ledger.open(tmp_path, "r1")
    with pytest.raises(RecordError, match="already"):
        Ledger.create(tmp_path, "r1")
    assert is_live(tmp_path / "r1")
    ledger.close()
    ledger.close()
    assert not is_live(tmp_path / "r1")
    with pytest.raises(RecordError, match="closed"):
        ledger.append(call("r1", 1))


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1"):
        seen = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True).stdout
        assert "ledger.log" not in seen
        assert "/r1" not in seen


def test_threads_share_one_chain(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1") as ledger:
        ids: list[int] = []
        threads = [
            threading.Thread(target=lambda: ids.extend(ledger.append(call("r1", n)) for n in range(200)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(ids) == list(range(800))
    assert verify(tmp_path / "r1").count == 800


def test_resume_after_an_orderly_close_says_so(tmp_path: Path) -> None:
    directory = write(tmp_path)
    with Ledger.open(tmp_path, "r1") as ledger:
        assert ledger.count == 6
        assert ledger.append(call("r1", 9)) == 6
        assert not verify(directory).closed
    records = list(read_records(directory))
    assert isinstance(records[5].event, LedgerNote)
    assert "resumed" in records[5].event.note
    assert verify(directory).closed


def test_every_length_of_torn_tail_is_cut_kept_and_noted(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", count=3)
    (whole / "head.json").unlink()
    data = (whole / "ledger.log").read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for length in range(last + 1, len(data)):
        runs = tmp_path / f"cut-{length}"
        shutil.copytree(whole, runs / "r1")
        os.truncate(runs / "r1" / "ledger.log", length)
        assert any("unfinished" in note for note in verify(runs / "r1").notes)
        assert len(list(read_records(runs / "r1"))) == 2
        with Ledger.open(runs, "r1") as ledger:
            assert ledger.count == 3
            assert ledger.append(call("r1", 7)) == 3
        assert (runs / "r1" / f"torn-{last}").read_bytes() == data[last:length]
        result = verify(runs / "r1")
        assert result.closed
        assert result.count == 4
        assert f"torn-{last}" in result.notes[0]


def test_a_last_record_that_loss_of_power_garbled_is_cut(tmp_path: Path) -> None:
    directory = write(tmp_path, count=3)
    (directory / "head.json").unlink()
    log = directory / "ledger.log"
    data = log.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for garbled in (bytes(len(data) - last), b"\0" * (len(data) - last - 1) + b"\n"):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(directory, tmp_path / "again" / "r1")
        (tmp_path / "again" / "r1" / "ledger.log").write_bytes(data[:last] + garbled)
        Ledger.open(tmp_path / "again", "r1").close()
        assert verify(tmp_path / "again" / "r1").count == 3


def test_a_crash_in_the_middle_of_the_repair_is_repaired(tmp_path: Path) -> None:
    directory = write(tmp_path, count=2)
    (directory / "head.json").unlink()
    size = (directory / "ledger.log").stat().st_size
    (directory / f"torn-{size}").write_bytes(b"saved, cut, but not yet noted")
    Ledger.open(tmp_path, "r1").close()
    assert f"torn-{size}" in verify(directory).notes[0]
    Ledger.open(tmp_path, "r1").close()
    assert sum("torn-" in note for note in verify(directory).notes) == 1


def test_a_changed_log_is_not_resumed_and_left_as_it_is(tmp_path: Path) -> None:
    directory = write(tmp_path)
    log = directory / "ledger.log"
    data = log.read_bytes().replace(b"call 2", b"call X")
    log.write_bytes(data)
    with pytest.raises(VerificationError) as caught:
        Ledger.open(tmp_path, "r1")
    assert caught.value.seq == 2
    assert log.read_bytes() == data


def test_a_log_shorter_than_its_anchor_is_not_resumed(tmp_path: Path) -> None:
    directory = write(tmp_path)
    os.truncate(directory / "ledger.log", (directory / "ledger.log").stat().st_size - 7)
    with pytest.raises(VerificationError, match="truncated"):
        Ledger.open(tmp_path, "r1")


@pytest.mark.parametrize("kind", ["link", "hard link", "directory", "fifo", "missing"])
def test_what_is_no_log_is_refused(tmp_path: Path, kind: str) -> None:
    directory = write(tmp_path)
    log = directory / "ledger.log"
    target = tmp_path / "elsewhere"
    if kind == "hard link":
        os.link(log, target)
    else:
        log.rename(target)
    if kind == "link":
        log.symlink_to(target)
    elif kind == "directory":
        log.mkdir()
    elif kind == "fifo":
        os.mkfifo(log)
    with pytest.raises(RecordError):
        Ledger.open(tmp_path, "r1")
    if kind != "hard link":
        with pytest.raises(RecordError):
            verify(directory)


def test_ids_that_would_leave_the_directory_are_refused(tmp_path: Path) -> None:
    for run in ("../x", "", "a/b", ".hidden", "x" * 65):
        with pytest.raises(InvalidInput):
            Ledger.create(tmp_path, run)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_ledger_and_leaves_whole_records(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse (and first shorten) writes, as a full disk does."""
    script = """
import resource, signal, sys
from pathlib import Path
from vallum.core.errors import RecordError
from vallum.core.events import ToolCall
from vallum.core.scope import BY_NODE, Scope
from vallum.record.ledger import Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger.create(Path(sys.argv[1]), "r1")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
event = ToolCall(t_ns=1, mono_ns=1, scope=Scope(run="r1"), attribution=BY_NODE, name="exec", arguments="y" * 100)
acknowledged = 0
while True:
    try:
        ledger.append(event)
        acknowledged += 1
    except RecordError as error:
        assert "free space" in str(error), error
        break
small = ToolCall(t_ns=1, mono_ns=1, scope=Scope(run="r1"), attribution=BY_NODE, name="e", arguments="")
for refused in (lambda: ledger.append(small), ledger.sync):
    try:
        refused()
    except RecordError:
        continue
    sys.exit("went on after a failure")
ledger.close()
print(acknowledged)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = verify(tmp_path / "r1")
    assert result.count == int(done.stdout) > 3
    assert not result.closed
    assert not any("unfinished" in note for note in result.notes)
    with Ledger.open(tmp_path, "r1") as ledger:
        assert ledger.count == result.count


def test_a_failed_batch_leaves_none_of_it(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, "r1")
    ledger.append(call("r1", 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RecordError):
            ledger.append_many(call("r1", n, "z" * 500) for n in range(50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with pytest.raises(RecordError):
        ledger.append(call("r1", 1))
    ledger.close()
    assert verify(tmp_path / "r1").count == 1


def test_syncing_beside_appending_leaves_a_true_anchor(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1") as ledger:
        over = threading.Event()

        def sync() -> None:
            while not over.is_set():
                ledger.sync()

        syncer = threading.Thread(target=sync)
        syncer.start()
        for number in range(300):
            ledger.append(call("r1", number))
            if number % 50 == 0:
                assert verify(tmp_path / "r1").count == number + 1
        over.set()
        syncer.join()
    assert verify(tmp_path / "r1").closed


def test_sync_moves_the_anchor(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, "r1") as ledger:
        ledger.append(call("r1", 0))
        assert read_anchor(tmp_path / "r1") is None
        ledger.sync()
        ledger.append(call("r1", 1))
        result = verify(tmp_path / "r1")
        assert (result.count, result.anchored, result.closed) == (2, 1, False)
        assert "at work" in result.notes[0]


def test_find_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no runs"):
        find_run(tmp_path / "none", "latest")
    for run, started in (("r-20-b", 30), ("r-20-a", 50), ("r-20", 40)):
        with Ledger.create(tmp_path, run) as ledger:
            ledger.append(call(run, started))
    (tmp_path / "stray").mkdir()
    assert list_ids(tmp_path) == ["r-20", "r-20-a", "r-20-b"]
    assert find_run(tmp_path, "r-20") == "r-20"
    assert find_run(tmp_path, "latest") == "r-20-a"
    assert find_run(tmp_path, "r-20-b") == "r-20-b"
    for ref in ("r-2", "", "zz", "../etc", "stray"):
        with pytest.raises(InvalidInput):
            find_run(tmp_path, ref)


def test_following_sees_what_is_appended_and_ends_with_the_writer(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, "r1")
    ledger.append(call("r1", 0))
    seen: list[int] = []
    reader = threading.Thread(target=lambda: seen.extend(r.id for r in read_records(tmp_path / "r1", follow=True)))
    reader.start()
    ledger.append_many(call("r1", n) for n in range(1, 50))
    ledger.close()
    reader.join(5)
    assert not reader.is_alive()
    assert seen == list(range(50))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
scopes = st.builds(
    Scope,
    run=st.just("r1"),
    episode=st.none() | text,
    step=st.none() | st.integers(0, 2**31),
    tool_call=st.none() | text,
)
base = {"t_ns": st.integers(0, 2**63 - 1), "mono_ns": st.integers(0, 2**63 - 1), "scope": scopes}
events = st.one_of(
    st.builds(ToolCall, **base, attribution=st.just(BY_NODE), name=text, arguments=text),
    st.builds(LedgerNote, **base, attribution=st.just(BY_NODE), note=text),
    st.builds(
        ProcessExited,
        **base,
        attribution=st.just(BY_NODE),
        pid=st.integers(1, 2**22),
        exit_code=st.none(),
        signal=st.integers(1, 64),
        sensor=text,
    ),
    st.builds(
        DnsQuery,
        **base,
        attribution=st.builds(Attribution, method=st.sampled_from(["cgroup", "netns"]), confidence=st.floats(0, 1)),
        qname=text,
        qtype=text,
        verdict=st.sampled_from(["allow", "deny"]),
        rule=text,
        reason=text,
        answers=st.lists(text, max_size=3),
        transport=st.sampled_from(["udp", "tcp"]),
        process=st.none(),
        decision_ns=st.integers(0, 2**40),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(events, min_size=1, max_size=8))
def test_any_event_comes_back_as_it_went_in(tmp_path: Path, written: list[ToolCall]) -> None:
    shutil.rmtree(tmp_path / "r1", ignore_errors=True)
    with Ledger.create(tmp_path, "r1") as ledger:
        ledger.append_many(written)
    assert [record.event for record in read_records(tmp_path / "r1")] == written
    assert verify(tmp_path / "r1").count == len(written)
    assert all(decode(encode(event)) == event for event in written)


def test_anchor_is_what_anyone_can_read(tmp_path: Path) -> None:
    directory = write(tmp_path)
    raw = msgspec.json.decode((directory / "head.json").read_bytes())
    assert raw == {
        "count": 5,
        "head": verify(directory).head,
        "bytes": (directory / "ledger.log").stat().st_size,
        "closed": True,
    }
