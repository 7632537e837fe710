"""A model that says what a script says: deterministic agents in tests and demonstrations.

The script is a JSON list. Each entry is given once (or ``"repeat": true``), to the first request that fits it::

    [{"tool_calls": [{"name": "bash", "arguments": {"command": "ls"}}]},
     {"first": "count the files", "text": "three"},
     {"when": "no such file", "text": "I give up", "delay_s": 0.5},
     {"tools": false, "text": "A title", "repeat": true}]

``when`` is a regular expression searched in what was said since the assistant's last message, ``first`` in the first
message of the user (it tells sub-agents apart), ``system`` in the system prompt, ``agent`` in what the agent's headers say. ``tools``
says whether the request offers tools; where the script calls tools, a request that offers none gets only entries with
``"tools": false``, and ``ok`` when there is none left: agents ask for titles and summaries besides.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput
from vallum.core.messages import (
    Finish,
    Message,
    ModelRequest,
    Part,
    Reasoning,
    Reply,
    Text,
    ToolCall,
    ToolResult,
    Usage,
    estimate_tokens,
)
from vallum.gateway.model.upstreams.told import UpstreamRefusedError

_ENCODE = msgspec.json.Encoder().encode


class ScriptedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call of an entry."""

    name: str
    arguments: dict[str, Any] | str = {}
    id: str = ""


class ScriptedError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry that fails."""

    status: int
    message: str = "the script says so"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One reply of the script."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ScriptedCall, ...] = ()
    finish: Finish = "stop"
    usage: Usage | None = None
    error: ScriptedError | None = None
    delay_s: float = 0.0
    repeat: bool = False
    when: str = ""
    first: str = ""
    system: str = ""
    agent: str = ""
    tools: bool | None = None

    def fits(self, request: ModelRequest, agent: str) -> bool:
        """Whether it is for this request."""
        wanted = ((self.when, _latest), (self.first, _first), (self.system, _system))
        if self.tools is not None and self.tools != bool(request.tools):
            return False
        if self.agent and not re.search(self.agent, agent):
            return False
        return all(re.search(pattern, find(request), re.DOTALL) for pattern, find in wanted if pattern)


class Scripted:
    """See :class:`~vallum.gateway.model.upstreams.told.Teller`."""

    origin = "scripted"

    def __init__(self, script: bytes) -> None:
        """Read a script.

        Raises:
            InvalidInput: it cannot be used; says where.
        """
        try:
            self._entries: list[Entry] = msgspec.json.decode(script or b"[]", type=list[Entry])
            for entry in self._entries:
                for pattern in (entry.when, entry.first, entry.system, entry.agent):
                    re.compile(pattern)
        except (*MALFORMED, re.error) as error:
            raise InvalidInput(f"the model's script cannot be used: {error}") from error
        self._calls_tools = any(entry.tool_calls for entry in self._entries)
        self._given = 0

    async def tell(self, request: ModelRequest, *, agent: str) -> Reply:
        """As :meth:`Teller.tell`."""
        entry = self._take(request, agent)
        if entry is None:
            raise UpstreamRefusedError(409, "the script has no reply left that fits this request")
        if entry.delay_s:
            await asyncio.sleep(entry.delay_s)
        if entry.error is not None:
            raise UpstreamRefusedError(entry.error.status, entry.error.message)
        self._given += 1
        return _write(entry, request, self._given)

    def _take(self, request: ModelRequest, agent: str) -> Entry | None:
        aside = self._calls_tools and not request.tools
        for index, entry in enumerate(self._entries):
            if aside and entry.tools is not False:
                continue
            if entry.fits(request, agent):
                if not entry.repeat:
                    del self._entries[index]
                return entry
        return Entry(text="ok") if aside else None


def _write(entry: Entry, request: ModelRequest, number: int) -> Reply:
    parts: list[Part] = []
    if entry.reasoning:
        parts.append(Reasoning(entry.reasoning))
    if entry.text:
        parts.append(Text(entry.text))
    for index, call in enumerate(entry.tool_calls):
        arguments = call.arguments if isinstance(call.arguments, str) else _ENCODE(call.arguments).decode()
        custom = isinstance(call.arguments, str)
        call_id = call.id or f"call_s{number}_{index}"
        parts.append(ToolCall(call_id, call.name, arguments, "custom" if custom else "function"))
    words = sum(len(entry.text) + len(str(call.arguments)) for call in entry.tool_calls or (ScriptedCall(""),))
    usage = entry.usage or Usage(
        prompt_tokens=estimate_tokens(request), completion_tokens=1 + words // 4, cached_tokens=0
    )
    return Reply(
        id=f"scripted-{number}",
        model=request.model,
        parts=tuple(parts),
        finish="tool_calls" if entry.tool_calls else entry.finish,
        usage=usage,
    )


def _words(messages: list[Message]) -> str:
    out: list[str] = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, Text):
                out.append(part.text)
            elif isinstance(part, ToolResult):
                out.extend(p.text for p in part.parts if isinstance(p, Text))
    return "\n".join(out)


def _latest(request: ModelRequest) -> str:
    rest = list(request.messages)
    last = max((index for index, message in enumerate(rest) if message.role == "assistant"), default=-1)
    return _words([message for message in rest[last + 1 :] if message.role != "system"])


def _first(request: ModelRequest) -> str:
    return _words([message for message in request.messages if message.role == "user"][:1])


def _system(request: ModelRequest) -> str:
    return _words([message for message in request.messages if message.role == "system"])
