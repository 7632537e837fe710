"""Anthropic messages, streamed and not, with thinking, tool use and the counting of tokens.

Source: Anthropic API reference, ``POST /v1/messages`` and its streaming events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vallum.core.messages import (
    Delta,
    DialectName,
    Finish,
    Media,
    Message,
    ModelRequest,
    Part,
    Reasoning,
    Reply,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
    fold,
    make_media,
)
from vallum.gateway.model.dialects.chat import check_calls, make_call
from vallum.gateway.model.dialects.contract import DialectError, Fed, Headers, Json, Route
from vallum.gateway.model.dialects.fields import (
    count,
    dump,
    integer,
    loads,
    names,
    number,
    obj,
    objects,
    parse_object,
    required,
    string,
)
from vallum.gateway.model.dialects.hosted import keep_known, name_hosted, removed
from vallum.gateway.model.sse import SseEvent, write_event

_KNOWN = names(
    "messages model system tools tool_choice max_tokens stream temperature top_p top_k stop_sequences thinking"
    " metadata service_tier output_config output_format cache_control effort context_management"
)
_OWN_TOOLS = ("bash", "text_editor", "memory")
"""Tools whose form Anthropic defines and which the agent runs."""
_FINISH: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "filtered",
}
_FORWARDED = frozenset({"message_start", "content_block_start", "content_block_delta", "content_block_stop", "ping"})
_DELTAS = frozenset({"text_delta", "thinking_delta", "signature_delta", "input_json_delta", "citations_delta"})
DEFAULT_MAX_TOKENS = 8192


class Messages:
    """The dialect ``messages``."""

    name: DialectName = "messages"

    def clean(self, raw: Json, granted: frozenset[str]) -> tuple[Json, list[str]]:
        """As the contract says."""
        stripped: list[str] = []
        kept = keep_known(raw, _KNOWN, granted, stripped)
        tools = []
        for tool in objects(kept.get("tools"), "tools"):
            kind = tool.get("type")
            name = name_hosted(kind)
            if kind in (None, "custom") or name in _OWN_TOOLS or name in granted:
                tools.append(tool)
            else:
                stripped.append(name)
        if "tools" in kept:
            kept["tools"] = tools
        if not tools:
            kept.pop("tools", None)
            kept.pop("tool_choice", None)
        else:
            choice = kept.get("tool_choice")
            wanted = choice.get("name") if isinstance(choice, dict) and choice.get("type") == "tool" else None
            if wanted is not None and wanted not in {tool.get("name") for tool in tools}:
                kept.pop("tool_choice")
        kept["messages"] = [
            {**message, "content": _clean_content(message.get("content"), granted, stripped)}
            for message in objects(kept.get("messages"), "messages")
        ]
        if "system" in kept:
            kept["system"] = _clean_content(kept["system"], granted, stripped)
        return kept, stripped

    def parse_request(self, raw: Json, route: Route) -> ModelRequest:
        """As the contract says."""
        del route
        blobs: dict[str, str] = {}
        messages: list[Message] = []
        if system := _read_content(raw.get("system"), "system", blobs):
            messages.append(Message("system", tuple(system)))
        for index, message in enumerate(objects(raw["messages"], "messages")):
            messages.extend(_read_message(message, f"messages[{index}]", blobs))
        if not raw["messages"]:
            raise DialectError("messages has to have at least one message")
        choice = raw.get("tool_choice")
        kind = choice.get("type") if isinstance(choice, dict) else None
        return ModelRequest(
            model=required(raw.get("model"), "model"),
            messages=fold(messages),
            tools=tuple(_read_tool(tool) for tool in objects(raw.get("tools"), "tools")),
            stream=raw.get("stream") is True,
            temperature=number(raw.get("temperature"), "temperature"),
            top_p=number(raw.get("top_p"), "top_p"),
            max_tokens=integer(raw.get("max_tokens"), "max_tokens"),
            stop=tuple(string(s, "stop_sequences") for s in raw.get("stop_sequences") or ()),
            tool_choice={"any": "required", "auto": "auto", "none": "none"}.get(kind or "", "")
            or (f"={choice['name']}" if kind == "tool" and isinstance(choice, dict) else ""),
            blobs=blobs,
        )

    def write_request(self, request: ModelRequest) -> Json:
        """As the contract says."""
        system = [m for m in request.messages if m.role == "system"]
        rest = [m for m in request.messages if m.role != "system"]
        raw: Json = {
            "model": request.model,
            "max_tokens": request.max_tokens or DEFAULT_MAX_TOKENS,
            "messages": _write_messages(rest, request.blobs),
        }
        if words := "\n\n".join(p.text for m in system for p in m.parts if isinstance(p, Text)):
            raw["system"] = words
        if request.tools:
            raw["tools"] = [
                {
                    "name": tool.name,
                    "description": tool.description,
                    "input_schema": {
                        "type": "object",
                        **(parse_object(tool.schema, "schema") if tool.kind == "function" else {}),
                    },
                }
                for tool in request.tools
            ]
            if request.tool_choice.startswith("="):
                raw["tool_choice"] = {"type": "tool", "name": request.tool_choice[1:]}
            elif request.tool_choice:
                raw["tool_choice"] = {"type": {"required": "any"}.get(request.tool_choice, request.tool_choice)}
        for key in ("temperature", "top_p"):
            if (value := getattr(request, key)) is not None:
                raw[key] = value
        if request.stop:
            raw["stop_sequences"] = list(request.stop)
        return raw

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
        """As the contract says. This API tells no token ids."""
        del token_ids
        raw = {**raw, "model": model, "stream": stream}
        if temperature is not None:
            raw["temperature"] = temperature
        if max_tokens is not None:
            raw["max_tokens"] = max(1, min(max_tokens, raw.get("max_tokens") or max_tokens))
        return raw

    def extend(self, raw: Json, messages: Sequence[Message]) -> Json:
        """As the contract says."""
        return {**raw, "messages": [*raw["messages"], *_write_messages(messages, {})]}

    def target(self, model: str, *, stream: bool, count: bool = False) -> str:
        """As the contract says."""
        del model, stream
        return "/v1/messages/count_tokens" if count else "/v1/messages"

    def key_headers(self, secret: bytes) -> Headers:
        """As the contract says."""
        return ((b"x-api-key", secret),)

    def parse_reply(self, raw: Json) -> Reply:
        """As the contract says."""
        parts: list[Part] = []
        for block in objects(raw.get("content"), "content"):
            parts.extend(_read_block(block, "content", {}))
        return Reply(
            id=string(raw.get("id"), "id"),
            model=string(raw.get("model"), "model"),
            parts=check_calls(parts),
            finish=_read_finish(raw.get("stop_reason"), parts),
            usage=_read_usage(raw.get("usage")),
        )

    def make_assembler(self, *, wants_usage: bool) -> MessagesAssembler:
        """As the contract says."""
        del wants_usage
        return MessagesAssembler()

    def write_reply(self, reply: Reply) -> Json:
        """As the contract says."""
        return {
            "id": reply.id,
            "type": "message",
            "role": "assistant",
            "model": reply.model,
            "content": [block for part in reply.parts if (block := _write_part(part, {})) is not None],
            "stop_reason": _write_finish(reply.finish),
            "stop_sequence": None,
            "usage": _write_usage(reply.usage),
        }

    def make_writer(self, reply_id: str, model: str) -> MessagesWriter:
        """As the contract says."""
        return MessagesWriter(reply_id, model)

    def write_error(self, status: int, message: str, rule: str) -> Json:
        """As the contract says."""
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(status, "permission_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message, "rule": rule}}

    def write_count(self, tokens: int) -> Json:
        """As the contract says."""
        return {"input_tokens": tokens}


class MessagesAssembler:
    """Events of a streamed message to a reply."""

    def __init__(self) -> None:
        self.is_over = False
        self._message: Json = {}
        self._blocks: list[Json] = []
        self._is_open = False
        self._holding = False
        self._stop: str | None = None
        self._usage: Json = {}

    def feed(self, event: SseEvent) -> Fed:
        """As the contract says."""
        if self.is_over:
            raise DialectError("more came after message_stop")
        raw = parse_object(event.data, "an event")
        kind = raw.get("type")
        if event.name and event.name != kind:
            raise DialectError("an event's name and its type differ")
        if kind == "error":
            raise DialectError(f"the upstream failed: {dump(raw.get('error'))[:500]}")
        if kind != "ping" and (kind == "message_start") == bool(self._message):
            raise DialectError("message_start has to come once and first")
        if kind == "message_start":
            self._message = obj(raw.get("message"), "message")
            self._usage = dict(obj(self._message.get("usage") or {}, "usage"))
            if self._message.get("content"):
                raise DialectError("message_start has content")
            return Fed(hold=self._holding)
        if kind in ("message_delta", "message_stop"):
            return self._feed_end(raw, kind)
        if kind not in _FORWARDED:
            return Fed(drop=True)
        return self._feed_block(raw, kind)

    def _feed_end(self, raw: Json, kind: str) -> Fed:
        self._holding = True
        if kind == "message_stop":
            self.is_over = True
        else:
            delta = obj(raw.get("delta") or {}, "delta")
            self._stop = string(delta.get("stop_reason"), "stop_reason") or self._stop
            self._usage.update({k: v for k, v in obj(raw.get("usage") or {}, "usage").items() if v is not None})
        return Fed(hold=True)

    def _feed_block(self, raw: Json, kind: Any) -> Fed:
        deltas: tuple[Delta, ...] = ()
        if kind == "content_block_start":
            if self._is_open or raw.get("index") != len(self._blocks):
                raise DialectError("content blocks have to come one after the other")
            self._is_open = True
            block = dict(obj(raw.get("content_block"), "content_block"))
            block["pieces"] = []
            self._blocks.append(block)
            if block.get("type") not in ("text", "thinking", "redacted_thinking"):
                self._holding = True
            if block.get("type") == "text" and block.get("text"):
                block["pieces"].append(string(block["text"], "text"))
                deltas = (Text(block["text"]),)
        elif kind in ("content_block_delta", "content_block_stop"):
            if not self._is_open or raw.get("index") != len(self._blocks) - 1:
                raise DialectError("a delta is for no open content block")
            if kind == "content_block_stop":
                self._is_open = False
            else:
                deltas = self._feed_delta(obj(raw.get("delta"), "delta"))
        return Fed(deltas, hold=self._holding)

    def _feed_delta(self, delta: Json) -> tuple[Delta, ...]:
        block, kind = self._blocks[-1], delta.get("type")
        if kind not in _DELTAS:
            raise DialectError(f"a delta of the kind {str(kind)[:40]!r} is not known")
        key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}.get(kind or "")
        if kind == "signature_delta":
            block["signature"] = string(block.get("signature"), "signature") + string(
                delta.get("signature"), "signature"
            )
        if key is None:
            return ()
        piece = string(delta.get(key), key)
        if (key == "partial_json") != (block.get("type") not in ("text", "thinking")) or (
            key != "partial_json" and key != block.get("type")
        ):
            raise DialectError("a delta does not fit its content block")
        block["pieces"].append(piece)
        if key == "partial_json" or not piece:
            return ()
        return (Text(piece) if key == "text" else Reasoning(piece),)

    def finish(self) -> Reply:
        """As the contract says."""
        if not self.is_over or self._is_open:
            raise DialectError("the stream ended before message_stop")
        parts: list[Part] = []
        for block in self._blocks:
            joined = "".join(block["pieces"])
            kind = block.get("type")
            if kind == "text":
                parts.append(Text(joined))
            elif kind == "thinking":
                parts.append(Reasoning(joined, string(block.get("signature"), "signature")))
            elif kind == "tool_use" and joined:
                parts.append(make_call(string(block.get("id"), "id"), string(block.get("name"), "name"), joined))
            else:
                parts.extend(_read_block(block, "content", {}))
        return Reply(
            id=string(self._message.get("id"), "id"),
            model=string(self._message.get("model"), "model"),
            parts=check_calls(parts),
            finish=_read_finish(self._stop, parts),
            usage=_read_usage(self._usage),
        )


class MessagesWriter:
    """A reply as events."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._id = reply_id
        self._model = model
        self._index = -1
        self._open: type[Delta] | None = None

    def _event(self, kind: str, **fields: Any) -> bytes:
        return write_event(dump({"type": kind, **fields}).encode(), kind)

    def start(self) -> bytes:
        """As the contract says."""
        message: Json = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _write_usage(Usage()),
        }
        return self._event("message_start", message=message) + self._event("ping")

    def _begin(self, block: Json) -> bytes:
        self._index += 1
        return self._event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        out = b""
        if self._open is Reasoning:
            # Their client wants one; only the provider that made a thought can sign it.
            out = self._event(
                "content_block_delta", index=self._index, delta={"type": "signature_delta", "signature": ""}
            )
        self._open = None
        return out + self._event("content_block_stop", index=self._index)

    def delta(self, delta: Delta) -> bytes:
        """As the contract says."""
        out, key = b"", "text" if isinstance(delta, Text) else "thinking"
        if self._open is not type(delta):
            out = self._close()
            self._open = type(delta)
            block = (
                {"type": "text", "text": ""} if key == "text" else {"type": "thinking", "thinking": "", "signature": ""}
            )
            out += self._begin(block)
        return out + self._event(
            "content_block_delta", index=self._index, delta={"type": f"{key}_delta", key: delta.text}
        )

    def finish(self, reply: Reply) -> bytes:
        """As the contract says."""
        out = [self._close()]
        for call in reply.tool_calls:
            out.append(self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}))
            delta = {"type": "input_json_delta", "partial_json": _write_arguments(call)}
            out.append(self._event("content_block_delta", index=self._index, delta=delta))
            out.append(self._event("content_block_stop", index=self._index))
        end = {"stop_reason": _write_finish(reply.finish), "stop_sequence": None}
        out.append(self._event("message_delta", delta=end, usage=_write_usage(reply.usage)))
        out.append(self._event("message_stop"))
        return b"".join(out)


