"""What agent and model say to each other, independent of any provider."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """The model asks for a tool."""

    id: str
    name: str
    arguments: str
    """JSON as the model wrote it: it may be broken."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant."""
    tool_call_id: str = ""
    """Of a tool: which call it answers."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a reply took, as the server counted it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd_micros: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_usd_micros=self.cost_usd_micros + other.cost_usd_micros,
        )


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answer."""

    message: Message
    usage: Usage = Usage()
    finish: str = "stop"
    """``stop``, ``tool_calls``, ``length`` or ``filtered``."""
    completion_token_ids: tuple[int, ...] | None = None
    """Sampled token ids, where the server gives them (for training)."""
    logprobs: tuple[float, ...] | None = None


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as the model is told of it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema of an object."""


def write_chat(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's chat completions."""
    return [_write_one(message) for message in messages]


def _write_one(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        body["tool_call_id"] = message.tool_call_id
    return body
