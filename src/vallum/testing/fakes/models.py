"""A provider of models for tests: OpenAI's chat completions and responses, Anthropic's messages, Gemini's generateContent.

Written from the providers' references and apart from the gateway's own dialects, so that the two check each other; the
providers' own client libraries read both. It says what it was told to say, streamed in small pieces when asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import h11
import msgspec

from vallum.testing.fakes.base import CountedReader, Endpoint, TcpFake

Json = dict[str, Any]


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says to one request."""

    text: str = ""
    thinking: str = ""
    calls: tuple[tuple[str, str, Json], ...] = ()
    """(id, name, arguments)."""
    prompt_tokens: int = 11
    completion_tokens: int = 7
    cached_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    wait_s: float = 0.0
    """Before the first byte."""
    pieces: int = 2
    """How many pieces its words come in, when streamed."""
    pause_s: float = 0.0
    """Between two events of a stream."""
    raw: bytes | None = None
    """Sent in the place of everything else, then the connection is closed."""
    linger_s: float = 0.0
    """How long after ``raw`` it is closed."""
    status: int = 200


class ReceivedRequest(msgspec.Struct, frozen=True):
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: Json


class FakeModels(TcpFake):
    """Answers each request with the next of ``said``, the last one for ever. Unit: ``requests``."""

    def __init__(
        self,
        said: Iterable[Said],
        endpoint: tuple[str, int] = ("127.0.0.1", 0),
        choose: Callable[[Json], Said] | None = None,
    ) -> None:
        """``choose`` gives the answer to a request in the place of ``said``."""
        super().__init__([endpoint])
        self._said = list(said)
        self._choose = choose
        self.requests: list[ReceivedRequest] = []
        """Everything that was asked, in order."""

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.endpoints[0]}"

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Answer until the client closes."""
        del at
        machine = h11.Connection(h11.SERVER)
        while (asked := await _read(machine, reader)) is not None:
            reader.count.count("requests")
            self.requests.append(asked)
            said = (
                self._choose(asked.body)
                if self._choose
                else self._said.pop(0)
                if len(self._said) > 1
                else self._said[0]
            )
            if said.wait_s:
                await asyncio.sleep(said.wait_s)
            if said.raw is not None:
                writer.write(said.raw)
                await writer.drain()
                await asyncio.sleep(said.linger_s)
                return
            await _answer(machine, writer, asked, said)
            if machine.our_state is h11.MUST_CLOSE:
                return
            machine.start_next_cycle()


async def _read(machine: h11.Connection, reader: CountedReader) -> ReceivedRequest | None:
    head: h11.Request | None = None
    body = b""
    while True:
        event = machine.next_event()
        if event is h11.NEED_DATA:
            machine.receive_data(await reader.read())
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            return ReceivedRequest(head.method.decode(), head.target.decode(), headers, json.loads(body or b"{}"))
        else:
            return None


async def _answer(machine: h11.Connection, writer: asyncio.StreamWriter, asked: ReceivedRequest, said: Said) -> None:
    path = asked.target.partition("?")[0]
    if path.endswith("/count_tokens"):
        return await _send(machine, writer, 200, {"input_tokens": said.prompt_tokens})
    if path.endswith(":countTokens"):
        return await _send(machine, writer, 200, {"totalTokens": said.prompt_tokens})
    if said.status != 200:
        return await _send(machine, writer, said.status, {"error": {"message": said.text, "type": "api_error"}})
    stream = asked.body.get("stream") is True or ":streamGenerateContent" in path
    whole, events = _WRITERS[_dialect(path)]
    model = str(asked.body.get("model") or path.rpartition("/")[2].partition(":")[0])
    if not stream:
        return await _send(machine, writer, 200, whole(said, model))
    headers = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
    writer.write(machine.send(h11.Response(status_code=200, headers=headers)) or b"")
    for event in events(said, model):
        writer.write(machine.send(h11.Data(data=event)) or b"")
        await writer.drain()
        await asyncio.sleep(said.pause_s)
    writer.write(machine.send(h11.EndOfMessage()) or b"")
    return await writer.drain()


async def _send(machine: h11.Connection, writer: asyncio.StreamWriter, status: int, body: Json) -> None:
    data = json.dumps(body).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(data)))]
    for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
        writer.write(machine.send(event) or b"")
    await writer.drain()


def _dialect(path: str) -> str:
    for end, name in (("/chat/completions", "chat"), ("/responses", "responses"), ("/messages", "messages")):
        if path.endswith(end):
            return name
    return "gemini"


def _cut(text: str, pieces: int = 2) -> list[str]:
    size = max(1, -(-len(text) // pieces))
    return [text[at : at + size] for at in range(0, len(text), size)]


def _event(data: Json, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def _chat_usage(said: Said) -> Json:
    return {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": said.completion_tokens,
        "total_tokens": said.prompt_tokens + said.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": said.cached_tokens},
    }


def _chat(said: Said, model: str) -> Json:
    message: Json = {"role": "assistant", "content": said.text or None}
    if said.thinking:
        message["reasoning_content"] = said.thinking
    if said.calls:
        message["tool_calls"] = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for i, n, a in said.calls
        ]
    choice: Json = {"index": 0, "message": message, "finish_reason": "tool_calls" if said.calls else "stop"}
    whole: Json = {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": _chat_usage(said),
    }
    if said.token_ids:
        choice["token_ids"] = list(said.token_ids)
        choice["logprobs"] = {"content": [{"token": "t", "logprob": -0.5, "top_logprobs": []} for _ in said.token_ids]}
        whole["prompt_token_ids"] = [1, 2, 3]
    return whole


def _chat_events(said: Said, model: str) -> Iterable[bytes]:
    def chunk(delta: Json, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None, **more}
        return _event(
            {
                "id": "chatcmpl-fake",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": model,
                "choices": [choice],
            }
        )

    yield chunk({"role": "assistant", "content": ""})
    for piece in _cut(said.thinking, said.pieces):
        yield chunk({"reasoning_content": piece})
    for piece in _cut(said.text, said.pieces):
        yield chunk({"content": piece})
    for index, (call, name, arguments) in enumerate(said.calls):
        function = {"name": name, "arguments": ""}
        yield chunk({"tool_calls": [{"index": index, "id": call, "type": "function", "function": function}]})
        for piece in _cut(json.dumps(arguments)):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield chunk(
        {}, "tool_calls" if said.calls else "stop", **({"token_ids": list(said.token_ids)} if said.token_ids else {})
    )
    usage = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": []}
    yield _event({**usage, "usage": _chat_usage(said)})
    yield b"data: [DONE]\n\n"


def _items(said: Said) -> list[Json]:
    items: list[Json] = []
    if said.thinking:
        items.append(
            {"id": "rs_fake", "type": "reasoning", "summary": [{"type": "summary_text", "text": said.thinking}]}
        )
    if said.text:
        part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
        items.append(
            {"id": "msg_fake", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
        )
    items.extend(
        {
            "id": f"fc_{call}",
            "type": "function_call",
            "status": "completed",
            "call_id": call,
            "name": name,
            "arguments": json.dumps(arguments),
        }
        for call, name, arguments in said.calls
    )
    return items


def _response(said: Said, model: str, *, complete: bool = True) -> Json:
    usage = {
        "input_tokens": said.prompt_tokens,
        "input_tokens_details": {"cached_tokens": said.cached_tokens},
        "output_tokens": said.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": said.prompt_tokens + said.completion_tokens,
    }
    return {
        "id": "resp_fake",
        "object": "response",
        "created_at": 1,
        "status": "completed" if complete else "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": _items(said) if complete else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage if complete else None,
    }


def _response_events(said: Said, model: str) -> Iterable[bytes]:
    number = -1

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return _event({"type": kind, "sequence_number": number, **fields}, kind)

    yield event("response.created", response=_response(said, model, complete=False))
    yield event("response.in_progress", response=_response(said, model, complete=False))
    for index, item in enumerate(_items(said)):
        where = {"item_id": item["id"], "output_index": index}
        empty = {"content": [], "summary": [], "arguments": ""}
        begun = {**item, **{key: value for key, value in empty.items() if key in item}}
        yield event("response.output_item.added", output_index=index, item=begun)
        if item["type"] == "message":
            spot = {**where, "content_index": 0}
            part = item["content"][0]
            yield event("response.content_part.added", **spot, part={**part, "text": ""})
            for piece in _cut(part["text"], said.pieces):
                yield event("response.output_text.delta", **spot, delta=piece, logprobs=[])
            yield event("response.output_text.done", **spot, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **spot, part=part)
        elif item["type"] == "reasoning":
            spot = {**where, "summary_index": 0}
            yield event("response.reasoning_summary_part.added", **spot, part={"type": "summary_text", "text": ""})
            for piece in _cut(said.thinking, said.pieces):
                yield event("response.reasoning_summary_text.delta", **spot, delta=piece)
            yield event("response.reasoning_summary_text.done", **spot, text=said.thinking)
            yield event("response.reasoning_summary_part.done", **spot, part=item["summary"][0])
        else:
            for piece in _cut(item["arguments"]):
                yield event("response.function_call_arguments.delta", **where, delta=piece)
            yield event("response.function_call_arguments.done", **where, arguments=item["arguments"])
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed", response=_response(said, model))


def _message(said: Said, model: str) -> Json:
    content: list[Json] = []
    if said.thinking:
        content.append({"type": "thinking", "thinking": said.thinking, "signature": "sig"})
    if said.text:
        content.append({"type": "text", "text": said.text})
    content.extend({"type": "tool_use", "id": i, "name": n, "input": a} for i, n, a in said.calls)
    return {
        "id": "msg_fake",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if said.calls else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": said.prompt_tokens - said.cached_tokens,
            "cache_read_input_tokens": said.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": said.completion_tokens,
        },
    }


def _message_events(said: Said, model: str) -> Iterable[bytes]:
    whole = _message(said, model)

    def event(kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, **fields}, kind)

    usage = {**whole["usage"], "output_tokens": 1}
    yield event("message_start", message={**whole, "content": [], "stop_reason": None, "usage": usage})
    for index, block in enumerate(whole["content"]):
        kind = block["type"]
        blank: dict[str, Json] = {
            "thinking": {"thinking": "", "signature": ""},
            "text": {"text": ""},
            "tool_use": {"input": {}},
        }
        yield event("content_block_start", index=index, content_block={**block, **blank[kind]})
        yield event("ping")
        key, name = {
            "thinking": ("thinking", "thinking_delta"),
            "text": ("text", "text_delta"),
            "tool_use": ("partial_json", "input_json_delta"),
        }[kind]
        words = json.dumps(block["input"]) if kind == "tool_use" else block[kind]
        for piece in _cut(words, said.pieces):
            yield event("content_block_delta", index=index, delta={"type": name, key: piece})
        if kind == "thinking":
            yield event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": "sig"})
        yield event("content_block_stop", index=index)
    delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield event("message_delta", delta=delta, usage={"output_tokens": said.completion_tokens})
    yield event("message_stop")


def _content(said: Said, model: str, parts: list[Json], *, last: bool) -> Json:
    candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
    whole: Json = {"candidates": [candidate], "modelVersion": model, "responseId": "fake"}
    if last:
        candidate["finishReason"] = "STOP"
        whole["usageMetadata"] = {
            "promptTokenCount": said.prompt_tokens,
            "candidatesTokenCount": said.completion_tokens,
            "totalTokenCount": said.prompt_tokens + said.completion_tokens,
            "cachedContentTokenCount": said.cached_tokens,
        }
    return whole


def _gemini(said: Said, model: str) -> Json:
    parts: list[Json] = [{"text": said.thinking, "thought": True}] if said.thinking else []
    parts += [{"text": said.text}] if said.text else []
    parts += [{"functionCall": {"name": name, "args": arguments}} for _, name, arguments in said.calls]
    return _content(said, model, parts, last=True)


def _gemini_events(said: Said, model: str) -> Iterable[bytes]:
    for piece in _cut(said.thinking, said.pieces):
        yield _event(_content(said, model, [{"text": piece, "thought": True}], last=False))
    for piece in _cut(said.text, said.pieces):
        yield _event(_content(said, model, [{"text": piece}], last=False))
    calls: list[Json] = [{"functionCall": {"name": name, "args": arguments}} for _, name, arguments in said.calls]
    yield _event(_content(said, model, calls or [{"text": ""}], last=True))


_WRITERS: dict[str, tuple[Callable[[Said, str], Json], Callable[[Said, str], Iterable[bytes]]]] = {
    "chat": (_chat, _chat_events),
    "responses": (_response, _response_events),
    "messages": (_message, _message_events),
    "gemini": (_gemini, _gemini_events),
}
