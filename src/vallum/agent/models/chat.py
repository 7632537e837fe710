"""Chat completions: the body to send, and a reply from what came back. Pure; siblings carry the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vallum.agent.messages import Message, Reply, ToolCall, ToolSpec, Usage, write_chat
from vallum.agent.models.base import ModelError, ModelStopped
from vallum.core.decoding import MALFORMED
from vallum.core.text import keep, show


class _Function(msgspec.Struct):
    name: str
    arguments: str | None = None


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd_micros: int = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_completions = msgspec.json.Decoder(_Completion)


def write_request(
    model: str, messages: Sequence[Message], tools: Sequence[ToolSpec], options: dict[str, Any] | None = None
) -> bytes:
    """The body of ``POST /v1/chat/completions``."""
    body: dict[str, Any] = {"model": model, "messages": write_chat(list(messages)), **(options or {})}
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
            }
            for t in tools
        ]
    return msgspec.json.encode(body)


def read_reply(status: int, body: bytes) -> Reply:
    """The reply in an answer.

    Raises:
        ModelStopped: 404, by which the gateway stops an episode.
        ModelError: any other status than 200, or a body that is no completion; quotes it.
    """
    if status != 200:
        kind = ModelStopped if status == 404 else ModelError
        raise kind(f"the model's server answered {status}: {show(keep(body[:2000]), 400)}")
    try:
        completion = _completions.decode(body)
        choice = completion.choices[0]
    except (*MALFORMED, IndexError) as error:
        raise ModelError(f"the model's server answered what is no chat completion ({error}): check its URL") from error
    calls = tuple(
        ToolCall(id=call.id or f"call_{number}", name=call.function.name, arguments=call.function.arguments or "{}")
        for number, call in enumerate(choice.message.tool_calls or [])
    )
    used = completion.usage or _Usage()
    return Reply(
        message=Message(role="assistant", content=choice.message.content or "", tool_calls=calls),
        usage=Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cost_usd_micros=used.cost_usd_micros,
        ),
        finish="tool_calls" if calls else choice.finish_reason or "stop",
        completion_token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
    )
