"""Gemini ``generateContent``, streamed and not, and ``countTokens``.

Fields are read in both spellings that the API takes (camelCase and snake_case) and go on in camelCase, so that no
second spelling passes unseen. Calls of functions have no ids here unless the agent gives them: results are matched by
name, in order. Source: Gemini API reference, v1beta.
"""

from __future__ import annotations

import re
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
    number,
    obj,
    objects,
    parse_object,
    string,
)
from vallum.gateway.model.dialects.hosted import keep_known, name_hosted, removed
from vallum.gateway.model.sse import SseEvent, write_event

_KNOWN = frozenset(
    (
        "contents",
        "systemInstruction",
        "tools",
        "toolConfig",
        "generationConfig",
        "safetySettings",
        "model",
        "labels",
        "serviceTier",
    )
)
_PART = frozenset(
    (
        "text",
        "thought",
        "thoughtSignature",
        "functionCall",
        "functionResponse",
        "inlineData",
        "videoMetadata",
        "mediaResolution",
        "partMetadata",
    )
)
_FINISH: dict[str, Finish] = {"STOP": "stop", "MAX_TOKENS": "length", "MALFORMED_FUNCTION_CALL": "error"}
_FILTERED = frozenset({"SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY"})
_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ABORTED"}
_SNAKE = re.compile(r"_([a-z])")


