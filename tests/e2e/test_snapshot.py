"""Snapshot, fork and diff through the public face: what a fork sees, what it shares with nobody, what the record says."""

import asyncio
import time

import pytest

import vallum
import vallum.sync

pytestmark = [pytest.mark.root, pytest.mark.e2e]


@pytest.fixture
async def node(home):
    async with vallum.Node(home=home) as node:
        yield node


async def sh(sb, script, **options):
    r = await sb.exec(["sh", "-c", script], **options)
    assert r.exit_code == 0, r.stderr
    return r.stdout.decode()


async def test_a_fork_sees_the_files_and_nothing_else(node):
    async with node.sandbox(allow=["example.org:443"]) as sb:
        await sh(sb, "cd /tmp; echo one > a; mkdir d; echo x > d/f; ln -s /etc/passwd l; ln a hard; chmod 4750 a")
        await sh(sb, "rm -rf /etc/fonts; mkdir /etc/fonts; echo n > /etc/fonts/new; rm /etc/services", user="root")
        await sb.exec(["sh", "-c", "setsid sleep 333 >/dev/null 2>&1 &"])
        snap = await sb.snapshot()
        assert (snap.run, snap.episode, snap.step, snap.alive) == (sb.run, sb.episode, 2, 1)
        async with node.fork(snap) as fork:
            look = "cd /tmp; stat -c '%n %u %a %h' a hard d d/f; readlink l; cat a hard; cat /etc/fonts/*; ls /etc/services || true"
            assert await sh(fork, look) == await sh(sb, look)
            assert (await sh(fork, "ls /etc/fonts")).split() == ["new"]
            assert "sleep" not in await sh(fork, "cat /proc/[0-9]*/comm"), "no process is in a snapshot"
            assert "sleep" in await sh(sb, "cat /proc/[0-9]*/comm"), "the parent's go on"
            await sh(fork, "echo forked > /tmp/a; rm -r /tmp/d")
            await sh(sb, "echo parent > /tmp/a; echo more > /tmp/more")
            assert await sh(sb, "cat /tmp/a /tmp/d/f") == "parent\nx\n"
            assert await sh(fork, "cat /tmp/a; ls /tmp") == "forked\na\nhard\nl\n"
            again = await node.fork(snap)
            assert await sh(again, "cat /tmp/a") == "one\n", "a sealed layer is written to by nobody"
            await again.close()
            started = [e for e in await node.events(run=fork.run, episode=fork.episode) if e.kind == "episode.started"]
            assert started[0].parent == snap.id
            assert any("example.org" in rule for rule in started[0].rules), "the parent's grants"
        made = [e for e in await node.events(run=sb.run) if e.kind == "snapshot.made"]
        assert (made[0].snapshot, made[0].digest) == (snap.id, snap.digest)
        assert made[0].scope.step == 2
        changes = {e.path: e for e in await node.events(run=sb.run, episode=sb.episode) if e.kind == "file.change"}
        assert changes["/etc/services"].change == "removed"
        assert changes["/etc/fonts"].replaced
        assert changes["/tmp/d/f"].change == "added"
        assert changes["/tmp/d/f"].attribution.method == "control"
        assert (changes["/tmp/d/f"].first_step, changes["/tmp/d/f"].last_step) == (0, 2)


async def test_a_deep_chain_is_merged_and_stays_right(node):
    sb = await node.sandbox()
    deepest = 0
    for number in range(100):
        await sh(sb, f"echo {number} > /tmp/n{number}; echo {number} > /tmp/last; rm -f /tmp/n{number - 3}")
        snap = await sb.snapshot()
        deepest = max(deepest, snap.depth)
        child = await node.fork(snap)
        await sb.close()
        sb = child
    assert 50 < deepest <= 64
    assert sorted((await sh(sb, "ls /tmp; cat /tmp/last")).split()) == ["99", "last", "n97", "n98", "n99"]
    diff = await sb.diff()
    assert (diff.added, diff.changed, diff.removed) == (0, 0, 0)
    await sb.close()


async def test_fifty_forks_at_once(node):
    async with node.sandbox() as sb:
        await sb.write_file("/tmp/a", "base\n")
        snap = await sb.snapshot()

        async def one(number):
            async with node.fork(snap, episode=f"fork-{number}") as fork:
                r = await fork.exec(["sh", "-c", f"cat /tmp/a; echo {number} > /tmp/a; sleep 0.3; cat /tmp/a"])
                return fork.run, fork.episode, r.stdout

        found = await asyncio.gather(*(one(n) for n in range(50)))
        assert found == [(sb.run, f"fork-{n}", b"base\n%d\n" % n) for n in range(50)]
        events = await node.events(run=sb.run)
        parents = [e.parent for e in events if e.kind == "episode.started" and e.scope.episode.startswith("fork-")]
        assert parents == [snap.id] * 50
        # What a fork does is charged to the fork: each sleeper, by its cgroup, where its start was seen (a sensor under
        # the load of fifty cells at once may look too late at some).
        sleepers = [e for e in events if e.kind == "process.started" and e.process["argv"][:1] == ["sh"]]
        assert len(sleepers) >= 25
        for e in sleepers:
            assert f"echo {e.scope.episode.removeprefix('fork-')} >" in e.process["argv"][2]
            assert (e.scope.step, e.attribution.method) == (0, "cgroup")


async def test_a_fork_is_quick(node):
    async with node.sandbox() as sb:
        await sh(sb, "echo base > /tmp/a")
        snap = await sb.snapshot()
        took = []
        for _ in range(15):
            began = time.perf_counter()
            fork = await node.fork(snap)
            took.append(time.perf_counter() - began)
            await fork.close()
        assert min(took) < 0.05, "a fork is no boot"


