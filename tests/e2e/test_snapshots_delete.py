"""`vallum snapshots delete`: what something needs stays and says why; the rest goes."""

import json

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]


async def test_delete(cli, home):
    async with vallum.Node(home=home) as node:
        async with node.sandbox(run="one") as sb:
            await sb.exec(["sh", "-c", "echo 1 > /tmp/1"])
            first = (await sb.snapshot()).id
        async with node.fork(first, run="one") as fork:
            second = (await fork.snapshot()).id
        async with node.sandbox(run="two") as other:
            third = (await other.snapshot()).id
        assert cli("snapshots", "delete").code == 2
        assert cli("snapshots", "delete", "--unused", first).code == 2
        ran = cli("snapshots", "delete", "s-none")
        assert ran.code == 2
        assert "there is no snapshot" in ran.err
        ran = cli("snapshots", "delete", first)
        assert ran.code == 2
        assert f"snapshot {second} lies on it" in ran.err
        async with node.fork(second, run="live") as live:
            ran = cli("snapshots", "delete", "--run", "one")
            assert ran.code == 2
            assert f"cell {live.id} runs on it" in ran.err
            ran = cli("snapshots", "delete", "--unused", "--json")
            assert ran.code == 0, ran.err
            assert json.loads(ran.out)["deleted"] == [third], "only what nothing needs"
            assert set(json.loads(ran.out)["kept"]) == {first, second}
            assert (await live.exec(["cat", "/tmp/1"])).stdout == b"1\n"
        assert cli("snapshots", "delete", "--run", "nobody").code == 2
        ran = cli("snapshots", "delete", "--run", "one", "--json")
        assert (ran.code, ran.json) == (0, {"deleted": [second, first], "kept": {}}), "what lies on another goes first"
        assert cli("snapshots", "--json").out == ""
        assert cli("snapshots", "delete", "--unused").out == "nothing to delete\n"


def test_copy_out_of_the_command_line(cli, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "f").write_text("1")
    tmp_path.chmod(0o755)
    ran = cli(
        "run", "--work", work, "--copy-out", f"/work:{tmp_path}/got", "--", "sh", "-c", "echo 2 > g; rm f; exit 3"
    )
    assert ran.code == 3, "the command's own exit code"
    assert "copied /work to" in ran.err
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["g"]
    assert [path.name for path in work.iterdir()] == ["f"], "the host's directory is as it was"
    again = cli("run", "--copy-out", f"/work:{tmp_path}/got", "--", "true")
    assert again.code == 2
    assert "is there already" in again.err
    missing = cli("run", "-q", "--copy-out", f"/no/such:{tmp_path}/no", "--", "true")
    assert missing.code == 125
    assert not (tmp_path / "no").exists()
    assert cli("run", "--copy-out", "nonsense", "--", "true").code == 2
