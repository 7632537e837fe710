"""OpenAI chat completions, as its own SDK and compatible servers (vLLM, SGLang, llama.cpp) speak it.

Source: OpenAI API reference, ``POST /v1/chat/completions``; vLLM's ``return_token_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vallum.core.clock import wall_ns
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
    Role,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
    fold,
    make_media,
)
from vallum.gateway.model.dialects.contract import DialectError, Fed, Headers, Json, Route
from vallum.gateway.model.dialects.fields import (
    arr,
    count,
    dump,
    ids,
    integer,
    names,
    number,
    obj,
    objects,
    parse_object,
    required,
    string,
)
from vallum.gateway.model.dialects.hosted import is_web_address, keep_known, name_hosted, removed
from vallum.gateway.model.sse import SseEvent, write_event

_KNOWN = names(
    "messages model tools tool_choice parallel_tool_calls stream stream_options temperature top_p top_k min_p n stop"
    " max_tokens max_completion_tokens seed logprobs top_logprobs logit_bias presence_penalty frequency_penalty"
    " repetition_penalty response_format reasoning_effort reasoning thinking verbosity user safety_identifier"
    " prompt_cache_key service_tier metadata store chat_template_kwargs return_token_ids guided_json guided_regex"
    " guided_choice guided_grammar structured_outputs ignore_eos min_tokens skip_special_tokens stop_token_ids"
    " enable_thinking num_ctx cache_control modalities prediction"
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FINISH: dict[str, Finish] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "length": "length",
    "content_filter": "filtered",
}
_CLEANED = frozenset({"text", "refusal", "input_audio", "thinking", "reasoning"})


class Chat:
    """The dialect ``chat``."""

    name: DialectName = "chat"

    def clean(self, raw: Json, granted: frozenset[str]) -> tuple[Json, list[str]]:
        """As the contract says. ``n`` other than 1 is refused: one call is one sample of one branch."""
        stripped: list[str] = []
        kept = keep_known(raw, _KNOWN, granted, stripped)
        if kept.get("n") not in (None, 1):
            raise DialectError("n has to be 1: ask once for each sample")
        if kept.pop("store", None) and "store" not in granted:
            stripped.append("store")
        tools = []
        for tool in objects(kept.get("tools"), "tools"):
            if tool.get("type") in ("function", "custom") or name_hosted(tool.get("type")) in granted:
                tools.append(tool)
            else:
                stripped.append(name_hosted(tool.get("type")))
        kept["messages"] = [_clean_message(m, granted, stripped) for m in objects(kept.get("messages"), "messages")]
        if "tools" in kept:
            kept["tools"] = tools
        settle_choice(kept, {_tool_name(tool) for tool in tools})
        return kept, stripped

    def parse_request(self, raw: Json, route: Route) -> ModelRequest:
        """As the contract says."""
        del route
        blobs: dict[str, str] = {}
        messages = [
            _read_message(m, f"messages[{i}]", blobs) for i, m in enumerate(objects(raw["messages"], "messages"))
        ]
        if not messages:
            raise DialectError("messages has to have at least one message")
        stop = raw.get("stop")
        return ModelRequest(
            model=required(raw.get("model"), "model"),
            messages=fold(messages),
            tools=tuple(_read_tool(tool) for tool in objects(raw.get("tools"), "tools")),
            stream=raw.get("stream") is True,
            temperature=number(raw.get("temperature"), "temperature"),
            top_p=number(raw.get("top_p"), "top_p"),
            max_tokens=integer(raw.get("max_completion_tokens", raw.get("max_tokens")), "max_tokens"),
            stop=(stop,) if isinstance(stop, str) else tuple(string(s, "stop") for s in arr(stop, "stop")),
            tool_choice=_read_choice(raw.get("tool_choice")),
            blobs=blobs,
        )

    def write_request(self, request: ModelRequest) -> Json:
        """As the contract says."""
        raw: Json = {"model": request.model, "messages": _write_messages(request.messages, request.blobs)}
        if request.tools:
            raw["tools"] = [_write_tool(tool) for tool in request.tools]
        if request.tools and request.tool_choice:
            name = request.tool_choice[1:] if request.tool_choice.startswith("=") else ""
            raw["tool_choice"] = {"type": "function", "function": {"name": name}} if name else request.tool_choice
        for key in ("temperature", "top_p", "max_tokens"):
            if (value := getattr(request, key)) is not None:
                raw[key] = value
        if request.stop:
            raw["stop"] = list(request.stop)
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
        """As the contract says. A stream is asked for its usage."""
        raw = {**raw, "model": model, "stream": stream}
        raw.pop("stream_options", None)
        if stream:
            raw["stream_options"] = {"include_usage": True}
        if temperature is not None:
            raw["temperature"] = temperature
        if max_tokens is not None:
            # Which of the two a server obeys where there are both is its own affair.
            for key in {"max_completion_tokens", "max_tokens"} & raw.keys() or {"max_tokens"}:
                raw[key] = max(1, min(max_tokens, raw.get(key) or max_tokens))
        if token_ids:
            raw["logprobs"] = True
            raw["return_token_ids"] = True
        return raw

    def extend(self, raw: Json, messages: Sequence[Message]) -> Json:
        """As the contract says."""
        return {**raw, "messages": [*raw["messages"], *_write_messages(messages, {})]}

    def target(self, model: str, *, stream: bool, count: bool = False) -> str:
        """As the contract says."""
        del model, stream, count
        return "/v1/chat/completions"

    def key_headers(self, secret: bytes) -> Headers:
        """As the contract says."""
        return ((b"authorization", b"Bearer " + secret),)

    def parse_reply(self, raw: Json) -> Reply:
        """As the contract says."""
        choices = objects(raw.get("choices"), "choices")
        if len(choices) != 1:
            raise DialectError(f"the reply has {len(choices)} choices instead of one")
        choice = choices[0]
        message = obj(choice.get("message"), "choices[0].message")
        parts: list[Part] = []
        if thought := _thought(message):
            parts.append(Reasoning(thought))
        parts.extend(_read_content(message.get("content"), "content", {}))
        if refusal := string(message.get("refusal"), "refusal"):
            parts.append(Text(refusal))
        parts.extend(_read_calls(message))
        return Reply(
            id=string(raw.get("id"), "id"),
            model=string(raw.get("model"), "model"),
            parts=tuple(parts),
            finish=_read_finish(choice.get("finish_reason"), parts),
            usage=_read_usage(raw.get("usage")),
            prompt_token_ids=ids(raw.get("prompt_token_ids")),
            completion_token_ids=ids(choice.get("token_ids")),
            logprobs=_read_logprobs(choice.get("logprobs")),
            policy_version=_read_version(raw),
        )

    def make_assembler(self, *, wants_usage: bool) -> ChatAssembler:
        """As the contract says."""
        return ChatAssembler(wants_usage=wants_usage)

    def write_reply(self, reply: Reply) -> Json:
        """As the contract says."""
        message: Json = {"role": "assistant", "content": reply.text or None, "refusal": None}
        if thought := "".join(p.text for p in reply.parts if isinstance(p, Reasoning)):
            message["reasoning_content"] = thought
        if reply.tool_calls:
            message["tool_calls"] = [_write_call(call) for call in reply.tool_calls]
        choice: Json = {
            "index": 0,
            "message": message,
            "finish_reason": _write_finish(reply.finish),
            "logprobs": None,
        }
        return {
            "id": reply.id,
            "object": "chat.completion",
            "created": wall_ns() // 1_000_000_000,
            "model": reply.model,
            "choices": [choice],
            "usage": _write_usage(reply.usage),
        }

    def make_writer(self, reply_id: str, model: str) -> ChatWriter:
        """As the contract says."""
        return ChatWriter(reply_id, model)

    def write_error(self, status: int, message: str, rule: str) -> Json:
        """As the contract says."""
        kinds = {400: "invalid_request_error", 401: "invalid_request_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "permission_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": rule}}

    def write_count(self, tokens: int) -> Json:
        """Chat completions count no tokens beforehand."""
        return {"input_tokens": tokens}


class ChatAssembler:
    """Chunks of a streamed completion to a reply."""

    def __init__(self, *, wants_usage: bool) -> None:
        self.is_over = False
        self._wants_usage = wants_usage
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: dict[int, Json] = {}
        self._finish = ""
        self._usage = Usage()
        self._holding = False
        self._head: Json = {}
        self._prompt_ids: list[int] | None = None
        self._ids: list[int] | None = None
        self._logprobs: list[float] | None = None

    def feed(self, event: SseEvent) -> Fed:
        """As the contract says."""
        if self.is_over:
            raise DialectError("more came after [DONE]")
        if event.data == "[DONE]":
            self.is_over = self._holding = True
            return Fed(hold=True)
        raw = parse_object(event.data, "a chunk")
        if raw.get("error"):
            raise DialectError(f"the upstream failed: {dump(raw['error'])[:500]}")
        self._head = self._head or raw
        if (usage := raw.get("usage")) is not None:
            self._usage = _read_usage(usage)
        self._prompt_ids = self._prompt_ids or ids(raw.get("prompt_token_ids"))
        choices = objects(raw.get("choices"), "choices")
        if not choices:
            return Fed(hold=self._holding, drop=not self._wants_usage or usage is None)
        if len(choices) > 1 or choices[0].get("index") not in (None, 0):
            raise DialectError("the reply has more than one choice")
        return self._feed_choice(choices[0])

    def _feed_choice(self, choice: Json) -> Fed:
        delta = obj(choice.get("delta") or {}, "delta")
        self._take_calls(delta)
        if finish := string(choice.get("finish_reason"), "finish_reason"):
            self._finish = finish
            self._holding = True
        if (new := ids(choice.get("token_ids"))) is not None:
            self._ids = [*(self._ids or []), *new]
        if (probs := _read_logprobs(choice.get("logprobs"))) is not None:
            self._logprobs = [*(self._logprobs or []), *probs]
        deltas: list[Delta] = []
        if thought := _thought(delta):
            self._thought.append(thought)
            deltas.append(Reasoning(thought))
        for words in (string(delta.get("content"), "content"), string(delta.get("refusal"), "refusal")):
            if words:
                self._text.append(words)
                deltas.append(Text(words))
        return Fed(tuple(deltas), hold=self._holding)

    def _take_calls(self, delta: Json) -> None:
        pieces = objects(delta.get("tool_calls"), "tool_calls")
        if delta.get("function_call"):
            pieces.append({"index": 0, "type": "function", "function": delta["function_call"]})
        for piece in pieces:
            self._holding = True
            index = integer(piece.get("index"), "tool_calls.index")
            call = self._calls.setdefault(0 if index is None else index, {"id": "", "name": "", "pieces": []})
            given = string(piece.get("id"), "tool_calls.id")
            if given and call["id"] and given != call["id"]:
                raise DialectError(f"tool call {index} has two ids")
            call["id"] = given or call["id"]
            kind = piece.get("type") or call.get("kind") or "function"
            call["kind"] = kind
            inner = obj(piece.get("custom" if kind == "custom" else "function") or {}, "tool_calls.function")
            name = string(inner.get("name"), "tool_calls.function.name")
            if name and call["name"] and name != call["name"]:
                raise DialectError(f"tool call {index} has two names")
            call["name"] = name or call["name"]
            call["pieces"].append(string(inner.get("input" if kind == "custom" else "arguments"), "arguments"))

    def finish(self) -> Reply:
        """As the contract says. Many servers leave [DONE] out, none may leave the finish_reason out."""
        if not self._finish:
            raise DialectError("the stream ended before its finish_reason")
        parts: list[Part] = []
        if self._thought:
            parts.append(Reasoning("".join(self._thought)))
        if self._text:
            parts.append(Text("".join(self._text)))
        for _, call in sorted(self._calls.items()):
            parts.append(make_call(call["id"], call["name"], "".join(call["pieces"]), custom=call["kind"] == "custom"))
        return Reply(
            id=string(self._head.get("id"), "id"),
            model=string(self._head.get("model"), "model"),
            parts=check_calls(parts),
            finish=_read_finish(self._finish, parts),
            usage=self._usage,
            prompt_token_ids=self._prompt_ids,
            completion_token_ids=self._ids,
            logprobs=self._logprobs,
            policy_version=_read_version(self._head),
        )


class ChatWriter:
    """A reply as chunks."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._frame: Json = {
            "id": reply_id,
            "object": "chat.completion.chunk",
            "created": wall_ns() // 1_000_000_000,
            "model": model,
        }

    def _chunk(self, delta: Json, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return write_event(dump({**self._frame, "choices": [choice]}).encode())

    def start(self) -> bytes:
        """As the contract says."""
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, delta: Delta) -> bytes:
        """As the contract says."""
        return self._chunk({"content" if isinstance(delta, Text) else "reasoning_content": delta.text})

    def finish(self, reply: Reply) -> bytes:
        """As the contract says. The usage goes into the last chunk and one of its own, where clients look for it."""
        out = [
            self._chunk({"tool_calls": [{"index": index, **_write_call(call)}]})
            for index, call in enumerate(reply.tool_calls)
        ]
        out.append(self._chunk({}, _write_finish(reply.finish)))
        out.append(write_event(dump({**self._frame, "choices": [], "usage": _write_usage(reply.usage)}).encode()))
        out.append(write_event(b"[DONE]"))
        return b"".join(out)


