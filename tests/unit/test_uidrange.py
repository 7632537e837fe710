"""Uid ranges of cells: never shared, freed by a crash."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.errors import SandboxError
from vallum.sandbox.uidrange import (
    FIRST_ID,
    RANGES,
    IdRange,
    UidRanges,
    find_subids,
    list_free,
    parse_ids,
    parse_subids,
    read_taken,
)

SUBUID = "ann:100000:65536\nbob:165536:1000\n1003:231072:65536\nbad\nx:y:z\nann:-1:5\n#c:1:0\n"


def test_subids_are_parsed_and_found():
    assert len(parse_subids(SUBUID)) == 3
    assert find_subids(SUBUID, name="ann", uid=1001) == IdRange(100000, 65536)
    assert find_subids(SUBUID, name="bob", uid=1002) is None
    assert find_subids(SUBUID, name="cid", uid=1003) == IdRange(231072, 65536)
    assert parse_ids("root:x:0:0::/:\nbroken\na:b:c\nz:x:70000:1\n") == [0, 70000]


@given(
    st.lists(st.builds(IdRange, st.integers(0, 2**32), st.integers(1, 2**28)), max_size=8), st.integers(0, RANGES - 1)
)
def test_free_ranges_touch_nothing_that_is_taken(taken, start):
    free = list(list_free(taken, start=start))
    assert len(free) == len(set(free))
    for first in free[:50]:
        assert FIRST_ID <= first < FIRST_ID + RANGES * 65536
        assert not any(one.overlaps(IdRange(first, 65536)) for one in taken)


def test_there_are_at_least_4096_and_every_start_reaches_all():
    assert len(list(list_free([], start=17))) == RANGES >= 4096


def test_what_others_have_is_read_from_etc(tmp_path):
    (tmp_path / "subuid").write_text(f"ann:{FIRST_ID}:65536\n")
    (tmp_path / "passwd").write_text(f"deep:x:{FIRST_ID + 65536 + 5}:0::/:\n")
    free = list(list_free(read_taken(tmp_path)))
    assert len(free) == RANGES - 2
    assert free[0] == FIRST_ID + 2 * 65536


def test_leases_are_unique_across_allocators_and_come_back(tmp_path):
    one, two = UidRanges(tmp_path / "locks", tmp_path), UidRanges(tmp_path / "locks", tmp_path)
    leases = [allocator.lease() for _ in range(40) for allocator in (one, two)]
    assert len({lease.ids.first for lease in leases}) == 80
    assert all(lease.ids.count == 65536 for lease in leases)
    for lease in leases:
        lease.release()
        lease.release()


def test_a_range_that_was_given_back_can_be_taken_again(tmp_path):
    (tmp_path / "subuid").write_text(f"ann:{FIRST_ID + 65536}:{(RANGES - 1) * 65536}\n")
    ranges = UidRanges(tmp_path / "locks", tmp_path)
    for _ in range(3):
        base = ranges.take()
        assert base == FIRST_ID
        ranges.give_back(base)


def test_when_all_are_taken_it_says_so_and_a_crash_frees_them(tmp_path):
    taken = FIRST_ID + 65536
    (tmp_path / "subuid").write_text(f"ann:{taken}:{(RANGES - 1) * 65536}\n")
    code = (
        "import sys, pathlib\n"
        "from vallum.sandbox.uidrange import UidRanges\n"
        "p = pathlib.Path(sys.argv[1])\n"
        "lease = UidRanges(p / 'locks', p).lease()\n"
        "print(lease.ids.first, flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert int(holder.stdout.readline()) == FIRST_ID
        ranges = UidRanges(tmp_path / "locks", tmp_path)
        with pytest.raises(SandboxError, match="in use"):
            ranges.lease()
    finally:
        holder.kill()
        holder.communicate()
    lease = ranges.lease()
    assert lease.ids.first == FIRST_ID
    lease.release()


def test_a_lock_directory_that_others_may_write_is_refused(tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(SandboxError, match="loose"):
        UidRanges(loose, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SandboxError, match="link"):
        UidRanges(tmp_path / "link", tmp_path)


def test_locks_are_not_inherited(tmp_path):
    lease = UidRanges(tmp_path / "locks", tmp_path).lease()
    assert not os.get_inheritable(lease.lock_fd)
    lease.release()
