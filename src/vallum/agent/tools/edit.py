"""Create, replace and insert in files. Done by programs in the cell, so that the kernel charges it to the call's step."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import BadArguments, Effect, ToolError, clip, read_arguments, write_schema
from vallum.client.face import Sandbox
from vallum.core.text import keep

MAX_FILE_BYTES = 8 * 1024 * 1024
_WRITE = 'd=$(dirname -- "$1") && mkdir -p -- "$d" && cat > "$1"'


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``edit``."""

    action: Annotated[
        Literal["view", "create", "replace", "insert"],
        msgspec.Meta(
            description="view: show with line numbers; create: write the whole file; replace: exchange one exact passage; "
            "insert: put text after a line"
        ),
    ]
    path: Annotated[str, msgspec.Meta(description="Absolute path.", min_length=1)]
    text: Annotated[str, msgspec.Meta(description="For create, replace and insert: the new text.")] = ""
    old: Annotated[str, msgspec.Meta(description="For replace: the passage, exactly once in the file.")] = ""
    line: Annotated[
        int, msgspec.Meta(description="For insert: after this line (0: at the top). For view: the first line.", ge=0)
    ] = 0
    lines: Annotated[int, msgspec.Meta(description="For view: how many lines.", ge=1)] = 400


class Edit:
    """Looks at files and changes them."""

    effect: Effect = "edit"
    is_parallel: ClassVar[bool] = False

    def __init__(self, sandbox: Sandbox, *, user: str | None = None) -> None:
        self._sandbox = sandbox
        self._user = user
        self.spec = ToolSpec(
            name="edit",
            description="View, create or change a text file. A passage to replace must be in the file exactly once.",
            parameters=write_schema(Arguments),
        )

    async def call(self, call_id: str, arguments: str) -> str:
        """What was done, or the lines asked for."""
        asked = read_arguments(arguments, Arguments)
        if not asked.path.startswith("/"):
            raise BadArguments(f"the path {asked.path!r} is not absolute: start it with /")
        async with self._sandbox.step(tool_call=call_id, is_current=False) as step:
            if asked.action == "create":
                await self._write(asked.path, asked.text, step)
                return f"wrote {asked.path} ({len(asked.text.splitlines())} lines)"
            before = await self._read(asked.path, step)
            if asked.action == "view":
                return view(before, asked.line, asked.lines)
            after = change(before, asked)
            await self._write(asked.path, after, step)
        at = before.find(asked.old) if asked.action == "replace" else _offset(before, asked.line)
        first = max(1, after.count("\n", 0, at) - 2)
        return f"changed {asked.path}\n" + view(after, first, asked.text.count("\n") + 7)

    async def close(self) -> None:
        """Holds nothing."""

    async def _read(self, path: str, step: int) -> str:
        result = await self._sandbox.exec(
            ["head", "-c", str(MAX_FILE_BYTES + 1), "--", path], timeout_s=30, user=self._user, step=step
        )
        if result.exit_code:
            raise ToolError(keep(result.stderr).strip() or f"{path} cannot be read")
        if len(result.stdout) > MAX_FILE_BYTES or result.truncated:
            raise ToolError(f"{path} is too large to edit here: use sed or python in bash")
        try:
            return result.stdout.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ToolError(f"{path} is not UTF-8 text (byte {error.start}): use a program in bash") from error

    async def _write(self, path: str, text: str, step: int) -> None:
        result = await self._sandbox.exec(
            ["sh", "-c", _WRITE, "sh", path], stdin=text.encode(), timeout_s=60, user=self._user, step=step
        )
        if result.exit_code:
            raise ToolError(keep(result.stderr).strip() or f"{path} cannot be written")


def change(before: str, asked: Arguments) -> str:
    """The text after a ``replace`` or ``insert``.

    Raises:
        ToolError: the passage is not there exactly once, or there are fewer lines.
    """
    if asked.action == "insert":
        at = _offset(before, asked.line)
        middle = asked.text if asked.text.endswith("\n") or at == len(before) else asked.text + "\n"
        lead = "\n" if at and before[at - 1] != "\n" else ""
        return before[:at] + lead + middle + before[at:]
    if not asked.old:
        raise ToolError("replace needs `old`, the passage that shall go: copy it from a view, without line numbers")
    count = before.count(asked.old)
    if count != 1:
        what = "is not in the file" if not count else f"is in the file {count} times"
        raise ToolError(f"the passage {what}: view the file, and give enough of it to be found exactly once")
    return before.replace(asked.old, asked.text)


def _offset(text: str, line: int) -> int:
    """Where line ``line`` ends."""
    lines = text.splitlines(keepends=True)
    if line > len(lines):
        raise ToolError(f"the file has {len(lines)} lines, so nothing can be put after line {line}")
    return sum(map(len, lines[:line]))


def view(text: str, first: int, count: int) -> str:
    """Lines with their numbers."""
    lines = text.splitlines()
    start = max(first, 1)
    shown = [f"{number:6}  {line}" for number, line in enumerate(lines[start - 1 : start - 1 + count], start)]
    if not shown:
        return f"(the file has {len(lines)} lines)"
    rest = len(lines) - (start - 1 + len(shown))
    if rest > 0:
        shown.append(f"({rest} more lines)")
    return clip("\n".join(shown))
