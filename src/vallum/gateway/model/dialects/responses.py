"""OpenAI responses, streamed and not, stateless towards the provider.

Nothing is stored there: ``store`` is turned off, and ``previous_response_id`` is expanded from what this gateway has
seen of the same cell (by the caller, with :func:`join_input`). Source: OpenAI API reference, ``POST /v1/responses`` and
its streaming events; the order of events is the one that OpenAI's SDKs and Codex wait for.
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
from vallum.gateway.model.dialects.chat import check_calls, make_call, read_data_url, settle_choice
from vallum.gateway.model.dialects.contract import DialectError, Fed, Headers, Json, Route
from vallum.gateway.model.dialects.fields import (
    arr,
    count,
    dump,
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
    "model input instructions tools tool_choice parallel_tool_calls stream stream_options temperature top_p"
    " max_output_tokens max_tool_calls reasoning text truncation metadata store include prompt_cache_key"
    " prompt_cache_retention safety_identifier service_tier user top_logprobs client_metadata"
)
_OWN_TOOLS = frozenset({"function", "custom", "local_shell", "shell", "apply_patch", "namespace"})
"""Tools that the agent runs."""
_OWN_CALLS = frozenset({"function_call", "custom_tool_call", "local_shell_call", "shell_call", "apply_patch_call"})
_INCLUDED = frozenset({"reasoning.encrypted_content", "message.output_text.logprobs"})
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SAID = frozenset({"message", "reasoning"})
_FORWARDED = (
    "response.created",
    "response.in_progress",
    "response.queued",
    "response.output_item.",
    "response.content_part.",
    "response.output_text.",
    "response.refusal.",
    "response.reasoning_",
    "response.function_call_arguments.",
    "response.custom_tool_call_input.",
)
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})


class Responses:
    """The dialect ``responses``."""

    name: DialectName = "responses"

    def clean(self, raw: Json, granted: frozenset[str]) -> tuple[Json, list[str]]:
        """As the contract says. ``background`` and ``conversation`` are refused: what they ask for is kept elsewhere."""
        for key in ("background", "conversation", "previous_response_id"):
            if raw.get(key):
                raise DialectError(f"{key} is not possible here: send the whole input")
        stripped: list[str] = []
        kept = keep_known(raw, _KNOWN, granted, stripped)
        kept["tools"] = _clean_tools(kept.get("tools"), granted, stripped)
        include = [string(item, "include") for item in arr(kept.get("include"), "include")]
        stripped.extend(name_hosted(item.partition(".")[0]) for item in include if not _may_include(item, granted))
        include = [item for item in include if _may_include(item, granted)]
        if kept.get("store") is not False and "reasoning.encrypted_content" not in include:
            include.append("reasoning.encrypted_content")
        kept["include"] = include
        kept["store"] = False
        kept["input"] = [_clean_item(item, granted, stripped) for item in items_of(raw)]
        settle_choice(kept, {name for tool in kept["tools"] for name in _tool_names(tool)})
        return kept, stripped

    def parse_request(self, raw: Json, route: Route) -> ModelRequest:
        """As the contract says."""
        del route
        blobs: dict[str, str] = {}
        messages = (
            [Message("system", (Text(words),))] if (words := string(raw.get("instructions"), "instructions")) else []
        )
        messages += [_read_item(item, f"input[{index}]", blobs) for index, item in enumerate(raw["input"])]
        if not raw["input"]:
            raise DialectError("input has to have at least one item")
        choice = raw.get("tool_choice")
        return ModelRequest(
            model=required(raw.get("model"), "model"),
            messages=fold(messages),
            tools=tuple(tool for raw_tool in objects(raw.get("tools"), "tools") for tool in _read_tools(raw_tool)),
            stream=raw.get("stream") is True,
            temperature=number(raw.get("temperature"), "temperature"),
            top_p=number(raw.get("top_p"), "top_p"),
            max_tokens=integer(raw.get("max_output_tokens"), "max_output_tokens"),
            tool_choice=f"={choice['name']}"
            if isinstance(choice, dict) and choice.get("name")
            else choice
            if choice in ("auto", "none", "required")
            else "",
            blobs=blobs,
        )

    def write_request(self, request: ModelRequest) -> Json:
        """As the contract says."""
        raw: Json = {"model": request.model, "input": _write_messages(request.messages, request.blobs), "store": False}
        if request.tools:
            raw["tools"] = [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": parse_object(tool.schema, "schema")
                    if tool.kind == "function"
                    else {"type": "object"},
                    "strict": False,
                }
                for tool in request.tools
            ]
            if request.tool_choice.startswith("="):
                raw["tool_choice"] = {"type": "function", "name": request.tool_choice[1:]}
            elif request.tool_choice:
                raw["tool_choice"] = request.tool_choice
        for key, value in (
            ("temperature", request.temperature),
            ("top_p", request.top_p),
            ("max_output_tokens", request.max_tokens),
        ):
            if value is not None:
                raw[key] = value
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
        """As the contract says."""
        raw = {**raw, "model": model, "stream": stream}
        if temperature is not None:
            raw["temperature"] = temperature
        if max_tokens is not None:
            raw["max_output_tokens"] = max(16, min(max_tokens, raw.get("max_output_tokens") or max_tokens))
        if token_ids:
            raw["include"] = sorted({*raw.get("include", ()), "message.output_text.logprobs"})
            raw["return_token_ids"] = True
        return raw

    def extend(self, raw: Json, messages: Sequence[Message]) -> Json:
        """As the contract says."""
        return {**raw, "input": [*raw["input"], *_write_messages(messages, {})]}

    def target(self, model: str, *, stream: bool, count: bool = False) -> str:
        """As the contract says."""
        del model, stream, count
        return "/v1/responses"

    def key_headers(self, secret: bytes) -> Headers:
        """As the contract says."""
        return ((b"authorization", b"Bearer " + secret),)

    def parse_reply(self, raw: Json) -> Reply:
        """As the contract says."""
        if raw.get("status") == "failed" or raw.get("error"):
            raise DialectError(f"the upstream failed: {dump(raw.get('error'))[:500]}")
        parts: list[Part] = []
        probs: list[float] = []
        for item in objects(raw.get("output"), "output"):
            parts.extend(_read_output(item))
            probs.extend(_read_logprobs(item))
        usage = raw.get("usage")
        reason = raw.get("incomplete_details")
        return Reply(
            id=string(raw.get("id"), "id"),
            model=string(raw.get("model"), "model"),
            parts=check_calls(parts),
            finish=_read_finish(raw.get("status"), reason.get("reason") if isinstance(reason, dict) else None, parts),
            usage=_read_usage(usage if isinstance(usage, dict) else {}),
            logprobs=probs or None,
        )

    def make_assembler(self, *, wants_usage: bool) -> ResponsesAssembler:
        """As the contract says."""
        del wants_usage
        return ResponsesAssembler()

    def write_reply(self, reply: Reply) -> Json:
        """As the contract says."""
        return _write_response(reply.id, reply.model, _write_output(reply), reply)

    def make_writer(self, reply_id: str, model: str) -> ResponsesWriter:
        """As the contract says."""
        return ResponsesWriter(reply_id, model)

    def write_error(self, status: int, message: str, rule: str) -> Json:
        """As the contract says."""
        kinds = {400: "invalid_request_error", 401: "invalid_request_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "permission_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": rule}}

    def write_count(self, tokens: int) -> Json:
        """As the contract says."""
        return {"object": "response.input_tokens", "input_tokens": tokens}


class ResponsesAssembler:
    """Events of a streamed response to a reply."""

    def __init__(self) -> None:
        self.is_over = False
        self._holding = False
        self._items: list[Json] = []
        self._last: Json | None = None

    def feed(self, event: SseEvent) -> Fed:
        """As the contract says."""
        if event.data == "[DONE]":
            return Fed(drop=True)
        if self.is_over:
            raise DialectError("more came after the response was complete")
        raw = parse_object(event.data, "an event")
        kind = string(raw.get("type"), "type")
        if event.name and event.name != kind:
            raise DialectError("an event's name and its type differ")
        if kind == "error":
            raise DialectError(f"the upstream failed: {dump(raw)[:500]}")
        if kind in _LAST:
            self._last = obj(raw.get("response"), "response")
            self.is_over = self._holding = True
            return Fed(hold=True)
        return self._feed_item(raw, kind)

    def _feed_item(self, raw: Json, kind: str) -> Fed:
        if not kind.startswith(_FORWARDED):
            # The progress of a hosted tool that was granted, or a kind that nobody here knows: not before the end.
            self._holding = True
            return Fed(hold=True, drop=not kind.startswith("response."))
        if kind in ("response.output_item.added", "response.output_item.done"):
            item = obj(raw.get("item"), "item")
            if item.get("type") not in _SAID:
                self._holding = True
            if kind.endswith("done"):
                self._items.append(item)
        deltas: tuple[Delta, ...] = ()
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            deltas = (Text(string(raw.get("delta"), "delta")),)
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            deltas = (Reasoning(string(raw.get("delta"), "delta")),)
        elif "call" in kind:
            self._holding = True
        return Fed(deltas, hold=self._holding)

    def finish(self) -> Reply:
        """As the contract says. The calls told one by one and those of the last event have to be the same."""
        if self._last is None:
            raise DialectError("the stream ended before response.completed")
        told = self._last.get("output")
        reply = RESPONSES.parse_reply({**self._last, "output": told or self._items})
        one_by_one = [part for item in self._items for part in _read_output(item) if isinstance(part, ToolCall)]
        if one_by_one and one_by_one != list(reply.tool_calls):
            raise DialectError("the tool calls of the stream and of its last event differ")
        return reply


class ResponsesWriter:
    """A reply as events."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._id = reply_id
        self._model = model
        self._seq = -1
        self._items: list[Json] = []
        self._open: type[Delta] | None = None
        self._words: list[str] = []

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._seq += 1
        return write_event(dump({"type": kind, "sequence_number": self._seq, **fields}).encode(), kind)

    def start(self) -> bytes:
        """As the contract says."""
        response = _write_response(self._id, self._model, [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, delta: Delta) -> bytes:
        """As the contract says."""
        out = b""
        if self._open is not type(delta):
            out = self._close()
            self._open = type(delta)
            out += self._begin(is_text=isinstance(delta, Text))
        self._words.append(delta.text)
        if isinstance(delta, Text):
            return out + self._event(
                "response.output_text.delta", **self._where("content_index"), delta=delta.text, logprobs=[]
            )
        return out + self._event(
            "response.reasoning_summary_text.delta", **self._where("summary_index"), delta=delta.text
        )

    def _where(self, index: str) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, index: 0}

    def _begin(self, *, is_text: bool) -> bytes:
        index = len(self._items)
        if is_text:
            item: Json = {
                "id": f"msg_{self._id}_{index}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            kind, where, part = "response.content_part.added", "content_index", _write_text("")
        else:
            item = {"id": f"rs_{self._id}_{index}", "type": "reasoning", "summary": []}
            kind, where, part = (
                "response.reasoning_summary_part.added",
                "summary_index",
                {"type": "summary_text", "text": ""},
            )
        self._items.append(item)
        out = self._event("response.output_item.added", output_index=index, item=item)
        return out + self._event(kind, **self._where(where), part=part)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        words, index = "".join(self._words), len(self._items) - 1
        if self._open is Text:
            part = _write_text(words)
            where = self._where("content_index")
            out = self._event("response.output_text.done", **where, text=words, logprobs=[])
            out += self._event("response.content_part.done", **where, part=part)
            self._items[-1] = {**self._items[-1], "status": "completed", "content": [part]}
        else:
            part = {"type": "summary_text", "text": words}
            where = self._where("summary_index")
            out = self._event("response.reasoning_summary_text.done", **where, text=words)
            out += self._event("response.reasoning_summary_part.done", **where, part=part)
            self._items[-1] = {**self._items[-1], "summary": [part]}
        self._open, self._words = None, []
        return out + self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def finish(self, reply: Reply) -> bytes:
        """As the contract says."""
        out = [self._close()]
        for call in reply.tool_calls:
            index = len(self._items)
            item = _write_call(call, f"fc_{self._id}_{index}")
            key = "input" if call.kind == "custom" else "arguments"
            kind = "custom_tool_call_input" if call.kind == "custom" else "function_call_arguments"
            self._items.append(item)
            out.append(
                self._event(
                    "response.output_item.added", output_index=index, item={**item, "status": "in_progress", key: ""}
                )
            )
            where = {"item_id": item["id"], "output_index": index}
            out.append(self._event(f"response.{kind}.delta", **where, delta=item[key]))
            out.append(self._event(f"response.{kind}.done", **where, **{key: item[key]}))
            out.append(self._event("response.output_item.done", output_index=index, item=item))
        kind = "response.incomplete" if reply.finish in ("length", "filtered") else "response.completed"
        out.append(self._event(kind, response=_write_response(self._id, self._model, self._items, reply)))
        return b"".join(out)


def items_of(raw: Json) -> list[Json]:
    """The items of a request's ``input``; a string is one message of the user. Raises DialectError."""
    value = raw.get("input")
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return objects(value, "input")


def join_input(raw: Json, earlier: list[Json]) -> Json:
    """The request with what was said before in front, in the place of ``previous_response_id``."""
    joined = {**raw, "input": [*earlier, *items_of(raw)]}
    joined.pop("previous_response_id", None)
    return joined


def output_items(reply: Reply) -> list[Json]:
    """A reply as items that may be given back as input."""
    return _write_messages([Message("assistant", reply.parts)], {})


def _may_include(item: str, granted: frozenset[str]) -> bool:
    return item in _INCLUDED or name_hosted(item.partition(".")[0].removesuffix("_call")) in granted


def _clean_tools(tools: Any, granted: frozenset[str], stripped: list[str]) -> list[Json]:
    kept = []
    for tool in objects(tools, "tools"):
        kind = tool.get("type")
        name = name_hosted(kind)
        environment = tool.get("environment")
        if kind == "shell" and isinstance(environment, dict) and environment.get("type") != "local":
            name = "container"
        if name not in _OWN_TOOLS and name not in granted:
            stripped.append(name)
        elif kind == "namespace":
            kept.append({**tool, "tools": _clean_tools(tool.get("tools"), granted, stripped)})
        else:
            kept.append(tool)
    return kept


def _tool_names(tool: Json) -> list[str]:
    inner = [name for item in tool.get("tools") or () if isinstance(item, dict) for name in _tool_names(item)]
    return [string(tool.get("name"), "tools.name"), *inner]


def _clean_item(item: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        return {**item, "content": _clean_content(item.get("content"), granted, stripped)}
    if kind in _OWN_CALLS or kind == "reasoning":
        return item
    if isinstance(kind, str) and kind.endswith("_output") and f"{kind.removesuffix('_output')}" in _OWN_CALLS:
        return {**item, "output": _clean_content(item.get("output"), granted, stripped)}
    name = "files" if kind == "item_reference" else name_hosted(kind)
    for suffix in ("_call_output", "_call", "_approval_response", "_approval_request", "_list_tools"):
        name = name_hosted(name.removesuffix(suffix))
    if name in granted:
        return item
    stripped.append(name)
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": removed(name)}]}


def _clean_content(content: Any, granted: frozenset[str], stripped: list[str]) -> Any:
    if not isinstance(content, list):
        return content
    kept = []
    for part in objects(content, "content"):
        kind, name = part.get("type"), ""
        if kind == "input_image":
            if part.get("file_id") is not None:
                name = "files"
            elif is_web_address(part.get("image_url")):
                name = "url_content"
        elif kind == "input_file":
            if part.get("file_id") is not None:
                name = "files"
            elif part.get("file_url") is not None:
                name = "url_content"
        elif kind not in ("input_text", "output_text", "refusal", "text", "summary_text", "input_audio", "stdout"):
            # Parts of a shell's output have no type.
            name = name_hosted(kind) if "type" in part else ""
        if not name or name in granted:
            kept.append(part)
        else:
            stripped.append(name)
            kept.append({"type": "input_text", "text": removed(name)})
    return kept


def _read_item(item: Json, where: str, blobs: dict[str, str]) -> Message:
    kind = item.get("type") or "message"
    if kind == "message":
        role = _ROLES.get(string(item.get("role"), f"{where}.role"))
        if role is None:
            raise DialectError(f"{where}.role {str(item.get('role'))[:40]!r} is not known")
        return Message(role, tuple(_read_content(item.get("content"), f"{where}.content", blobs)))
    if isinstance(kind, str) and kind.endswith("_output"):
        output = item.get("output")
        parts = (
            _read_content(output, f"{where}.output", blobs) if isinstance(output, str | list) else [Text(dump(output))]
        )
        call = string(item.get("call_id"), f"{where}.call_id")
        return Message("tool", (ToolResult(call, tuple(p for p in parts if isinstance(p, Text | Media))),))
    return Message("assistant", tuple(_read_output(item)))


def _read_content(content: Any, where: str, blobs: dict[str, str]) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)] if content else []
    parts: list[Part] = []
    for part in objects(content, where):
        kind = part.get("type")
        if kind == "input_image":
            url = string(part.get("image_url"), where)
            parts.append(read_data_url(url, blobs) if url else Media("", url=f"file:{part.get('file_id')}"))
        elif kind == "input_file" and (data := string(part.get("file_data"), where)):
            parts.append(
                read_data_url(data if data[:5].lower() == "data:" else f"data:application/pdf;base64,{data}", blobs)
            )
        elif kind == "input_audio":
            audio = obj(part.get("input_audio"), where)
            try:
                parts.append(make_media(f"audio/{audio.get('format')}", string(audio.get("data"), where), blobs))
            except ValueError as error:
                raise DialectError(f"{where}: {error}") from None
        elif isinstance(words := part.get("text", part.get("refusal")), str):
            parts.append(Text(words))
        else:
            parts.append(Text(dump(part)[:20000]))
    return parts


