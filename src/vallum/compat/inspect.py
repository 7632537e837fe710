"""Inspect AI sandbox provider: ``sandbox="vallum"`` in a task, nothing else changed.

One node per task, one cell per sample; the run is named after the task, the episode after the
sample (``<sample id>-e<epoch>``), so that every event of the record can be joined with Inspect's log.

Contract: ``inspect_ai.util.SandboxEnvironment``; its own 44 checks (``self_check``) run unmodified in our tests.
"""

from __future__ import annotations

import errno
import re
import secrets
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
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
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]+")


class VallumConfig(BaseModel, frozen=True):
    """What a task may ask of its cells: ``sandbox=("vallum", VallumConfig(allow=["pypi.org:443"]))``."""

    image: str = "host"
    containment: Literal["locked", "standard", "research"] = "standard"
    allow: tuple[str, ...] = ()
    rules: str | None = None
    """Path of a rule file."""
    mounts: tuple[str, ...] = ()
    level: str = "ns"
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


def make_id(text: str) -> str:
    """An id of the record made of any text."""
    return _NOT_IN_ID.sub("-", text).strip("-._")[:40] or "x"


@sandboxenv(name="vallum")
class VallumSandboxEnvironment(SandboxEnvironment):
    """One sample's cell."""

    _nodes: ClassVar[dict[str, Node]] = {}
    _runs: ClassVar[dict[str, str]] = {}

    def __init__(self, sandbox: Sandbox, workdir: str) -> None:
        super().__init__()
        self.sandbox = sandbox
        """The cell itself, for solvers and scorers that want its run, episode or events."""
        self._workdir = PurePosixPath(workdir)

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        """Start the node of the task."""
        node = Node()
        await node.__aenter__()
        cls._nodes[task_name] = node
        cls._runs[task_name] = f"inspect-{make_id(task_name)}-{secrets.token_hex(4)}"

    @classmethod
    async def task_cleanup(cls, task_name: str, config: SandboxEnvironmentConfigType | None, cleanup: bool) -> None:
        """End the node's cells of the task, whatever ``cleanup`` says: no cell outlives its task."""
        node = cls._nodes.pop(task_name, None)
        cls._runs.pop(task_name, None)
        if node is not None:
            await node.close()

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Build the sample's cell; its episode is named after the sample and epoch."""
        wanted = cls._config(config)
        sandbox = await cls._nodes[task_name].sandbox(
            wanted.image,
            containment=wanted.containment,
            allow=wanted.allow,
            rules=wanted.rules,
            mounts=wanted.mounts,
            level=wanted.level,
            limits=Limits(memory_bytes=wanted.memory_bytes, cpus=wanted.cpus, pids=wanted.pids),
            run=cls._runs[task_name],
            episode=_episode(),
        )
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
        """End the sample's cell."""
        for environment in environments.values():
            assert isinstance(environment, cls)
            await environment.sandbox.close()

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
            result = await self.sandbox.exec(cmd, stdin=input, cwd=cwd, environ=env, user=user, timeout_s=timeout)
        except StepTimeout as error:
            raise TimeoutError(str(error)) from error
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
        return data.decode("utf-8") if text else data

    def _absolute(self, file: str) -> str:
        return str(self._workdir / file)


def _os_error(error: GuestFileError, file: str) -> OSError:
    number = getattr(errno, error.errno_name, errno.EIO)
    text = {"EISDIR": "Is a directory", "EACCES": "Permission denied", "ENOENT": "No such file or directory"}.get(
        error.errno_name, str(error)
    )
    return _ERRORS.get(error.errno_name, OSError)(number, text, file)


def _episode() -> str | None:
    """Name of the episode of the sample that is being started, None outside an evaluation."""
    from inspect_ai.log._samples import sample_active

    active = sample_active()
    if active is None:
        return None
    return f"{make_id(str(active.sample.id))}-e{active.epoch}-{secrets.token_hex(2)}"