class Gemini:
    """The dialect ``gemini``."""

    name: DialectName = "gemini"

    def clean(self, raw: Json, granted: frozenset[str]) -> tuple[Json, list[str]]:
        """As the contract says. More than one candidate is refused."""
        stripped: list[str] = []
        raw = _camel(raw)
        if isinstance(inner := raw.pop("generateContentRequest", None), dict):
            raw = {**_camel(inner), **raw}
        kept = keep_known(raw, _KNOWN, granted, stripped)
        tools = [
            tool
            for item in objects(kept.get("tools"), "tools")
            if (tool := _clean_tool(_camel(item), granted, stripped))
        ]
        kept.pop("tools", None)
        if tools:
            kept["tools"] = tools
        else:
            kept.pop("toolConfig", None)
        if "toolConfig" in kept:
            known = frozenset({"functionCallingConfig"})
            kept["toolConfig"] = keep_known(_camel(obj(kept["toolConfig"], "toolConfig")), known, granted, stripped)
        kept["contents"] = [_clean_content(content, granted, stripped) for content in _contents(kept.get("contents"))]
        if "systemInstruction" in kept:
            system = kept["systemInstruction"]
            system = {"parts": [{"text": system}]} if isinstance(system, str) else obj(system, "systemInstruction")
            kept["systemInstruction"] = _clean_content(system, granted, stripped)
        config = _camel(obj(kept.get("generationConfig") or {}, "generationConfig"))
        if config.get("candidateCount") not in (None, 1):
            raise DialectError("candidateCount has to be 1: ask once for each sample")
        if config:
            kept["generationConfig"] = config
        return kept, stripped

    def parse_request(self, raw: Json, route: Route) -> ModelRequest:
        """As the contract says."""
        blobs: dict[str, str] = {}
        messages: list[Message] = []
        if "systemInstruction" in raw:
            parts = _read_parts(raw["systemInstruction"], blobs, _Names())
            messages.append(Message("system", tuple(parts)))
        names = _Names()
        for content in raw["contents"]:
            messages.extend(_read_content(content, blobs, names))
        if not raw["contents"]:
            raise DialectError("contents has to have at least one content")
        config = raw.get("generationConfig") or {}
        calling = raw.get("toolConfig", {}).get("functionCallingConfig")
        mode = calling.get("mode") if isinstance(calling, dict) else None
        return ModelRequest(
            model=route.model,
            messages=fold(messages),
            tools=tuple(t for tool in raw.get("tools", ()) for t in _read_tools(tool)),
            stream=bool(route.stream),
            temperature=number(config.get("temperature"), "temperature"),
            top_p=number(config.get("topP"), "topP"),
            max_tokens=integer(config.get("maxOutputTokens"), "maxOutputTokens"),
            stop=tuple(string(s, "stopSequences") for s in config.get("stopSequences") or ()),
            tool_choice={"AUTO": "auto", "ANY": "required", "NONE": "none"}.get(
                mode if isinstance(mode, str) else "", ""
            ),
            blobs=blobs,
        )

    def write_request(self, request: ModelRequest) -> Json:
        """As the contract says."""
        system = [part for m in request.messages if m.role == "system" for part in m.parts if isinstance(part, Text)]
        rest = [m for m in request.messages if m.role != "system"]
        raw: Json = {"contents": _write_contents(rest, request.blobs, {})}
        if system:
            raw["systemInstruction"] = {"parts": [{"text": part.text} for part in system]}
        if request.tools:
            raw["tools"] = [
                {
                    "functionDeclarations": [
                        {
                            "name": t.name,
                            "description": t.description,
                            "parametersJsonSchema": parse_object(t.schema, "schema"),
                        }
                        for t in request.tools
                    ]
                }
            ]
            calling: Json = {"mode": {"required": "ANY", "none": "NONE"}.get(request.tool_choice, "AUTO")}
            if request.tool_choice.startswith("="):
                calling = {"mode": "ANY", "allowedFunctionNames": [request.tool_choice[1:]]}
            raw["toolConfig"] = {"functionCallingConfig": calling}
        config = {"temperature": request.temperature, "topP": request.top_p, "maxOutputTokens": request.max_tokens}
        if chosen := {key: value for key, value in config.items() if value is not None}:
            raw["generationConfig"] = chosen
        if request.stop:
            raw.setdefault("generationConfig", {})["stopSequences"] = list(request.stop)
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
        """As the contract says. Model and stream are in the path."""
        del model, stream
        config = dict(raw.get("generationConfig") or {})
        if temperature is not None:
            config["temperature"] = temperature
        if max_tokens is not None:
            config["maxOutputTokens"] = max(1, min(max_tokens, config.get("maxOutputTokens") or max_tokens))
        if token_ids:
            config["responseLogprobs"] = True
        raw = {key: value for key, value in raw.items() if key != "model"}
        return {**raw, "generationConfig": config} if config else raw

    def extend(self, raw: Json, messages: Sequence[Message]) -> Json:
        """As the contract says."""
        return {**raw, "contents": [*raw["contents"], *_write_contents(messages, {}, {})]}

    def target(self, model: str, *, stream: bool, count: bool = False) -> str:
        """As the contract says."""
        if not re.fullmatch(r"[A-Za-z0-9._:@-]{1,128}(/[A-Za-z0-9._:@-]{1,128}){0,3}", model) or ".." in model:
            raise DialectError("the model's name cannot be put into a path")
        verb = "countTokens" if count else "streamGenerateContent?alt=sse" if stream else "generateContent"
        return f"/v1beta/models/{model}:{verb}"

    def key_headers(self, secret: bytes) -> Headers:
        """As the contract says."""
        return ((b"x-goog-api-key", secret),)

    def parse_reply(self, raw: Json) -> Reply:
        """As the contract says."""
        reader = GeminiAssembler()
        reader.take(raw)
        return reader.finish()

    def make_assembler(self, *, wants_usage: bool) -> GeminiAssembler:
        """As the contract says."""
        del wants_usage
        return GeminiAssembler()

    def write_reply(self, reply: Reply) -> Json:
        """As the contract says."""
        return _write_response(reply.id, reply.model, [_write_part(part, {}, {}) for part in reply.parts], reply)

    def make_writer(self, reply_id: str, model: str) -> GeminiWriter:
        """As the contract says."""
        return GeminiWriter(reply_id, model)

    def write_error(self, status: int, message: str, rule: str) -> Json:
        """As the contract says."""
        words = _STATUS.get(status, "RESOURCE_EXHAUSTED" if status == 429 else "UNAVAILABLE")
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": rule, "domain": "vallum"}
        return {"error": {"code": status, "message": message, "status": words, "details": [info]}}

    def write_count(self, tokens: int) -> Json:
        """As the contract says."""
        return {"totalTokens": tokens}