def make_call(call_id: str, name: str, arguments: str, *, custom: bool = False) -> ToolCall:
    """A tool call, checked. Raises DialectError when it has no name."""
    if not name:
        raise DialectError("a tool call has no name")
    return ToolCall(id=call_id, name=name, arguments=arguments, kind="custom" if custom else "function")


def check_calls(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, if no two tool calls have one id. Raises DialectError."""
    given = [part.id for part in parts if isinstance(part, ToolCall) and part.id]
    if len(given) != len(set(given)):
        raise DialectError("two tool calls of the reply have one id")
    return tuple(parts)


def settle_choice(raw: Json, names: set[str]) -> None:
    """Drop a ``tool_choice`` that no tool is left for, and an empty list of tools."""
    if "tools" in raw and not raw["tools"]:
        raw.pop("tools")
        raw.pop("parallel_tool_calls", None)
    choice = raw.get("tool_choice")
    if isinstance(choice, dict):
        inner = choice.get("function") or choice.get("custom") or choice
        if not isinstance(inner, dict) or inner.get("name") not in names:
            raw.pop("tool_choice")
    elif "tools" not in raw:
        raw.pop("tool_choice", None)


def _tool_name(tool: Json) -> str:
    inner = tool.get(tool.get("type") or "function")
    return string(inner.get("name"), "tools.name") if isinstance(inner, dict) else ""


def _clean_message(message: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_clean_part(obj(part, "content"), granted, stripped) for part in content]}


def _clean_part(part: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    kind = part.get("type")
    if kind in _CLEANED:
        return part
    name = ""
    if kind == "image_url":
        image = part.get("image_url")
        if is_web_address(image.get("url") if isinstance(image, dict) else image):
            name = "url_content"
    elif kind == "file":
        file = obj(part.get("file"), "file")
        if file.get("file_id") is not None:
            name = "files"
        elif set(file) - {"file_data", "filename"}:
            name = "url_content"
    else:
        name = name_hosted(kind)
    if not name or name in granted:
        return part
    stripped.append(name)
    return {"type": "text", "text": removed(name)}


def _read_message(message: Json, where: str, blobs: dict[str, str]) -> Message:
    role = _ROLES.get(string(message.get("role"), f"{where}.role"))
    if role is None:
        raise DialectError(f"{where}.role {str(message.get('role'))[:40]!r} is not known")
    parts: list[Part] = []
    if role == "assistant" and (thought := _thought(message)):
        parts.append(Reasoning(thought))
    parts.extend(_read_content(message.get("content"), f"{where}.content", blobs))
    if role == "assistant":
        parts.extend(_read_calls(message))
    if role == "tool":
        call = string(message.get("tool_call_id", message.get("name")), f"{where}.tool_call_id")
        return Message("tool", (ToolResult(call, tuple(p for p in parts if isinstance(p, Text | Media))),))
    return Message(role, tuple(parts))


def _read_content(content: Any, where: str, blobs: dict[str, str]) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)] if content else []
    parts: list[Part] = []
    for part in objects(content, where):
        kind = part.get("type")
        if kind in ("text", "refusal"):
            parts.append(Text(string(part.get(kind), f"{where}.{kind}")))
        elif kind in ("thinking", "reasoning"):
            parts.append(Reasoning(string(part.get(kind, part.get("text")), where)))
        elif kind == "image_url":
            image = part.get("image_url")
            parts.append(read_data_url(string(image.get("url") if isinstance(image, dict) else image, where), blobs))
        elif kind == "input_audio":
            audio = obj(part.get("input_audio"), where)
            parts.append(_media(f"audio/{string(audio.get('format'), where)}", audio.get("data"), where, blobs))
        elif kind == "file":
            file = obj(part.get("file"), where)
            data = string(file.get("file_data"), where)
            parts.append(
                read_data_url(data, blobs)
                if data[:5].lower() == "data:"
                else _media("application/pdf", data, where, blobs)
                if data
                else Media("application/octet-stream", url=f"file:{file.get('file_id')}")
            )
        else:
            parts.append(Media("application/octet-stream", url=f"{name_hosted(kind)}:"))
    return parts


def _media(media_type: str, data: Any, where: str, blobs: dict[str, str]) -> Media:
    try:
        return make_media(media_type, string(data, where), blobs)
    except ValueError as error:
        raise DialectError(f"{where}: {error}") from None


def read_data_url(url: str, blobs: dict[str, str]) -> Media:
    """The media of a ``data:`` URL (RFC 2397, base64 only), or of an address. Raises DialectError."""
    if is_web_address(url):
        return Media("", url=url[:2000])
    head, comma, data = url[5:].partition(",")
    media_type, _, coding = head.partition(";")
    if not comma or not coding.endswith("base64"):
        raise DialectError("a data: URL is not base64")
    return _media(media_type or "text/plain", data, "data: URL", blobs)


def _read_calls(message: Json) -> list[Part]:
    calls: list[Part] = []
    for call in objects(message.get("tool_calls"), "tool_calls"):
        custom = call.get("type") == "custom"
        inner = obj(call.get("custom" if custom else "function"), "tool_calls.function")
        arguments = string(inner.get("input" if custom else "arguments"), "arguments")
        calls.append(
            make_call(string(call.get("id"), "id"), string(inner.get("name"), "name"), arguments, custom=custom)
        )
    if legacy := message.get("function_call"):
        inner = obj(legacy, "function_call")
        calls.append(make_call("", string(inner.get("name"), "name"), string(inner.get("arguments"), "arguments")))
    return list(check_calls(calls))


def _thought(message: Json) -> str:
    for key in ("reasoning_content", "reasoning"):
        if isinstance(value := message.get(key), str) and value:
            return value
    return ""


def _read_tool(tool: Json) -> Tool:
    kind = string(tool.get("type"), "tools.type") or "function"
    inner = obj(tool.get(kind) or {}, "tools.function")
    return Tool(
        name=string(inner.get("name"), "tools.name") or kind,
        description=string(inner.get("description"), "tools.description"),
        schema=dump(inner.get("parameters") or inner.get("format") or {}),
        kind=kind,
    )


def _write_tool(tool: Tool) -> Json:
    schema = parse_object(tool.schema, "schema") if tool.kind == "function" else {"type": "object"}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


def _read_choice(choice: Any) -> str:
    if isinstance(choice, dict):
        inner = choice.get("function") or choice.get("custom") or choice
        return f"={inner.get('name')}" if isinstance(inner, dict) and inner.get("name") else ""
    return choice if choice in ("auto", "none", "required") else ""


def _write_messages(messages: Sequence[Message], blobs: dict[str, str]) -> list[Json]:
    out: list[Json] = []
    for message in messages:
        calls = [_write_call(part) for part in message.parts if isinstance(part, ToolCall)]
        results = [part for part in message.parts if isinstance(part, ToolResult)]
        out.extend({"role": "tool", "tool_call_id": r.call, "content": _write_content(r.parts, blobs)} for r in results)
        rest = [part for part in message.parts if isinstance(part, Text | Media)]
        if not rest and not calls:
            continue
        written: Json = {"role": message.role, "content": _write_content(rest, blobs) if rest else None}
        if calls:
            written["tool_calls"] = calls
        out.append(written)
    return out


def _write_content(parts: Sequence[Part], blobs: dict[str, str]) -> str | list[Json]:
    if all(isinstance(part, Text) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, Text))
    out: list[Json] = []
    for part in parts:
        if isinstance(part, Text):
            out.append({"type": "text", "text": part.text})
        elif isinstance(part, Media) and part.media_type.startswith("image/") and part.digest in blobs:
            url = f"data:{part.media_type};base64,{blobs[part.digest]}"
            out.append({"type": "image_url", "image_url": {"url": url}})
        elif isinstance(part, Media):
            out.append({"type": "text", "text": removed(part.media_type or "url_content")})
    return out


def _write_call(call: ToolCall) -> Json:
    if call.kind == "custom":
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _read_finish(reason: Any, parts: Sequence[Part]) -> Finish:
    if any(isinstance(part, ToolCall) for part in parts):
        return "tool_calls"
    return _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"


def _write_finish(finish: Finish) -> str:
    return {"tool_calls": "tool_calls", "length": "length", "filtered": "content_filter"}.get(finish, "stop")


def _read_usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=count(usage.get("prompt_tokens")),
        completion_tokens=count(usage.get("completion_tokens")),
        cached_tokens=count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    )


def _write_usage(usage: Usage) -> Json:
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
    }


def _read_logprobs(value: Any) -> list[float] | None:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, list):
        return None
    probs = [item.get("logprob") for item in content if isinstance(item, dict)]
    return [float(p) for p in probs if isinstance(p, int | float) and not isinstance(p, bool)]


def _read_version(raw: Json) -> str:
    for key in ("policy_version", "weight_version", "model_version", "system_fingerprint"):
        if isinstance(value := raw.get(key), str | int) and value != "":
            return str(value)[:200]
    return ""
