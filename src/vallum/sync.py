"""The same names as :mod:`vallum`, blocking.

One background thread runs an event loop for all objects made here::

    with vallum.sync.Node() as node, node.sandbox() as sb:
        print(sb.exec(["id"]).stdout)
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar

from vallum.client import face
from vallum.client.approvals import Approval
from vallum.client.face import EventView, ExecResult
from vallum.client.snapshots import FilesChanged, Snapshot
from vallum.client.transfer import Copied
from vallum.client.wire import RulesUpdated

T = TypeVar("T")

__all__ = ["Node", "Sandbox", "Session"]


class _Loop:
    """An event loop in a daemon thread, started on first use."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to completion; an interrupt of the caller cancels it."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="vallum-sync", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


_loop = _Loop()


class Session:
    """Blocking :class:`vallum.Session`."""

    def __init__(self, inner: face.Session) -> None:
        self._inner = inner

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, command: str, *, timeout_s: float | None = None, tool_call: str | None = None, step: int | None = None
    ) -> ExecResult:
        """See :meth:`vallum.Session.run`."""
        return _loop.run(self._inner.run(command, timeout_s=timeout_s, tool_call=tool_call, step=step))

    def close(self) -> None:
        """End the shell."""
        _loop.run(self._inner.close())


class Sandbox:
    """Blocking :class:`vallum.Sandbox`."""

    def __init__(self, inner: face.Sandbox) -> None:
        self._inner = inner
        self.id, self.run, self.episode, self.pid, self.rootless = (
            inner.id,
            inner.run,
            inner.episode,
            inner.pid,
            inner.rootless,
        )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def exec(self, argv: list[str | bytes] | list[str], **options: Any) -> ExecResult:
        """See :meth:`vallum.Sandbox.exec`."""
        return _loop.run(self._inner.exec(argv, **options))

    def session(self, **options: Any) -> Session:
        """See :meth:`vallum.Sandbox.session`."""

        async def open_session() -> face.Session:
            return await self._inner.session(**options)

        return Session(_loop.run(open_session()))

    @contextmanager
    def step(self, *, tool_call: str | None = None) -> Iterator[int]:
        """See :meth:`vallum.Sandbox.step`."""
        block = self._inner.step(tool_call=tool_call)
        index = _loop.run(block.__aenter__())
        try:
            yield index
        finally:
            _loop.run(block.__aexit__(None, None, None))

    def snapshot(self, *, processes: Literal["freeze", "end"] = "freeze") -> Snapshot:
        """See :meth:`vallum.Sandbox.snapshot`."""
        return _loop.run(self._inner.snapshot(processes=processes))

    def diff(self, since: int | Snapshot | str | None = None) -> FilesChanged:
        """See :meth:`vallum.Sandbox.diff`."""
        return _loop.run(self._inner.diff(since))

    def set_phase(self, phase: Literal["setup", "run"]) -> int:
        """See :meth:`vallum.Sandbox.set_phase`."""
        return _loop.run(self._inner.set_phase(phase))

    def add_tool(self, tool: face.HostTool) -> None:
        """See :meth:`vallum.Sandbox.add_tool`. The function is called on another thread than the caller's."""
        _loop.run(self._inner.add_tool(tool))

    def update_rules(self, **options: Any) -> RulesUpdated:
        """See :meth:`vallum.Sandbox.update_rules`."""
        return _loop.run(self._inner.update_rules(**options))

    def read_file(self, path: str, **options: Any) -> bytes:
        """See :meth:`vallum.Sandbox.read_file`."""
        return _loop.run(self._inner.read_file(path, **options))

    def write_file(self, path: str, data: bytes | str, **options: Any) -> None:
        """See :meth:`vallum.Sandbox.write_file`."""
        _loop.run(self._inner.write_file(path, data, **options))

    def copy_out(self, guest: str, host: str | os.PathLike[str], **options: Any) -> Copied:
        """See :meth:`vallum.Sandbox.copy_out`."""
        return _loop.run(self._inner.copy_out(guest, host, **options))

    def copy_in(self, host: str | os.PathLike[str], guest: str, **options: Any) -> None:
        """See :meth:`vallum.Sandbox.copy_in`."""
        _loop.run(self._inner.copy_in(host, guest, **options))

    def close(self) -> None:
        """End the cell."""
        _loop.run(self._inner.close())


class Node:
    """Blocking :class:`vallum.Node`."""

    def __init__(self, *, home: str | os.PathLike[str] | None = None) -> None:
        self._inner = face.Node(home=home)

    def __enter__(self) -> Node:
        _loop.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tiers(self) -> dict[str, str]:
        """Control -> how well it is enforced."""
        return self._inner.tiers

    def sandbox(self, image: str = "host", **options: Any) -> Sandbox:
        """See :meth:`vallum.Node.sandbox`. The result is a context manager, too."""

        async def open_sandbox() -> face.Sandbox:
            return await self._inner.sandbox(image, **options)

        return Sandbox(_loop.run(open_sandbox()))

    def fork(self, snapshot: Snapshot | str, **options: Any) -> Sandbox:
        """See :meth:`vallum.Node.fork`. The result is a context manager, too."""

        async def open_fork() -> face.Sandbox:
            return await self._inner.fork(snapshot, **options)

        return Sandbox(_loop.run(open_fork()))

    def snapshots(self) -> list[Snapshot]:
        """See :meth:`vallum.Node.snapshots`."""
        return _loop.run(self._inner.snapshots())

    def delete(self, snapshot: Snapshot | str) -> None:
        """See :meth:`vallum.Node.delete`."""
        _loop.run(self._inner.delete(snapshot))

    def approvals(self) -> list[Approval]:
        """See :meth:`vallum.Node.approvals`."""
        return _loop.run(self._inner.approvals())

    def decide(
        self, approval: Approval | str, answer: Literal["allow", "deny", "always"], *, why: str = ""
    ) -> Approval:
        """See :meth:`vallum.Node.decide`."""
        return _loop.run(self._inner.decide(approval, answer, why=why))

    def events(self, *, run: str, episode: str | None = None) -> list[EventView]:
        """See :meth:`vallum.Node.events`."""
        return _loop.run(self._inner.events(run=run, episode=episode))

    def close(self) -> None:
        """End this client's cells and leave."""
        _loop.run(self._inner.close())