def _clean_content(content: Any, granted: frozenset[str], stripped: list[str]) -> Any:
    if not isinstance(content, list):
        return content
    return [_clean_block(obj(block, "content"), granted, stripped) for block in content]


def _clean_block(block: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    kind = block.get("type")
    name = ""
    if kind in ("image", "document"):
        source = obj(block.get("source"), f"{kind}.source")
        if source.get("type") == "content":
            inner = _clean_content(source.get("content"), granted, stripped)
            return {**block, "source": {**source, "content": inner}}
        if source.get("type") not in ("base64", "text"):
            name = "files" if source.get("type") == "file" else "url_content"
    elif kind == "tool_result":
        return {**block, "content": _clean_content(block.get("content"), granted, stripped)}
    elif kind not in ("text", "tool_use", "thinking", "redacted_thinking", "search_result"):
        name = name_hosted(kind)
        for suffix in ("_tool_result", "_tool_use"):
            name = name_hosted(name.removesuffix(suffix))
        if name == "server":
            name = name_hosted(block.get("name"))
    if not name or name in granted:
        return block
    stripped.append(name)
    return {"type": "text", "text": removed(name)}


def _read_message(message: Json, where: str, blobs: dict[str, str]) -> list[Message]:
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise DialectError(f"{where}.role {str(role)[:40]!r} is not known")
    parts = _read_content(message.get("content"), f"{where}.content", blobs)
    results = tuple(part for part in parts if isinstance(part, ToolResult))
    rest = tuple(part for part in parts if not isinstance(part, ToolResult))
    out = [Message("tool", results)] if results else []
    if rest:
        out.append(Message("assistant" if role == "assistant" else "system" if role == "system" else "user", rest))
    return out


def _read_content(content: Any, where: str, blobs: dict[str, str]) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)] if content else []
    parts: list[Part] = []
    for block in objects(content, where):
        parts.extend(_read_block(block, where, blobs))
    return parts