class GeminiAssembler:
    """Chunks of a streamed answer to a reply. There is no last event: the stream ends."""

    def __init__(self) -> None:
        self.is_over = False
        self._holding = False
        self._parts: list[Part] = []
        self._head: Json = {}
        self._finish = ""
        self._usage: Json = {}
        self._blocked = False
        self._logprobs: list[float] = []

    def feed(self, event: SseEvent) -> Fed:
        """As the contract says."""
        return self.take(parse_object(event.data, "a chunk"))

    def take(self, raw: Json) -> Fed:
        """Take one chunk, or a whole answer. Raises DialectError."""
        if raw.get("error"):
            raise DialectError(f"the upstream failed: {dump(raw['error'])[:500]}")
        self._head = {**raw, **self._head}
        if isinstance(usage := raw.get("usageMetadata"), dict):
            self._usage.update(usage)
        if isinstance(feedback := raw.get("promptFeedback"), dict) and feedback.get("blockReason"):
            self._blocked = self._holding = True
        candidates = objects(raw.get("candidates"), "candidates")
        if len(candidates) > 1 or (candidates and candidates[0].get("index") not in (None, 0)):
            raise DialectError("the reply has more than one candidate")
        deltas: list[Delta] = []
        for candidate in candidates:
            if finish := string(candidate.get("finishReason"), "finishReason"):
                self._finish = finish
                self._holding = True
            self._take_logprobs(candidate.get("logprobsResult"))
            for part in _read_parts(obj(candidate.get("content") or {}, "content"), {}, None):
                self._parts.append(part)
                if isinstance(part, Text | Reasoning):
                    deltas.append(part)
                else:
                    self._holding = True
        return Fed(tuple(deltas), hold=self._holding)

    def _take_logprobs(self, result: Any) -> None:
        if isinstance(result, dict):
            for chosen in objects(result.get("chosenCandidates"), "chosenCandidates"):
                if (value := number(chosen.get("logProbability"), "logProbability")) is not None:
                    self._logprobs.append(value)

    def finish(self) -> Reply:
        """As the contract says."""
        if not self._finish and not self._blocked:
            raise DialectError("the answer ended before its finishReason")
        parts = check_calls(_join(self._parts))
        finish: Finish = _FINISH.get(self._finish, "filtered" if self._blocked or self._finish in _FILTERED else "stop")
        if any(isinstance(part, ToolCall) for part in parts):
            finish = "tool_calls"
        return Reply(
            id=string(self._head.get("responseId"), "responseId"),
            model=string(self._head.get("modelVersion"), "modelVersion"),
            parts=parts,
            finish=finish,
            usage=_read_usage(self._usage),
            logprobs=self._logprobs or None,
        )


class GeminiWriter:
    """A reply as chunks."""

    def __init__(self, reply_id: str, model: str) -> None:
        self._id = reply_id
        self._model = model

    def start(self) -> bytes:
        """As the contract says."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """As the contract says."""
        chunk = _write_response(self._id, self._model, [_write_part(delta, {}, {})], None)
        return write_event(dump(chunk).encode())

    def finish(self, reply: Reply) -> bytes:
        """As the contract says."""
        calls = [_write_part(call, {}, {}) for call in reply.tool_calls]
        return write_event(dump(_write_response(self._id, self._model, calls, reply)).encode())


class _Names:
    """Gives calls without ids their ids, and finds the call that a result is of."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[str, list[str]] = {}

    def call(self, given: str, name: str) -> str:
        self._count += 1
        call_id = given or f"call_{self._count}"
        self._waiting.setdefault(name, []).append(call_id)
        return call_id

    def result(self, given: str, name: str) -> str:
        waiting = self._waiting.get(name, [])
        if given:
            if given in waiting:
                waiting.remove(given)
            return given
        return waiting.pop(0) if waiting else name


