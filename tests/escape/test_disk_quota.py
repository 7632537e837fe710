"""A quota on disk: bytes and files, of all writable layers together, in a cell that goes on afterwards."""

import os

import pytest

import vallum
from vallum.core.limits import MIB

pytestmark = [pytest.mark.e2e]


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


async def test_bytes_and_files_have_an_end(node):
    assert node.tiers["disk.quota"] == "enforced"
    async with node.sandbox(limits=vallum.Limits(disk_bytes=32 * MIB)) as sb:
        full = await sb.exec(["sh", "-c", "head -c 100000000 /dev/zero > /tmp/big; stat -c %s /tmp/big"])
        assert b"No space left" in full.stderr
        assert 28 * MIB < int(full.stdout) <= 32 * MIB
        with pytest.raises(vallum.GuestFileError) as caught:
            await sb.write_file("/tmp/other", b"x" * MIB)
        assert caught.value.errno_name == "ENOSPC"
        many = await sb.exec(
            [
                "sh",
                "-c",
                "rm /tmp/big /tmp/other; mkdir /tmp/m; cd /tmp/m; i=0; while : > $i; do i=$((i+1)); done; echo $i",
            ],
            timeout_s=60,
        )
        assert b"No space left" in many.stderr
        assert 1000 < len((await sb.exec(["ls", "/tmp/m"])).stdout.split()) <= 4096
        assert (await sb.exec(["sh", "-c", "rm -r /tmp/m; echo again > /tmp/a; cat /tmp/a"])).stdout == b"again\n"


async def test_the_tree_is_as_without_a_quota(node):
    look = "stat -c '%a %u %g %n' / /tmp /usr /etc /home /home/agent /run /var 2>/dev/null; id; touch ~/x /tmp/x && mv /tmp/x ~/y && ls -a ~"
    seen = []
    for limits in (vallum.Limits(), vallum.Limits(disk_bytes=64 * MIB)):
        async with node.sandbox(limits=limits) as sb:
            seen.append((await sb.exec(["sh", "-c", look])).stdout)
    assert seen[0] == seen[1]


async def test_one_cell_s_quota_is_not_its_neighbours(node):
    async with node.sandbox(limits=vallum.Limits(disk_bytes=16 * MIB)) as full, node.sandbox() as other:
        await full.exec(["sh", "-c", "head -c 50000000 /dev/zero > /tmp/big"])
        assert (
            await other.exec(["sh", "-c", "head -c 50000000 /dev/zero > /tmp/big; stat -c %s /tmp/big"])
        ).stdout == b"50000000\n"


async def test_what_cannot_be_had_is_said(node):
    with pytest.raises(vallum.InvalidInput, match="kept in its memory"):
        await node.sandbox(limits=vallum.Limits(disk_bytes=512 * MIB, memory_bytes=64 * MIB))
    with pytest.raises(vallum.InvalidInput, match="disk_bytes=5"):
        await node.sandbox(limits=vallum.Limits(disk_bytes=5))
    if os.geteuid() == 0:
        with pytest.raises(vallum.InvalidInput, match="kept in its memory"):
            await node.sandbox(limits=vallum.Limits(disk_bytes=64 << 30))
    async with node.sandbox(limits=vallum.Limits(disk_bytes=16 * MIB)) as sb:
        with pytest.raises(vallum.SandboxError, match="cannot be sealed"):
            await sb.snapshot()
        assert (await sb.exec(["true"])).exit_code == 0
