"""Reading mounts and memberships: text in, facts out."""

import pytest

from vallum.core.limits import Limits
from vallum.sandbox.cgroup.detect import list_places
from vallum.sandbox.cgroup.files import parse_pairs
from vallum.sandbox.cgroup.group2 import parse_leaf
from vallum.sandbox.cgroup.mounts import Mount, parse_membership, parse_mountinfo
from vallum.sandbox.cgroup.quota1 import missing_quota

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
39 31 0:36 / /sys/fs/cgroup/pids ro,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 /docker/a\\040b /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
42 31 0:38 / /mnt/again rw,relatime - cgroup2 cgroup2 rw
"""


def test_mounts_are_found_with_their_root_and_read_only_ones_are_not():
    found = parse_mountinfo(HYBRID)
    assert found.unified == Mount(point="/sys/fs/cgroup/unified", root="/docker/a b")
    assert set(found.v1) == {"cpu", "cpuacct", "memory"}
    assert found.v1["cpu"].point == found.v1["cpuacct"].point == "/sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize("text", ["", "garbage\n", "1 2 3 - cgroup2\n", " - - - \n" * 3])
def test_lines_that_are_none_are_skipped(text):
    assert parse_mountinfo(text).unified is None


def test_a_mount_names_and_finds_its_groups():
    whole, part = Mount(point="/cg", root="/"), Mount(point="/cg", root="/docker/x")
    assert whole.path_of("/a/b") == "/cg/a/b"
    assert whole.path_of("/") == "/cg"
    assert whole.name_of("/cg/a") == "/a"
    assert part.path_of("/docker/x/a") == "/cg/a"
    assert part.path_of("/docker/x") == "/cg"
    assert part.path_of("/docker/xy") is None
    assert part.name_of("/cg/a") == "/docker/x/a"


def test_membership_is_read_per_hierarchy():
    text = "9:name=systemd:/init.scope\n5:cpu,cpuacct:/a\n4:freezer:/f:with:colons\n0::/v/cell/s3 (deleted)\n"
    assert parse_membership(text) == "/v/cell/s3"
    assert parse_membership(text, "cpuacct") == "/a"
    assert parse_membership(text, "freezer") == "/f:with:colons"
    assert parse_membership(text, "memory") is None
    assert parse_membership("") is None


@pytest.mark.parametrize(
    ("name", "step"),
    [("s0", 0), ("s12", 12), ("s12.3", 12), ("init", None), ("s", None), ("s1/x", None), ("s1.x", None), ("t1", None)],
)
def test_leaf_names(name, step):
    assert parse_leaf(name) == step


def test_pairs_skip_what_is_no_number():
    assert parse_pairs("a 1\nb max\nc\nd 2\n") == {"a": 1, "d": 2}


def test_places_are_tried_best_first_and_only_once():
    unified = Mount(point="/cg", root="/")
    assert list_places(unified, None, "/user.slice/x", 1000) == [
        "/cg",
        "/cg/user.slice/x",
        "/cg/user.slice/user-1000.slice/user@1000.service",
    ]
    assert list_places(unified, None, "/", 0)[0] == "/cg"
    assert list_places(unified, "/cg/mine", "/", 0) == ["/cg/mine"]
    assert list_places(unified, "/elsewhere", "/", 0) == []
    assert list_places(unified, "/cg/../etc", "/", 0) == []


def test_a_quota_that_no_controller_carries_is_named():
    assert missing_quota(Limits(cpus=None), frozenset({"memory", "pids"})) is None
    assert missing_quota(Limits(cpus=1), frozenset({"cpu", "memory", "pids"})) is None
    assert "cpu" in str(missing_quota(Limits(cpus=1), frozenset({"memory", "pids"})))
    assert "pids" in str(missing_quota(Limits(pids=9), frozenset({"memory"})))