def _read_output(item: Json) -> list[Part]:
    kind = string(item.get("type"), "output.type")
    if kind == "message":
        return [p for p in _read_content(item.get("content"), "output.content", {}) if isinstance(p, Text)]
    if kind == "reasoning":
        pieces = [*objects(item.get("summary"), "summary"), *objects(item.get("content"), "content")]
        words = "".join(string(piece.get("text"), "text") for piece in pieces)
        signature = string(item.get("encrypted_content"), "encrypted_content")
        return [Reasoning(words, signature)] if words or signature else []
    call_id = string(item.get("call_id"), "call_id")
    if kind == "function_call":
        return [make_call(call_id, _full_name(item), string(item.get("arguments"), "arguments"))]
    if kind == "custom_tool_call":
        return [make_call(call_id, _full_name(item), string(item.get("input"), "input"), custom=True)]
    if kind in _OWN_CALLS or call_id:
        # What the agent is to run, in a form that the provider defines.
        what = (
            item.get("action") or item.get("operation") or {k: v for k, v in item.items() if k not in ("id", "status")}
        )
        return [make_call(call_id or string(item.get("id"), "id"), kind.removesuffix("_call"), dump(what))]
    return [Text(f"[{name_hosted(kind)}]")]


def _full_name(item: Json) -> str:
    space = string(item.get("namespace"), "namespace")
    name = string(item.get("name"), "name")
    return f"{space}.{name}" if space and name else name


