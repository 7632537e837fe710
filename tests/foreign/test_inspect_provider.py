"""What Inspect's own checks do not ask of a provider: time-outs in time, many at once, cancellation, names of the record."""

import asyncio
import os
import time

import pytest

pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: pip install 'vallum[inspect]'")

from inspect_ai.util import OutputLimitExceededError, SandboxUserUnsupportedError
from inspect_ai.util import SandboxUnavailableError as Unavailable

from vallum.compat.inspect import VallumConfig, make_id, name_episode, name_run
from vallum.core.errors import InvalidInput
from vallum.core.scope import check_id

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.asyncio(loop_scope="module"),
]

TREE = (
    "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 4321 & sleep 4321' &); (sleep 4321 &); echo begun; sleep 4321"
)


async def count(sandbox_env, word: str) -> int:
    """Processes of the cell with that word among their arguments."""
    pattern = f"[{word[0]}]{word[1:]}"
    result = await sandbox_env.exec(["sh", "-c", f"grep -al {pattern} /proc/[0-9]*/cmdline 2>/dev/null | wc -l"])
    return int(result.stdout)


async def test_a_timeout_comes_in_time_and_leaves_nothing(sandbox_env):
    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        await sandbox_env.exec(["sh", "-c", TREE], timeout=1)
    assert time.monotonic() - began < 1.5
    assert caught.value.truncated_output == "begun\n"
    assert await count(sandbox_env, "4321") == 0


async def test_a_cancelled_command_is_gone_with_all_it_started(sandbox_env):
    task = asyncio.create_task(sandbox_env.exec(["sh", "-c", TREE]))
    deadline = time.monotonic() + 5
    while await count(sandbox_env, "4321") < 4 and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline = time.monotonic() + 0.5
    while (left := await count(sandbox_env, "4321")) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert left == 0
    assert (await sandbox_env.exec(["echo", "alive"])).stdout == "alive\n"


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.002, 0.01])
async def test_a_command_cancelled_while_it_starts_does_not_run_on(sandbox_env, delay_s):
    task = asyncio.create_task(sandbox_env.exec(["sleep", "5432"]))
    await asyncio.sleep(delay_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.3)
    assert await count(sandbox_env, "5432") == 0


async def test_many_commands_of_one_cell_at_once(sandbox_env):
    results = await asyncio.gather(*(sandbox_env.exec(["sh", "-c", f"sleep 0.3; echo {n}"]) for n in range(20)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]


async def test_many_samples_at_once_share_one_node(provider):
    async def sample(number):
        environments = await provider.sample_init("many", None, {})
        environment = environments["default"]
        try:
            await environment.write_file("mine", str(number))
            await asyncio.sleep(0.2)
            return await environment.read_file("mine"), environment.sandbox.episode
        finally:
            await provider.sample_cleanup("many", None, environments, False)

    found = await asyncio.gather(*(sample(number) for number in range(8)))
    assert [text for text, _ in found] == [str(number) for number in range(8)]
    assert len({episode for _, episode in found}) == 8


async def test_two_tasks_hold_one_node(provider):
    await provider.task_init("startup", None)
    await provider.task_cleanup("shutdown", None, True)
    environments = await provider.sample_init("after", None, {})
    assert (await environments["default"].exec(["true"])).success
    await provider.sample_cleanup("after", None, environments, True)


async def test_a_cell_that_ended_is_unavailable(provider):
    environments = await provider.sample_init("gone", None, {})
    environment = environments["default"]
    await provider.sample_cleanup("gone", None, environments, False)
    with pytest.raises(Unavailable):
        await environment.exec(["true"])
    with pytest.raises(Unavailable):
        await environment.read_file("x")
    with pytest.raises(Unavailable):
        await environment.write_file("x", "y")


async def test_wrong_users_and_too_much_output(sandbox_env):
    with pytest.raises(SandboxUserUnsupportedError):
        await sandbox_env.exec(["true"], user="nobody-of-that-name")
    with pytest.raises(SandboxUserUnsupportedError):
        await sandbox_env.exec(["true"], user="65535")
    with pytest.raises(OutputLimitExceededError):
        await sandbox_env.exec(["head", "-c", str(11 * 2**20), "/dev/zero"])


async def test_root_owns_the_files_unless_the_task_takes_that_away(provider, sandbox_env):
    script = "touch /tmp/f && chown 33:33 /tmp/f && stat -c %u:%g /tmp/f"
    assert (await sandbox_env.exec(["sh", "-c", script], user="root")).stdout == "33:33\n"
    config = VallumConfig(root="plain")
    environments = await provider.sample_init("plain", config, {})
    result = await environments["default"].exec(["sh", "-c", script], user="root")
    assert not result.success
    assert "not permitted" in result.stderr
    await provider.sample_cleanup("plain", config, environments, False)


async def test_a_config_that_cannot_be_used_is_said_at_the_start(provider):
    with pytest.raises(InvalidInput, match="image reference or a VallumConfig"):
        await provider.task_init("startup", make_config())
    parsed = provider.config_deserialize({"image": "host", "allow": ["pypi.org:443"], "pids": 64})
    assert parsed == VallumConfig(allow=("pypi.org:443",), pids=64)


def make_config():
    from pydantic import BaseModel

    class Other(BaseModel, frozen=True):
        """Of another provider."""

    return Other()


async def test_any_sample_has_a_name_in_the_record():
    uuid = "m" * 22
    for sample_id in ("plain", 17, "../../etc", "a b/c\n", "\u2728", "", "x" * 500, "-._"):
        assert check_id(name_episode(sample_id, 12, uuid), "the episode") == name_episode(sample_id, 12, uuid)
        assert name_episode(sample_id, 12, uuid) != name_episode(sample_id, 12, uuid, 2)
        check_id(name_episode(sample_id, 9999, uuid, 99), "the episode")
    check_id(name_run(uuid), "the run")
    assert make_id("...") == "x"