def _camel(raw: Json) -> Json:
    out: Json = {}
    for key, value in raw.items():
        camel = _SNAKE.sub(lambda found: found[1].upper(), key)
        if camel in out:
            raise DialectError(f"{camel} is there in two spellings")
        out[camel] = value
    return out


def _contents(value: Any) -> list[Json]:
    if isinstance(value, str):
        return [{"role": "user", "parts": [{"text": value}]}]
    return [obj(value, "contents")] if isinstance(value, dict) else objects(value, "contents")


def _clean_tool(tool: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    return keep_known(tool, frozenset({"functionDeclarations"}), granted, stripped)


def _clean_content(content: Json, granted: frozenset[str], stripped: list[str]) -> Json:
    parts = content.get("parts")
    kept = []
    for raw_part in [parts] if isinstance(parts, dict) else objects(parts, "parts"):
        part = _camel(raw_part)
        extra = [key for key in part if key not in _PART and name_hosted(_part_name(key)) not in granted]
        if extra:
            stripped.extend(name_hosted(_part_name(key)) for key in extra)
            part = {"text": removed(name_hosted(_part_name(extra[0])))}
        if isinstance(part.get("functionResponse"), dict):
            response = _camel(part["functionResponse"])
            if "parts" in response:
                response["parts"] = _clean_content({"parts": response["parts"]}, granted, stripped)["parts"]
            part = {**part, "functionResponse": response}
        kept.append(part)
    out: Json = {"parts": kept}
    if "role" in content:
        out["role"] = content["role"]
    return out


def _part_name(key: str) -> str:
    names = {"fileData": "url_content", "executableCode": "code_interpreter", "codeExecutionResult": "code_interpreter"}
    return names.get(key, key)


def _read_content(content: Json, blobs: dict[str, str], names: _Names) -> list[Message]:
    parts = _read_parts(content, blobs, names)
    results = tuple(part for part in parts if isinstance(part, ToolResult))
    rest = tuple(part for part in parts if not isinstance(part, ToolResult))
    out = [Message("tool", results)] if results else []
    role = content.get("role")
    if role not in (None, "user", "model", "function", "system"):
        raise DialectError(f"contents.role {str(role)[:40]!r} is not known")
    if rest:
        out.append(Message("assistant" if role == "model" else "user", rest))
    return out


def _read_parts(content: Json, blobs: dict[str, str], names: _Names | None) -> list[Part]:
    out: list[Part] = []
    for part in objects(content.get("parts"), "parts"):
        signature = string(part.get("thoughtSignature"), "thoughtSignature")
        if isinstance(call := part.get("functionCall"), dict):
            name, given = string(call.get("name"), "functionCall.name"), string(call.get("id"), "functionCall.id")
            call_id = names.call(given, name) if names else given
            if signature:
                out.append(Reasoning("", signature))
            out.append(make_call(call_id, name, dump(obj(call.get("args") or {}, "functionCall.args"))))
        elif isinstance(result := part.get("functionResponse"), dict):
            name, given = (
                string(result.get("name"), "functionResponse.name"),
                string(result.get("id"), "functionResponse.id"),
            )
            words = _result_words(result.get("response"))
            call_id = names.result(given, name) if names else given or name
            media = _read_parts({"parts": result.get("parts")}, blobs, None)
            kept = (Text(words), *(p for p in media if isinstance(p, Text | Media)))
            out.append(
                ToolResult(call_id, kept, isinstance(result.get("response"), dict) and "error" in result["response"])
            )
        elif isinstance(data := part.get("inlineData"), dict):
            data = _camel(data)
            try:
                out.append(
                    make_media(string(data.get("mimeType"), "mimeType"), string(data.get("data"), "data"), blobs)
                )
            except ValueError as error:
                raise DialectError(f"inlineData: {error}") from None
        elif part.get("text") is not None:
            words = string(part.get("text"), "text")
            if part.get("thought") is True:
                out.append(Reasoning(words, signature))
            elif words:
                out.append(Text(words))
        elif set(part) - {"thoughtSignature", "thought"}:
            out.append(Media("", url=dump(part)[:2000]))
    return out


def _result_words(response: Any) -> str:
    if isinstance(response, dict) and len(response) == 1:
        value = next(iter(response.values()))
        if isinstance(value, str):
            return value
    return dump(response)


def _join(parts: list[Part]) -> list[Part]:
    """Neighbouring words are one part, however the stream cut them."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + part.text, part.signature or last.signature)
        else:
            out.append(part)
    return out


def _read_tools(tool: Json) -> list[Tool]:
    out = []
    for raw in objects(tool.get("functionDeclarations"), "functionDeclarations"):
        declared = _camel(raw)
        schema = declared.get("parametersJsonSchema") or declared.get("parameters") or {}
        name = string(declared.get("name"), "functionDeclarations.name")
        out.append(Tool(name, string(declared.get("description"), "description"), dump(_lower_types(schema))))
    return out


def _lower_types(schema: Any) -> Any:
    """``"type": "STRING"`` of this API's own schemas as JSON schema says it."""
    if isinstance(schema, dict):
        return {
            key: value.lower() if key == "type" and isinstance(value, str) else _lower_types(value)
            for key, value in schema.items()
        }
    return [_lower_types(item) for item in schema] if isinstance(schema, list) else schema


def _write_contents(messages: Sequence[Message], blobs: dict[str, str], names: dict[str, str]) -> list[Json]:
    out: list[Json] = []
    for message in messages:
        role = "model" if message.role == "assistant" else "user"
        for part in message.parts:
            if isinstance(part, ToolCall):
                names[part.id] = part.name
        parts = [_write_part(part, blobs, names) for part in message.parts]
        if out and out[-1]["role"] == role:
            out[-1]["parts"].extend(parts)
        elif parts:
            out.append({"role": role, "parts": parts})
    return out


def _write_part(part: Part, blobs: dict[str, str], names: dict[str, str]) -> Json:
    if isinstance(part, Text):
        return {"text": part.text}
    if isinstance(part, Reasoning):
        return {"text": part.text, "thought": True, **({"thoughtSignature": part.signature} if part.signature else {})}
    if isinstance(part, ToolCall):
        args = {"input": part.arguments} if part.kind == "custom" else loads(part.arguments)
        return {"functionCall": {**({"id": part.id} if part.id else {}), "name": part.name, "args": args}}
    if isinstance(part, ToolResult):
        words = "".join(p.text for p in part.parts if isinstance(p, Text))
        key = "error" if part.is_error else "output"
        return {
            "functionResponse": {"id": part.call, "name": names.get(part.call, part.call), "response": {key: words}}
        }
    if part.digest in blobs:
        return {"inlineData": {"mimeType": part.media_type, "data": blobs[part.digest]}}
    return {"text": removed(part.media_type or "url_content")}


def _write_response(reply_id: str, model: str, parts: list[Json], reply: Reply | None) -> Json:
    candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
    raw: Json = {"candidates": [candidate], "modelVersion": model, "responseId": reply_id}
    if reply is not None:
        candidate["finishReason"] = {"length": "MAX_TOKENS", "filtered": "SAFETY"}.get(reply.finish, "STOP")
        prompt, completion = reply.usage.prompt_tokens or 0, reply.usage.completion_tokens or 0
        raw["usageMetadata"] = {
            "promptTokenCount": prompt,
            "candidatesTokenCount": completion,
            "totalTokenCount": prompt + completion,
            "cachedContentTokenCount": reply.usage.cached_tokens or 0,
        }
    return raw


def _read_usage(usage: Json) -> Usage:
    completion, thought = count(usage.get("candidatesTokenCount")), count(usage.get("thoughtsTokenCount"))
    return Usage(
        prompt_tokens=count(usage.get("promptTokenCount")),
        completion_tokens=None if completion is None and thought is None else (completion or 0) + (thought or 0),
        cached_tokens=count(usage.get("cachedContentTokenCount")),
    )
