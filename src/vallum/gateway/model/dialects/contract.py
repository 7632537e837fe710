"""What a dialect is: how one provider's requests, replies and streams are read and written. Pure.

A request is first *cleaned* (everything that would make the provider act by itself is taken out unless granted, and
everything unknown with it), then read into the unified form. Towards an upstream of the same dialect the cleaned
request goes on with the few fields that the door decides; towards another it is written anew. A reply is *assembled*
from the upstream's stream, which says of each event whether it may go on at once, has to wait for the steps and the
record, or is dropped because nobody here knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from vallum.core.messages import Delta, DialectName, Message, ModelRequest, Reply
from vallum.gateway.model.sse import SseEvent

Json = dict[str, Any]
Headers = tuple[tuple[bytes, bytes], ...]


class DialectError(Exception):
    """A request or a reply is not of the dialect. ``str`` is one sentence for whoever sent it."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What a path asks for."""

    dialect: DialectName
    operation: Literal["generate", "count", "models", "model"]
    model: str = ""
    """Where the path names it."""
    stream: bool | None = None
    """Where the path says it."""


class Fed(msgspec.Struct, frozen=True):
    """What became of one event of an upstream's stream."""

    deltas: tuple[Delta, ...] = ()
    hold: bool = False
    """It has, or comes after, part of a tool call or the end: it waits for the steps and the record."""
    drop: bool = False
    """It is not for the agent."""


class Assembler(Protocol):
    """Makes a reply of an upstream's stream."""

    is_over: bool
    """The dialect's own last event has come."""

    def feed(self, event: SseEvent) -> Fed:
        """Take the next event.

        Raises:
            DialectError: it is not of the dialect, contradicts an earlier one, or says that the upstream failed.
        """
        ...

    def finish(self) -> Reply:
        """The reply.

        Raises:
            DialectError: it is not complete.
        """
        ...


class StreamWriter(Protocol):
    """Writes a reply as a stream of the dialect: ``start``, any ``delta``, ``finish``."""

    def start(self) -> bytes:
        """The beginning."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """More words."""
        ...

    def finish(self, reply: Reply) -> bytes:
        """Tool calls, usage and the end. The words of ``reply`` were written by :meth:`delta`."""
        ...


class Dialect(Protocol):
    """One provider's API."""

    name: DialectName

    def clean(self, raw: Json, granted: frozenset[str]) -> tuple[Json, list[str]]:
        """The request without what is not granted, and the names of what was taken out.

        Raises:
            DialectError: it cannot be made safe by leaving something out.
        """
        ...

    def parse_request(self, raw: Json, route: Route) -> ModelRequest:
        """Read a cleaned request.

        Raises:
            DialectError: it is not of the dialect.
        """
        ...

    def write_request(self, request: ModelRequest) -> Json:
        """A request for an upstream of this dialect, from an agent of another."""
        ...

    def adjust(
        self,
        raw: Json,
        *,
        model: str,
        stream: bool,
        temperature: float | None,
        max_tokens: int | None,
        token_ids: bool,
    ) -> Json:
        """The request with what the door decides. None keeps what is there; ``max_tokens`` only lowers it."""
        ...

    def extend(self, raw: Json, messages: Sequence[Message]) -> Json:
        """The request with more messages at its end."""
        ...

    def target(self, model: str, *, stream: bool, count: bool = False) -> str:
        """Path and query at the upstream."""
        ...

    def key_headers(self, secret: bytes) -> Headers:
        """The headers that carry a key, and what else the provider demands."""
        ...

    def parse_reply(self, raw: Json) -> Reply:
        """Read a reply that was not streamed.

        Raises:
            DialectError: it is not of the dialect.
        """
        ...

    def make_assembler(self, *, wants_usage: bool) -> Assembler:
        """For one streamed reply. ``wants_usage``: the agent asked for the usage itself."""
        ...

    def write_reply(self, reply: Reply) -> Json:
        """A reply that is not streamed."""
        ...

    def make_writer(self, reply_id: str, model: str) -> StreamWriter:
        """For one streamed reply."""
        ...

    def write_error(self, status: int, message: str, rule: str) -> Json:
        """An error as the provider's clients read it."""
        ...

    def write_count(self, tokens: int) -> Json:
        """The answer to a request to count tokens."""
        ...
