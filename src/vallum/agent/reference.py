"""The reference agent put together: the usual tools over one sandbox, and sub-agents that share its meter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from vallum.agent.approval import Approval
from vallum.agent.compaction import Compaction
from vallum.agent.hooks import Hook
from vallum.agent.limits import Limits, Meter
from vallum.agent.loop import SYSTEM, Agent, Observer, make_delegate
from vallum.agent.memory import read_memory
from vallum.agent.models.base import Model
from vallum.agent.tools.base import Tool
from vallum.agent.tools.bash import Bash
from vallum.agent.tools.edit import Edit
from vallum.agent.tools.submit import Submit
from vallum.agent.tools.task import Task
from vallum.agent.tools.todo import Todo
from vallum.agent.transcript import Transcript
from vallum.client.face import Sandbox


async def make_agent(
    sandbox: Sandbox,
    model: Model,
    *,
    limits: Limits | None = None,
    workdir: str | None = None,
    user: str | None = None,
    approval: Approval | None = None,
    hooks: Sequence[Hook] = (),
    compaction: Compaction | None = None,
    transcript: Transcript | None = None,
    observer: Observer | None = None,
    tools: Sequence[Tool] = (),
) -> Agent:
    """An agent with bash, edit, todo, task and submit, and ``tools`` beside them.

    Reads the project's memory file when ``workdir`` is given. Sub-agents have bash, edit and submit (and ``tools``), a
    conversation of their own, and no sub-agents.
    """
    limits = (limits or Limits()).check()
    meter = Meter(limits)
    memory = await read_memory(sandbox, workdir) if workdir is not None else ""
    place = f"The work is in {workdir}." if workdir is not None else ""
    system = "\n\n".join(part for part in (SYSTEM, place, memory) if part)
    make = partial(
        Agent,
        model,
        limits=limits,
        system=system,
        approval=approval,
        hooks=hooks,
        compaction=compaction,
        observer=observer,
        meter=meter,
    )

    def make_tools() -> list[Tool]:
        return [Bash(sandbox, cwd=workdir, user=user), Edit(sandbox, user=user), *tools, Submit()]

    def make_subagent() -> Agent:
        bounded = Limits(turns=limits.subagent_turns, format_errors=limits.format_errors)
        return make(tools=make_tools(), limits=bounded, depth=1)

    own = [*make_tools(), Todo(), Task(make_delegate(make_subagent))]
    return make(tools=own, transcript=transcript)