def _read_logprobs(item: Json) -> list[float]:
    if item.get("type") != "message":
        return []
    probs: list[float] = []
    for part in objects(item.get("content"), "content"):
        entries = [number(entry.get("logprob"), "logprob") for entry in objects(part.get("logprobs"), "logprobs")]
        probs.extend(value for value in entries if value is not None)
    return probs


def _read_tools(tool: Json) -> list[Tool]:
    kind = string(tool.get("type"), "tools.type")
    if kind == "namespace":
        return [t for inner in objects(tool.get("tools"), "tools") for t in _read_tools(inner)]
    return [
        Tool(
            name=string(tool.get("name"), "tools.name") or kind,
            description=string(tool.get("description"), "tools.description"),
            schema=dump(tool.get("parameters") or tool.get("format") or {}),
            kind=kind,
        )
    ]


def _write_messages(messages: Sequence[Message], blobs: dict[str, str]) -> list[Json]:
    out: list[Json] = []
    for message in messages:
        words: list[Json] = []
        for part in message.parts:
            if isinstance(part, Text) and message.role == "assistant":
                out.append({"type": "message", "role": "assistant", "content": [_write_text(part.text)]})
            elif isinstance(part, Text | Media):
                words.append(_write_part(part, blobs))
            elif isinstance(part, ToolCall):
                out.append({k: v for k, v in _write_call(part, "").items() if k != "id"})
            elif isinstance(part, ToolResult):
                text = all(isinstance(p, Text) for p in part.parts)
                output: Any = [_write_part(p, blobs) for p in part.parts]
                if text:
                    output = "".join(p.text for p in part.parts if isinstance(p, Text))
                out.append({"type": "function_call_output", "call_id": part.call, "output": output})
            elif part.signature:
                summary = [{"type": "summary_text", "text": part.text}] if part.text else []
                out.append({"type": "reasoning", "summary": summary, "encrypted_content": part.signature})
        if words:
            out.append({"type": "message", "role": message.role, "content": words})
    return out


