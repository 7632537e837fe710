"""What an upstream is that needs no server: it is told a request and says the reply."""

from __future__ import annotations

from typing import Protocol

from vallum.core.messages import ModelRequest, Reply


class UpstreamRefusedError(Exception):
    """The upstream gave an error instead of a reply."""

    def __init__(self, status: int, message: str, retry_after: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


class Teller(Protocol):
    """Answers without a server."""

    origin: str
    """As the record names it."""

    async def tell(self, request: ModelRequest, *, agent: str) -> Reply:
        """The reply to ``request``.

        Raises:
            UpstreamRefusedError: there is none.
        """
        ...
