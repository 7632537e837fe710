"""A shell that stays: directory, variables and background jobs go on from call to call."""

from __future__ import annotations

from typing import Annotated, ClassVar, Protocol

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import Effect, ToolError, clip, read_arguments, write_schema
from vallum.client.face import ExecResult, Sandbox, Session
from vallum.core.errors import CellGone, StepTimeout
from vallum.core.text import keep


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``bash``."""

    command: Annotated[str, msgspec.Meta(description="Command line for sh.", min_length=1)]
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    """Seconds after which it is killed."""


class Bash:
    """Runs command lines in one persistent shell of the sandbox."""

    effect: Effect = "run"
    is_parallel: ClassVar[bool] = False

    def __init__(
        self, sandbox: Sandbox, *, timeout_s: float = 120.0, cwd: str | None = None, user: str | None = None
    ) -> None:
        self._sandbox = sandbox
        self._timeout_s = timeout_s
        self._cwd = cwd
        self._user = user
        self._shell: Session | None = None
        self.spec = ToolSpec(
            name="bash",
            description=(
                "Run a command line in a persistent shell. Directory and variables stay. Standard input is empty. "
                f"Without timeout_s it is killed after {timeout_s:g} s."
            ),
            parameters=write_schema(Arguments),
        )

    async def call(self, call_id: str, arguments: str) -> str:
        """Exit code and output, standard error after standard output."""
        asked = read_arguments(arguments, Arguments)
        timeout_s = asked.timeout_s or self._timeout_s
        shell = self._shell = self._shell or await self._open()
        try:
            result = await shell.run(asked.command, timeout_s=timeout_s, tool_call=call_id)
        except StepTimeout as error:
            wrote = show_output(error.partial) if error.partial is not None else ""
            raise ToolError(
                f"killed after {timeout_s:g} s, with everything it had started. Give a longer timeout_s, or run it in "
                f"the background.\n{wrote}".rstrip()
            ) from error
        except CellGone as error:
            self._shell = await self._open()  # raises the same when it is not only the shell that has gone
            raise ToolError(
                f"{error}. There is a new shell now, in its first directory; the command may not have run"
            ) from error
        return describe(result)

    async def _open(self) -> Session:
        return await self._sandbox.session(cwd=self._cwd, user=self._user)

    async def close(self) -> None:
        """End the shell."""
        if self._shell is not None:
            shell, self._shell = self._shell, None
            await shell.close()


class Output(Protocol):
    """What a command wrote."""

    @property
    def stdout(self) -> bytes:
        """Standard output."""
        ...

    @property
    def stderr(self) -> bytes:
        """Standard error."""
        ...


def describe(result: ExecResult) -> str:
    """A command's end in words."""
    return f"exit code {result.exit_code}\n{show_output(result)}".rstrip("\n")


def show_output(output: Output) -> str:
    """What it wrote, standard error last."""
    parts = []
    if output.stdout:
        parts.append(clip(keep(output.stdout)).rstrip("\n"))
    if output.stderr:
        parts.append("stderr:\n" + clip(keep(output.stderr), 6000).rstrip("\n"))
    return "\n".join(parts)
