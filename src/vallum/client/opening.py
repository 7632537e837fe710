"""What is about to be opened: awaited, or entered."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class Closable(Protocol):
    """What can be opened and has to be closed."""

    async def close(self) -> None:
        """End it."""
        ...


C = TypeVar("C", bound=Closable)


class Opener(Generic[C]):
    """Something that is about to be opened: await it and close it yourself, or enter it."""

    _opened: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._open().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        await self._opened.close()

    async def _open(self) -> C:
        raise NotImplementedError
