"""The tools of MCP servers that run in the cell and speak over stdin and stdout.

A server is an ordinary command of the cell. Before each call it is moved into the call's own step, so that what it and
the processes that it starts do is charged to that call; it stays there until the next one. What it starts to work with
(before the first call) is charged to a step of its own.

Not covered: a connection that it opened during one call and uses in another is charged to the first one; what an earlier
call left running stays with that call. Calls of one server run one after another.
Source: MCP 2025-06-18, "stdio". Needs the extra ``mcp``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import re
import shlex
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from vallum.agent.messages import ToolSpec
from vallum.agent.tools.base import Effect, Tool, ToolError, clip, read_arguments
from vallum.client.face import Process, Sandbox
from vallum.core.errors import InvalidInput, VallumError
from vallum.core.text import keep, show

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from mcp import ClientSession
    from mcp.shared.message import SessionMessage

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 120.0
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_TOOLS = 256
_END_S = 2.0
_NAME_CHARS = 64
_ODD = re.compile(r"[^A-Za-z0-9_-]+")


@asynccontextmanager
async def open_mcp_tools(
    sandbox: Sandbox, commands: Sequence[str], *, cwd: str | None = None, user: str | None = None
) -> AsyncIterator[list[Tool]]:
    """Start servers in the cell, each by its command line, and give their tools; the servers end with the block.

    A tool is named ``SERVER__TOOL``, as the server calls itself. What a server offers is asked once.

    Raises:
        InvalidInput: the extra is not installed, a command line cannot be read, or it starts no server of MCP.
    """
    if commands and importlib.util.find_spec("mcp") is None:
        raise InvalidInput("tools of MCP servers need the extra: pip install 'vallum[mcp]'")
    async with AsyncExitStack() as stack:
        found: dict[str, Tool] = {}
        for command in commands:
            server = McpServer(sandbox, command, cwd=cwd, user=user)
            stack.push_async_callback(server.close)
            for tool in await server.start():
                if tool.spec.name in found:
                    raise InvalidInput(f"two MCP servers offer a tool {tool.spec.name}: start one of them only")
                found[tool.spec.name] = tool
        yield list(found.values())


class McpServer:
    """One server: a command of the cell, and the session with it."""

    def __init__(
        self,
        sandbox: Sandbox,
        command: str,
        *,
        cwd: str | None = None,
        user: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._sandbox = sandbox
        self._command = command
        self._cwd = cwd
        self._user = user
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._closing = asyncio.Event()
        self._line = bytearray()
        self._errors = bytearray()
        self._process: Process | None = None
        self._session: ClientSession | None = None
        self._task: asyncio.Task[None] | None = None
        self._incoming: MemoryObjectSendStream[SessionMessage | Exception] | None = None

    async def start(self) -> list[Tool]:
        """Start it, greet it, and ask what it offers.

        Raises:
            InvalidInput: the command line cannot be read, or what it starts is no server of MCP.
        """
        try:
            argv = shlex.split(self._command)
        except ValueError as error:
            raise InvalidInput(f"--mcp {self._command!r} is not a command line: {error}") from error
        ready: asyncio.Future[list[Tool]] = asyncio.get_running_loop().create_future()
        self._process = self._sandbox.start(
            argv, interactive=True, cwd=self._cwd, user=self._user, on_output=self._hear
        )
        # The session's scopes have to be left by the task that entered them.
        self._task = asyncio.create_task(self._run(self._process, ready))
        either: set[asyncio.Future[Any]] = {ready, self._task}
        await asyncio.wait(either, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await self.close()
            raise InvalidInput(
                f"the MCP server {self._command!r} did not answer in {START_TIMEOUT_S:g} s.{self._last_words()}"
            )
        return ready.result()

    async def call(self, call_id: str, tool: str, arguments: dict[str, Any]) -> str:
        """Call a tool in a step of its own.

        Raises:
            ToolError: it did not work.
        """
        from mcp import MCPError

        async with self._lock, self._sandbox.step(tool_call=call_id, is_current=False) as step:
            if self._session is None or self._process is None or self._task is None or self._task.done():
                raise ToolError(f"the MCP server {self._command!r} has ended.{self._last_words()}")
            await self._process.enter_step(step)
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._session.call_tool(tool, arguments)
            except TimeoutError:
                raise ToolError(f"no answer came within {self._timeout_s:g} s; the server may still be at it") from None
            except (MCPError, RuntimeError) as error:
                # RuntimeError: an answer that does not fit the tool's own output schema.
                raise ToolError(f"the server refused: {error}") from error
        return read_result(answer.model_dump(mode="json", by_alias=True))

    async def close(self) -> None:
        """End the server: by the end of its input, then by signals. More than once is no error."""
        self._closing.set()
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), 3 * _END_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, process: Process, ready: asyncio.Future[list[Tool]]) -> None:
        import anyio
        from mcp import ClientSession, MCPError

        self._incoming, heard = anyio.create_memory_object_stream["SessionMessage | Exception"](math.inf)
        said, outgoing = anyio.create_memory_object_stream["SessionMessage"](0)
        writing = asyncio.create_task(_write(process, outgoing))
        waiting = asyncio.create_task(self._wait(process))
        try:
            async with ClientSession(heard, said) as session:
                try:
                    greeting = await session.initialize()
                    tools = await self._list_tools(session, greeting.server_info.name)
                except (MCPError, RuntimeError, ValueError) as error:
                    why = f"the MCP server {self._command!r} cannot be used: {error}.{self._last_words()}"
                    ready.set_exception(InvalidInput(why))  # raised here it would come out in a group
                    return
                self._session = session
                ready.set_result(tools)
                closing = asyncio.create_task(self._closing.wait())
                await asyncio.wait({closing, waiting}, return_when=asyncio.FIRST_COMPLETED)
                closing.cancel()
        finally:
            self._session = None
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await _end(process, waiting)
            for stream in (self._incoming, heard, said, outgoing):
                stream.close()

    async def _list_tools(self, session: ClientSession, name: str) -> list[Tool]:
        from mcp.types import PaginatedRequestParams

        label = _ODD.sub("_", name).strip("_")[:24] or "mcp"
        tools: list[Tool] = []
        params = None
        while len(tools) <= MAX_TOOLS:
            page = await session.list_tools(params=params)
            tools += [McpTool(self, label, tool.name, tool.description or "", tool.input_schema) for tool in page.tools]
            if not page.next_cursor:
                return tools
            params = PaginatedRequestParams(cursor=page.next_cursor)
        raise ValueError(f"it offers more than {MAX_TOOLS} tools")

    async def _wait(self, process: Process) -> None:
        """Until it ends; whoever waits for an answer is told then."""
        with contextlib.suppress(VallumError):
            await process.wait()
        if self._incoming is not None:
            self._incoming.close()

    def _hear(self, stream: str, data: bytes) -> None:
        from mcp.shared.message import SessionMessage
        from mcp.types import jsonrpc_message_adapter

        if stream == "stderr":
            self._errors = (self._errors + data)[-2000:]
            return
        self._line += data
        if len(self._line) > MAX_LINE_BYTES:
            raise ToolError(f"the MCP server {self._command!r} wrote a line of more than {MAX_LINE_BYTES} bytes")
        *lines, rest = self._line.split(b"\n")
        self._line = rest
        for line in lines:
            message: SessionMessage | Exception
            try:
                message = SessionMessage(jsonrpc_message_adapter.validate_json(bytes(line), by_name=False))
            except ValueError as error:
                message = error
            if self._incoming is not None:
                # The session may be over already.
                with contextlib.suppress(*_closed_errors()):
                    self._incoming.send_nowait(message)

    def _last_words(self) -> str:
        text = keep(bytes(self._errors)).strip()
        return f" It wrote: {show(text[-400:], 400)}" if text else ""


class McpTool:
    """One tool of a server."""

    effect: Effect = "run"
    """Whatever the server says of itself."""
    is_parallel: ClassVar[bool] = False

    def __init__(self, server: McpServer, label: str, name: str, description: str, schema: dict[str, Any]) -> None:
        self._server = server
        self._name = name
        self.spec = ToolSpec(
            name=f"{label}__{_ODD.sub('_', name)}"[:_NAME_CHARS],
            description=clip(description, 4000),
            parameters=schema,
        )

    async def call(self, call_id: str, arguments: str) -> str:
        """See :class:`~vallum.agent.tools.base.Tool`."""
        return clip(await self._server.call(call_id, self._name, read_arguments(arguments, dict[str, Any])))

    async def close(self) -> None:
        """Nothing: the server ends with :func:`open_mcp_tools`, as sub-agents share it."""


def read_result(result: dict[str, Any]) -> str:
    """A ``CallToolResult`` in words. Pure.

    Raises:
        ToolError: it is an error, in the server's words.
    """
    parts = []
    for block in result.get("content") or ():
        if block.get("type") == "text":
            parts.append(str(block.get("text", "")))
        else:
            parts.append(f"[{block.get('type')} {block.get('mimeType', '')}]".replace(" ]", "]"))
    if not parts and result.get("structuredContent") is not None:
        parts.append(msgspec.json.encode(result["structuredContent"]).decode())
    text = "\n".join(parts)
    if result.get("isError"):
        raise ToolError(text or "the tool failed and does not say why")
    return text


async def _write(process: Process, outgoing: MemoryObjectReceiveStream[SessionMessage]) -> None:
    async for message in outgoing:
        data = message.message.model_dump_json(by_alias=True, exclude_unset=True)
        await process.feed(data.encode() + b"\n")


async def _end(process: Process, waiting: asyncio.Task[None]) -> None:
    with contextlib.suppress(VallumError):
        await process.feed(b"", eof=True)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        await asyncio.wait({waiting}, timeout=_END_S)
        if not waiting.done():
            process.signal(signum)
    await asyncio.wait({waiting}, timeout=_END_S)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def _closed_errors() -> tuple[type[Exception], ...]:
    import anyio

    return anyio.ClosedResourceError, anyio.BrokenResourceError