def _read_block(block: Json, where: str, blobs: dict[str, str]) -> list[Part]:
    kind = block.get("type")
    if kind == "text":
        return [Text(string(block.get("text"), f"{where}.text"))]
    if kind == "thinking":
        return [Reasoning(string(block.get("thinking"), where), string(block.get("signature"), where))]
    if kind == "redacted_thinking":
        return [Reasoning("", string(block.get("data"), where))]
    if kind == "tool_use":
        arguments = dump(obj(block.get("input") if block.get("input") is not None else {}, f"{where}.input"))
        return [make_call(string(block.get("id"), "id"), string(block.get("name"), "name"), arguments)]
    if kind == "tool_result":
        inner = tuple(
            p for p in _read_content(block.get("content"), f"{where}.content", blobs) if isinstance(p, Text | Media)
        )
        return [ToolResult(string(block.get("tool_use_id"), where), inner, block.get("is_error") is True)]
    if kind in ("image", "document"):
        return [_read_source(obj(block.get("source"), where), where, blobs)]
    return [Text(f"[{name_hosted(kind)}] {dump(block)[:20000]}")]


def _read_source(source: Json, where: str, blobs: dict[str, str]) -> Part:
    if source.get("type") == "base64":
        try:
            return make_media(string(source.get("media_type"), where), string(source.get("data"), where), blobs)
        except ValueError as error:
            raise DialectError(f"{where}: {error}") from None
    if source.get("type") == "text":
        return Text(string(source.get("data"), where))
    if source.get("type") == "content":
        words = _read_content(source.get("content"), where, blobs)
        return Text("".join(p.text for p in words if isinstance(p, Text)))
    return Media("", url=string(source.get("url", source.get("file_id")), where)[:2000])


