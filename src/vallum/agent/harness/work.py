"""Have somebody else's agent work on a task in a cell."""

from __future__ import annotations

from vallum.agent.harness.base import Harness
from vallum.agent.harness.install import make_install_argv
from vallum.client.command import ExecResult, OnOutput
from vallum.client.sandbox import Sandbox
from vallum.core.errors import SandboxError

SETUP_BUNDLES = {"npm": "npm", "pip": "pypi"}
"""Installer -> the bundle of grants that the set-up phase needs for it."""
SETUP_PLACE = "/tmp/agents"  # noqa: S108 - of the guest


async def install_in_cell(sandbox: Sandbox, harness: Harness) -> str:
    """Install the agent inside the cell, through what its rules grant in the set-up phase. Returns where it is.

    Raises:
        SandboxError: it could not be installed; says what the installer said.
    """
    place = f"{SETUP_PLACE}/{harness.name}"
    environ = {"npm_config_cache": f"{SETUP_PLACE}/.npm", "HOME": SETUP_PLACE}
    await sandbox.exec(["mkdir", "-p", place])
    done = await sandbox.exec(make_install_argv(harness, place), environ=environ, timeout_s=900)
    found = await sandbox.exec(["test", "-e", f"{place}/{harness.program}"])
    if done.exit_code != 0 or found.exit_code != 0:
        said = " / ".join(done.stderr.decode(errors="replace").strip().splitlines()[-3:])
        raise SandboxError(f"{harness.name} could not be installed in the cell: {said or 'its program is not there'}")
    return place


async def work(
    sandbox: Sandbox,
    harness: Harness,
    task: str,
    *,
    place: str,
    model: str,
    timeout_s: float | None = None,
    workdir: str | None = None,
    on_output: OnOutput | None = None,
) -> ExecResult:
    """Start the agent whose tree is at ``place`` in the cell on ``task``, and wait for its end.

    The sandbox must have been made with ``model=``. The agent itself is one step; each tool call that its model proposes is
    a step of its own. ``stdout`` is what the agent prints (a JSON line an event, for most).

    Raises:
        StepTimeout: its time was up; it and everything that its tool calls started is gone.
        CellGone, Contained: the cell has ended.
    """
    launch = harness.make_launch(place, task, model=model)
    for path, data in launch.files.items():
        await sandbox.write_file(path, data)
    return await sandbox.exec(
        launch.argv, environ=launch.environ, stdin=b"", timeout_s=timeout_s, cwd=workdir, on_output=on_output
    )