async def test_what_became_of_processes_is_the_callers_choice(node):
    async with node.sandbox() as sb:
        await sb.exec(["sh", "-c", "setsid sleep 444 >/dev/null 2>&1 &"])
        assert (await sb.snapshot()).alive == 1
        assert "sleep" in await sh(sb, "cat /proc/[0-9]*/comm")
        ended = await sb.snapshot(processes="end")
        assert (ended.processes, ended.alive) == ("end", 1)
        assert "sleep" not in await sh(sb, "cat /proc/[0-9]*/comm")


async def test_a_writer_is_caught_at_one_moment(node):
    async with node.sandbox() as sb:
        writer = "touch /tmp/x /tmp/y; while :; do echo >> /tmp/x; echo >> /tmp/y; done"
        await sb.exec(["sh", "-c", f"(setsid sh -c '{writer}' >/dev/null 2>&1 &); sleep 0.2"])
        for _ in range(5):
            async with node.fork(await sb.snapshot()) as fork:
                x, y = map(int, (await sh(fork, "cat /tmp/x | wc -l; cat /tmp/y | wc -l")).split())
                assert 0 <= x - y <= 1, "both files are of the same moment"
                assert x > 0


async def test_diff_between_moments(node, cli):
    async with node.sandbox() as sb:
        await sh(sb, "echo 1 > /tmp/a; echo 1 > /tmp/b; mkdir /tmp/d; touch /tmp/d/x")
        first = await sb.diff()
        assert [(c.path, c.change) for c in first.changes] == [
            ("/tmp/a", "added"), ("/tmp/b", "added"), ("/tmp/d", "added"), ("/tmp/d/x", "added"),
        ]  # fmt: skip
        await sh(sb, "echo 2 > /tmp/a; touch -d @0 /tmp/a; rm -r /tmp/d; echo c > /tmp/c; touch /tmp/b")
        await sh(sb, "rm /etc/hostname; chmod 700 /srv", user="root")
        second = await sb.diff(since=0)
        assert {(c.path, c.change) for c in second.changes} == {
            ("/etc/hostname", "removed"), ("/srv", "changed"), ("/tmp/a", "changed"), ("/tmp/c", "added"), ("/tmp/d", "removed"),
        }  # fmt: skip
        assert (second.first_step, second.last_step) == (1, 2)
        snap = await sb.snapshot()
        await sh(sb, "echo 3 > /tmp/a")
        assert [(c.path, c.change) for c in (await sb.diff(snap)).changes] == [("/tmp/a", "changed")]
        with pytest.raises(vallum.InvalidInput, match="were not kept at the end of step 1"):
            await sb.diff(since=1)
        with pytest.raises(vallum.InvalidInput, match="none of cell"):
            await sb.diff(since="s000")
        found = await node.events(run=sb.run)
        assert [e.scope.step for e in found if e.kind == "file.change"][-1] == 3
        assert "/tmp/c" in cli("diff", sb.run).out
        assert "/tmp/c" not in cli("diff", sb.run, "3").out
        assert snap.id in cli("show", sb.run).out
        assert "/etc/hostname" in cli("report", sb.run, "-o", "-").out
    listed = cli("snapshots", "--json").out
    assert snap.id in listed
    assert snap.digest in listed


async def test_deleting(node):
    async with node.sandbox() as sb:
        await sh(sb, "echo 1 > /tmp/a")
        low = await sb.snapshot()
        fork = await node.fork(low)
        with pytest.raises(vallum.InvalidInput, match=f"cannot be deleted: cell {fork.id} runs on it"):
            await node.delete(low)
        high = await fork.snapshot()
        await fork.close()
        with pytest.raises(vallum.InvalidInput, match=f"snapshot {high.id} lies on it"):
            await node.delete(low)
        await node.delete(high.id)
        await node.delete(low)
        assert await node.snapshots() == []
        with pytest.raises(vallum.InvalidInput, match="there is no snapshot"):
            await node.fork(low)
        with pytest.raises(vallum.InvalidInput, match="there is no snapshot"):
            await node.delete(low)
        assert [(c.path, c.change) for c in (await sb.diff(low)).changes] == [], "its moment is still known"


async def test_snapshots_outlive_the_node(home):
    async with vallum.Node(home=home) as node, node.sandbox(mounts=[]) as sb:
        await sh(sb, "echo kept > /tmp/a")
        snap = await sb.snapshot()
        pid = node.pid
    for _ in range(100):
        async with vallum.Node(home=home) as node:
            if node.pid != pid:
                assert [one.id for one in await node.snapshots()] == [snap.id]
                async with node.fork(snap.id, run="another") as fork:
                    assert await sh(fork, "cat /tmp/a") == "kept\n"
                    assert fork.run == "another"
                return
        await asyncio.sleep(0.05)
    pytest.fail("the node never ended")


async def test_a_cell_that_has_ended_cannot_be_sealed(node, home):
    sb = await node.sandbox()
    await sb.close()
    for call in (sb.snapshot(), sb.diff()):
        with pytest.raises(vallum.CellGone):
            await call
    assert list((home / "snapshots").iterdir()) == []


def test_the_same_names_blocking(home):
    with vallum.sync.Node(home=home) as node, node.sandbox() as sb:
        sb.exec(["sh", "-c", "echo 1 > /tmp/a"])
        snap = sb.snapshot()
        with node.fork(snap) as fork:
            assert fork.exec(["cat", "/tmp/a"]).stdout == b"1\n"
            assert fork.diff().changes == []
        assert [one.id for one in node.snapshots()] == [snap.id]
        node.delete(snap)
