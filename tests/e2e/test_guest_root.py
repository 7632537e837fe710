"""What root of a cell may do is asked for, enforced and recorded."""

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]


async def test_asked_for_enforced_and_recorded(home):
    async with vallum.Node(home=home) as node:
        for root, code in (("owner", 0), ("plain", 1)):
            async with node.sandbox(root=root) as sb:
                result = await sb.exec(["sh", "-c", "touch /tmp/f; chown 33 /tmp/f"], user="root")
                assert result.exit_code == code, result.stderr
                async with sb.session(user="root") as sh:
                    assert (await sh.run("chown 34 /tmp/f")).exit_code == code
                [started] = [
                    e for e in await node.events(run=sb.run, episode=sb.episode) if e.kind == "episode.started"
                ]
            assert started.root == root
        with pytest.raises(vallum.InvalidInput, match="'plain' or 'owner'"):
            await node.sandbox(root="king")


def test_on_the_command_line(cli):
    command = ("--", "sh", "-c", "touch /tmp/f; chown 33 /tmp/f; stat -c %u /tmp/f")
    assert cli("run", "-q", "--user", "root", "--root", "owner", *command).out == "33\n"
    assert cli("run", "-q", "--user", "root", *command).out == "0\n"
    assert [event["root"] for event in cli.events(kind="episode.started")] == ["plain"]
