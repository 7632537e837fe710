"""What is said to a model and what it answers, in one form for every dialect. No I/O.

It is what the record keeps (``model.call``), what branches are told apart by, and the bridge between an agent that
speaks one dialect and an upstream that speaks another. Images and documents are named by digest, never kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "tool_calls", "length", "filtered", "error"]
DialectName = Literal["chat", "responses", "messages", "gemini"]


class Text(msgspec.Struct, frozen=True, tag="text", omit_defaults=True):
    """Words."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning", omit_defaults=True):
    """What the model thought before it answered, as far as it is shown."""

    text: str
    signature: str = ""
    """What the provider wants back with it, opaque (``signature``, ``encrypted_content``)."""


class Media(msgspec.Struct, frozen=True, tag="media", omit_defaults=True):
    """An image, sound or document: by digest when its bytes were sent, by reference otherwise."""

    media_type: str
    digest: str = ""
    """``sha256:...`` of the decoded bytes."""
    bytes: int = 0
    url: str = ""


class ToolCall(msgspec.Struct, frozen=True, tag="tool_call", omit_defaults=True):
    """The model asks for a tool."""

    id: str
    """Empty where the dialect gave none."""
    name: str
    arguments: str
    """JSON of an object; free text for ``custom``."""
    kind: Literal["function", "custom"] = "function"


class ToolResult(msgspec.Struct, frozen=True, tag="tool_result", omit_defaults=True):
    """What the agent says that a tool answered. Not evidence."""

    call: str
    parts: tuple[Text | Media, ...] = ()
    is_error: bool = False


Part = Text | Reasoning | Media | ToolCall | ToolResult


class Message(msgspec.Struct, frozen=True):
    """One message. What the assistant says in one turn is one message, tool calls included."""

    role: Role
    parts: tuple[Part, ...]


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool that the agent offers and runs itself."""

    name: str
    description: str = ""
    schema: str = "{}"
    """JSON schema of the arguments, as JSON text."""
    kind: str = "function"
    """``function``, ``custom``, or the provider's name of a tool whose form it knows (``local_shell``, ``bash``...)."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens, as the upstream counted them; None where it did not say."""

    prompt_tokens: int | None = None
    """All of them, cached ones included."""
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model answered."""

    id: str = ""
    model: str = ""
    parts: tuple[Part, ...] = ()
    finish: Finish = "stop"
    usage: Usage = Usage()
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    policy_version: str = ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Its tool calls, in order."""
        return tuple(part for part in self.parts if isinstance(part, ToolCall))

    @property
    def text(self) -> str:
        """Its words, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent asks of a model."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    tool_choice: str = ""
    """Empty as the provider likes, ``auto``, ``none``, ``required``, or ``=`` and the name of a tool."""
    previous: str = ""
    """Id of an earlier response that this one goes on from (dialect ``responses``)."""
    blobs: dict[str, str] = {}
    """Digest -> base64 of the media sent in it. Not recorded."""


Delta = Text | Reasoning
"""A piece of a reply as it streams."""

_canonical = msgspec.json.Encoder(order="sorted")
_json = msgspec.json.Encoder()


def make_media(media_type: str, data: str, blobs: dict[str, str]) -> Media:
    """Media of base64 text, whose bytes are put into ``blobs``.

    Raises:
        ValueError: it is not base64.
    """
    try:
        raw = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError("media data is not base64") from error
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    blobs[digest] = data
    return Media(media_type=media_type, digest=digest, bytes=len(raw))


def fold(messages: list[Message]) -> tuple[Message, ...]:
    """Join what the assistant says in a row (the dialects cut it differently) and drop what is empty."""
    folded: list[Message] = []
    for message in messages:
        if not message.parts:
            continue
        if folded and message.role == "assistant" and folded[-1].role == "assistant":
            folded[-1] = Message("assistant", folded[-1].parts + message.parts)
        else:
            folded.append(message)
    return tuple(folded)


def digest_message(message: Message, *, with_ids: bool) -> bytes:
    """32 bytes that stay the same when an agent sends a message again in its own words.

    Reasoning is left out (most agents drop it), white space around text too, and JSON arguments are compared as
    values. ``with_ids`` False where a dialect carries no ids of tool calls.
    """
    kept: list[object] = []
    text: list[str] = []
    for part in message.parts:
        if isinstance(part, Text):
            text.append(part.text)
        elif isinstance(part, ToolCall):
            kept.append(["call", part.id if with_ids else "", part.name, _canonical_arguments(part)])
        elif isinstance(part, ToolResult):
            words = "".join(p.text for p in part.parts if isinstance(p, Text)).strip()
            media = [p.digest or p.url for p in part.parts if isinstance(p, Media)]
            kept.append(["result", part.call if with_ids else "", words, media])
        elif isinstance(part, Media):
            kept.append(["media", part.digest or part.url])
    form = [message.role, "".join(text).strip(), kept]
    return hashlib.sha256(_canonical.encode(form)).digest()


def _canonical_arguments(call: ToolCall) -> str:
    if call.kind == "custom":
        return call.arguments
    try:
        return _canonical.encode(msgspec.json.decode(call.arguments or "{}")).decode()
    except (msgspec.DecodeError, RecursionError):
        return call.arguments


def chain_digests(seed: str, messages: tuple[Message, ...], *, with_ids: bool) -> list[bytes]:
    """For each message the digest of the conversation up to it. System messages do not count: agents put clocks into them."""
    link = hashlib.sha256(seed.encode()).digest()
    chain = []
    for message in messages:
        if message.role != "system":
            link = hashlib.sha256(link + digest_message(message, with_ids=with_ids)).digest()
        chain.append(link)
    return chain


def encode(value: object, limit: int) -> str:
    """JSON text for the record; what would be longer than ``limit`` characters is replaced by its size and digest."""
    raw = _json.encode(value)
    if len(raw) <= limit:
        return raw.decode()
    return _json.encode({"cut": {"bytes": len(raw), "digest": f"sha256:{hashlib.sha256(raw).hexdigest()}"}}).decode()


def estimate_tokens(request: ModelRequest) -> int:
    """How many tokens a request has, roughly (four bytes each), where nobody has counted them."""
    words = sum(_size(part) for message in request.messages for part in message.parts)
    return (words + sum(len(t.schema) + len(t.description) + len(t.name) for t in request.tools) + 3) // 4


def _size(part: Part) -> int:
    if isinstance(part, Text | Reasoning):
        return len(part.text.encode())
    if isinstance(part, ToolCall):
        return len(part.name) + len(part.arguments.encode())
    if isinstance(part, ToolResult):
        return sum(_size(p) for p in part.parts)
    return 4096