def _read_tool(tool: Json) -> Tool:
    kind = tool.get("type")
    return Tool(
        name=required(tool.get("name"), "tools.name"),
        description=string(tool.get("description"), "tools.description"),
        schema=dump(tool.get("input_schema") or {}),
        kind="function" if kind in (None, "custom") else name_hosted(kind),
    )


def _write_messages(messages: Sequence[Message], blobs: dict[str, str]) -> list[Json]:
    out: list[Json] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        blocks = [block for part in message.parts if (block := _write_part(part, blobs)) is not None]
        if out and out[-1]["role"] == role:
            out[-1]["content"].extend(blocks)
        elif blocks:
            out.append({"role": role, "content": blocks})
    return out


def _write_part(part: Part, blobs: dict[str, str]) -> Json | None:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text} if part.text else None
    if isinstance(part, Reasoning):
        if part.signature and not part.text:
            return {"type": "redacted_thinking", "data": part.signature}
        # A thought without a signature is refused when it is sent back, so it is shown only while it streams.
        return {"type": "thinking", "thinking": part.text, "signature": part.signature} if part.signature else None
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": loads(_write_arguments(part))}
    if isinstance(part, ToolResult):
        inner = [block for p in part.parts if (block := _write_part(p, blobs)) is not None]
        return {"type": "tool_result", "tool_use_id": part.call, "content": inner, "is_error": part.is_error}
    if part.digest in blobs:
        kind = "image" if part.media_type.startswith("image/") else "document"
        source = {"type": "base64", "media_type": part.media_type, "data": blobs[part.digest]}
        return {"type": kind, "source": source}
    return {"type": "text", "text": removed(part.media_type or "url_content")}


def _write_arguments(call: ToolCall) -> str:
    return dump({"input": call.arguments}) if call.kind == "custom" else call.arguments or "{}"


def _read_finish(reason: Any, parts: Sequence[Part]) -> Finish:
    if any(isinstance(part, ToolCall) for part in parts):
        return "tool_calls"
    return _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"


def _write_finish(finish: Finish) -> str:
    return {"tool_calls": "tool_use", "length": "max_tokens", "filtered": "refusal"}.get(finish, "end_turn")


def _read_usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage()
    plain = count(usage.get("input_tokens"))
    cached = count(usage.get("cache_read_input_tokens"))
    made = count(usage.get("cache_creation_input_tokens"))
    return Usage(
        prompt_tokens=None if plain is None else plain + (cached or 0) + (made or 0),
        completion_tokens=count(usage.get("output_tokens")),
        cached_tokens=cached,
    )


def _write_usage(usage: Usage) -> Json:
    cached = usage.cached_tokens or 0
    return {
        "input_tokens": max(0, (usage.prompt_tokens or 0) - cached),
        "output_tokens": usage.completion_tokens or 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }
