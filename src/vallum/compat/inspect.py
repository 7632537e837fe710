"""Inspect AI sandbox provider: ``sandbox="vallum"`` in a task, nothing else changed.

One node for all evaluations of the process, one cell for each sample. An evaluation is a run (:func:`name_run`), a
sample's attempt an episode (:func:`name_episode`), and a command is charged to the tool call that made it, so every
event of the record can be joined with Inspect's log (docs/inspect.md).

Contract: ``inspect_ai.util.SandboxEnvironment``; its own checks (``self_check``) run unmodified in our tests.
Needs the extra ``vallum[inspect]`` and Inspect's asyncio backend. The only module that imports Inspect.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, overload

from inspect_ai.event import SpanBeginEvent, ToolEvent
from inspect_ai.log import transcript
from inspect_ai.log._samples import sample_active
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    current_span_id,
    sandboxenv,
)
from inspect_ai.util import SandboxUnavailableError as Unavailable
from pydantic import BaseModel

from vallum.client.face import Node, Sandbox
from vallum.core.errors import CellGone, Contained, GuestFileError, InvalidInput, NodeError, StepTimeout
from vallum.core.limits import Limits

_ERRORS: dict[str, type[OSError]] = {
    "ENOENT": FileNotFoundError,
    "ENOTDIR": NotADirectoryError,
    "EISDIR": IsADirectoryError,
    "EACCES": PermissionError,
    "EPERM": PermissionError,
    "EROFS": PermissionError,
    "ENAMETOOLONG": FileNotFoundError,
}
_REASONS = {"EISDIR": "Is a directory", "EACCES": "Permission denied", "ENOENT": "No such file or directory"}
"""Inspect looks for these words."""
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]+")


class VallumConfig(BaseModel, frozen=True):
    """What a task may ask of its cells: ``sandbox=SandboxEnvironmentSpec("vallum", VallumConfig(allow=("pypi.org",)))``."""

    image: str = "host"
    containment: Literal["locked", "standard", "research"] = "standard"
    allow: tuple[str, ...] = ()
    rules: str | None = None
    """Path of a rule file."""
    mounts: tuple[str, ...] = ()
    level: str = "ns"
    root: Literal["plain", "owner"] = "owner"
    """Inspect expects that root of a sandbox can add users and own files; ``plain`` takes that away."""
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


def make_id(text: str, most: int = 40) -> str:
    """An id of the record made of any text."""
    return _NOT_IN_ID.sub("-", text).strip("-._")[:most] or "x"


def name_run(eval_id: str) -> str:
    """The run of an evaluation: ``log.eval.eval_id`` of Inspect's log."""
    return f"inspect-{make_id(eval_id)}"


def name_episode(sample_id: str | int, epoch: int, uuid: str, attempt: int = 1) -> str:
    """The episode of a sample: ``id``, ``epoch`` and ``uuid`` of a sample of Inspect's log.

    ``attempt`` is more than 1 where Inspect tried the sample again (``retry_on_error``): each attempt has a cell of its own.
    """
    again = f"-a{attempt}" if attempt > 1 else ""
    return f"{make_id(str(sample_id), 24)}-e{epoch}-{make_id(uuid, 24)}{again}"


def find_tool_call() -> str | None:
    """Id of the tool call that is being executed, as in ``ToolEvent.id``; None outside of one (solver, scorer, set-up)."""
    wanted = current_span_id()
    if wanted is None:
        return None
    events = transcript().history.resident_events
    for at in range(len(events) - 1, -1, -1):  # from the latest, and from our span upwards
        event = events[at]
        if not isinstance(event, SpanBeginEvent) or event.id != wanted:
            continue
        if event.type == "tool":
            return next(
                (call.id for call in events[at + 1 :] if isinstance(call, ToolEvent) and _is_call_of(call, event)), None
            )
        wanted = event.parent_id
        if wanted is None:
            return None
    return None


def _is_call_of(event: ToolEvent, span: SpanBeginEvent) -> bool:
    """Whether ``event``, the first such after ``span``, is the call that the span was opened for: Inspect makes the event
    before the span (so it carries the outer one) and writes it just after the span's beginning."""
    return event.function == span.name and event.span_id == span.parent_id


class _Share:
    """The process's node, held by every task that was started and not cleaned up."""

    def __init__(self) -> None:
        self._node: Node | None = None
        self._holders = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self.attempts: Counter[str] = Counter()
        """Cells built so far for a sample, by its uuid."""

    async def take(self) -> None:
        """Start the node, or share the one that runs."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # an event loop that ended took its connection along, and with it the cells
            self._loop, self._lock, self._node, self._holders = loop, asyncio.Lock(), None, 0
        async with self._lock:
            if self._node is None:
                node = Node()
                await node.__aenter__()
                self._node = node
            self._holders += 1

    async def release(self) -> None:
        """Let go; with the last holder the node's cells end."""
        async with self._lock:
            self._holders -= 1
            if self._holders <= 0 and self._node is not None:
                node, self._node = self._node, None
                self.attempts.clear()
                await node.close()

    @property
    def node(self) -> Node:
        """The node.

        Raises:
            Unavailable: no task has been started.
        """
        if self._node is None:
            raise Unavailable("the vallum node is not running: task_init was not called, or task_cleanup already was")
        return self._node


@sandboxenv(name="vallum")
class VallumSandboxEnvironment(SandboxEnvironment):
    """One sample's cell."""

    _share: ClassVar[_Share] = _Share()

    def __init__(self, sandbox: Sandbox, workdir: str) -> None:
        super().__init__()
        self.sandbox = sandbox
        """The cell itself, for solvers and scorers that want its run, episode or events."""
        self._workdir = PurePosixPath(workdir)

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        """Start the node, or share the one of another task.

        Raises:
            InvalidInput: the config cannot be used.
            NodeError: the node cannot be started; names its log.
        """
        cls._config(config)
        await cls._share.take()

    @classmethod
    async def task_cleanup(cls, task_name: str, config: SandboxEnvironmentConfigType | None, cleanup: bool) -> None:
        """Let go of the node. Whatever ``cleanup`` says, no cell outlives the process that asked for it."""
        await cls._share.release()

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Build the sample's cell and write its run and episode into Inspect's transcript."""
        wanted = cls._config(config)
        active = sample_active()
        run = episode = None
        if active is not None:
            cls._share.attempts[active.sample_uuid] += 1
            attempt = cls._share.attempts[active.sample_uuid]
            run = name_run(active.eval_id)
            episode = name_episode(active.sample.id or "x", active.epoch, active.sample_uuid, attempt)
        sandbox = await cls._share.node.sandbox(
            wanted.image,
            containment=wanted.containment,
            allow=wanted.allow,
            rules=wanted.rules,
            mounts=wanted.mounts,
            level=wanted.level,
            root=wanted.root,
            limits=Limits(
                memory_bytes=wanted.memory_bytes,
                cpus=wanted.cpus,
                pids=wanted.pids,
                output_bytes=SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
            ),
            run=run,
            episode=episode,
            command=["inspect", task_name],
        )
        if active is not None:
            transcript().info({"run": sandbox.run, "episode": sandbox.episode, "cell": sandbox.id}, source="vallum")
        where = await sandbox.exec(["pwd"])
        return {"default": cls(sandbox, where.stdout.decode().strip())}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """End the sample's cell, also when the sample was interrupted."""
        for environment in environments.values():
            await environment.as_type(cls).sandbox.close()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """The config of a log or of YAML."""
        return VallumConfig.model_validate(config)

    @staticmethod
    def _config(config: SandboxEnvironmentConfigType | None) -> VallumConfig:
        if isinstance(config, VallumConfig):
            return config
        if isinstance(config, str):
            return VallumConfig(image=config)
        if config is None:
            return VallumConfig()
        raise InvalidInput(
            f"a sandbox config of type {type(config).__name__} cannot be used: give an image reference or a VallumConfig"
        )

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,  # noqa: A002 - the name is Inspect's
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,  # noqa: ASYNC109 - the name is Inspect's
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command: one step of the sample's episode. A time-out is never retried: it killed what ran."""
        try:
            result = await self.sandbox.exec(
                cmd, stdin=input, cwd=cwd, environ=env, user=user, timeout_s=timeout, tool_call=find_tool_call()
            )
        except StepTimeout as error:
            raise _time_out(error) from error
        except InvalidInput as error:
            if user is not None and "user" in str(error):
                raise SandboxUserUnsupportedError(str(error)) from error
            raise
        except (CellGone, NodeError, Contained) as error:
            raise Unavailable(str(error)) from error
        if result.exit_code == 126 and result.stderr.startswith(b"vallum: "):
            raise PermissionError(errno.EACCES, result.stderr.decode("utf-8", "replace").strip(), cmd[0])
        stdout, stderr = (stream.decode("utf-8", "replace") for stream in (result.stdout, result.stderr))
        if result.truncated:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, stdout)
        return ExecResult(success=result.exit_code == 0, returncode=result.exit_code, stdout=stdout, stderr=stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file, relative to the cell's working directory."""
        try:
            await self.sandbox.write_file(self._absolute(file), contents)
        except GuestFileError as error:
            raise _os_error(error, file) from error
        except (CellGone, NodeError) as error:
            raise Unavailable(str(error)) from error

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Read a file, relative to the cell's working directory."""
        try:
            data = await self.sandbox.read_file(
                self._absolute(file), limit_bytes=SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
            )
        except GuestFileError as error:
            if error.errno_name == "EFBIG":
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
            raise _os_error(error, file) from error
        except (CellGone, NodeError) as error:
            raise Unavailable(str(error)) from error
        return data.decode("utf-8") if text else data

    def _absolute(self, file: str) -> str:
        return str(self._workdir / file)


def _os_error(error: GuestFileError, file: str) -> OSError:
    number = getattr(errno, error.errno_name, errno.EIO)
    return _ERRORS.get(error.errno_name, OSError)(number, _REASONS.get(error.errno_name, str(error)), file)


def _time_out(error: StepTimeout) -> TimeoutError:
    """Inspect's time-out, with what the command had written: Inspect shows that to the model."""
    timed_out = TimeoutError(str(error))
    if error.partial is not None:
        timed_out.truncated_output = error.partial.stdout.decode("utf-8", "replace")  # type: ignore[attr-defined]
    return timed_out