def _write_part(part: Text | Media, blobs: dict[str, str]) -> Json:
    if isinstance(part, Text):
        return {"type": "input_text", "text": part.text}
    if part.digest not in blobs:
        return {"type": "input_text", "text": removed(part.media_type or "url_content")}
    url = f"data:{part.media_type};base64,{blobs[part.digest]}"
    if part.media_type.startswith("image/"):
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    return {"type": "input_file", "filename": "file", "file_data": url}


def _write_text(words: str) -> Json:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


def _write_call(call: ToolCall, item_id: str) -> Json:
    if call.kind == "custom":
        return {
            "id": item_id,
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "input": call.arguments,
        }
    item = {
        "id": item_id,
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments or "{}",
    }
    space, dot, name = call.name.rpartition(".")
    return {**item, "namespace": space, "name": name} if dot else item


def _write_output(reply: Reply) -> list[Json]:
    out: list[Json] = []
    for part in reply.parts:
        index = len(out)
        if isinstance(part, Text):
            words = [_write_text(part.text)]
            out.append(
                {"id": f"msg_{index}", "type": "message", "status": "completed", "role": "assistant", "content": words}
            )
        elif isinstance(part, Reasoning):
            summary = [{"type": "summary_text", "text": part.text}] if part.text else []
            out.append({"id": f"rs_{index}", "type": "reasoning", "summary": summary})
        elif isinstance(part, ToolCall):
            out.append(_write_call(part, f"fc_{index}"))
    return out


def _write_response(reply_id: str, model: str, output: list[Json], reply: Reply | None) -> Json:
    status, details = "in_progress", None
    if reply is not None:
        status = "incomplete" if reply.finish in ("length", "filtered") else "completed"
        if status == "incomplete":
            details = {"reason": "max_output_tokens" if reply.finish == "length" else "content_filter"}
    return {
        "id": reply_id,
        "object": "response",
        "created_at": wall_ns() // 1_000_000_000,
        "status": status,
        "error": None,
        "incomplete_details": details,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": list(output),
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if reply is None else _write_usage(reply.usage),
    }


def _read_finish(status: Any, reason: Any, parts: Sequence[Part]) -> Finish:
    if any(isinstance(part, ToolCall) for part in parts):
        return "tool_calls"
    if status == "incomplete":
        return "filtered" if reason == "content_filter" else "length"
    return "stop"


def _read_usage(usage: Json) -> Usage:
    details = usage.get("input_tokens_details")
    return Usage(
        prompt_tokens=count(usage.get("input_tokens")),
        completion_tokens=count(usage.get("output_tokens")),
        cached_tokens=count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    )


def _write_usage(usage: Usage) -> Json:
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


RESPONSES = Responses()
