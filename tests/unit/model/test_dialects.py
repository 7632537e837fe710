"""Four dialects: what is stripped, what is read, and that what one writes every one reads back."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.core.messages import (
    Message,
    ModelRequest,
    Reasoning,
    Reply,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
    fold,
)
from vallum.gateway.model.dialects import DIALECTS, find_route
from vallum.gateway.model.dialects.contract import DialectError, Route
from vallum.gateway.model.dialects.fields import parse_object
from vallum.gateway.model.relay import write_whole
from vallum.gateway.model.sse import SseReader

NAMES = list(DIALECTS)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20)
CALLS = st.builds(
    ToolCall,
    id=st.uuids().map(lambda u: f"call_{u.hex}"),
    name=st.sampled_from(["bash", "edit", "search_files"]),
    arguments=st.dictionaries(WORDS, WORDS | st.integers(-5, 5), max_size=3).map(json.dumps),
)
REPLIES = st.builds(
    lambda thought, text, calls, usage, length: Reply(
        id="r1",
        model="m",
        parts=(*((Reasoning(thought),) if thought else ()), *((Text(text),) if text else ()), *calls),
        finish="tool_calls" if calls else "length" if length else "stop",
        usage=usage,
    ),
    st.none() | WORDS,
    st.none() | WORDS,
    st.lists(CALLS, max_size=3),
    st.builds(
        Usage, prompt_tokens=st.integers(5, 99), completion_tokens=st.integers(0, 99), cached_tokens=st.integers(0, 5)
    ),
    st.booleans(),
)


def plain(reply):
    """What every dialect can say: words and calls, not how thoughts are signed."""
    calls = [(c.id, c.name, json.loads(c.arguments)) for c in reply.tool_calls]
    return reply.text, calls, reply.finish, reply.usage


@pytest.mark.parametrize("name", NAMES)
@given(reply=REPLIES)
def test_a_whole_reply_is_read_as_it_was_written(name, reply):
    dialect = DIALECTS[name]
    assert plain(dialect.parse_reply(dialect.write_reply(reply))) == plain(reply)


@pytest.mark.parametrize("name", NAMES)
@given(reply=REPLIES)
def test_a_streamed_reply_is_read_as_it_was_written(name, reply):
    dialect = DIALECTS[name]
    assembler, reader = dialect.make_assembler(wants_usage=True), SseReader()
    holding = False
    for event in reader.feed(write_whole(dialect.make_writer("r1", "m"), reply)):
        fed = assembler.feed(event)
        holding |= fed.hold
        assert fed.hold == holding, "once held, held to the end"
        assert fed.drop or not any(call.id in event.data for call in reply.tool_calls) or fed.hold
    reader.end()
    read = assembler.finish()
    assert plain(read) == plain(reply)
    thoughts = [p.text for p in reply.parts if isinstance(p, Reasoning)]
    assert [p.text for p in read.parts if isinstance(p, Reasoning)] == thoughts


MESSAGES = st.lists(
    st.one_of(
        WORDS.map(lambda w: Message("user", (Text(w),))),
        st.tuples(WORDS, st.lists(CALLS, max_size=2)).map(lambda t: Message("assistant", (Text(t[0]), *t[1]))),
    ),
    min_size=1,
    max_size=5,
)


def with_results(messages):
    """Each call answered right after it, as agents do."""
    out = [Message("system", (Text("Be brief."),))]
    for message in messages:
        out.append(message)
        calls = [part for part in message.parts if isinstance(part, ToolCall)]
        if calls:
            out.append(Message("tool", tuple(ToolResult(call.id, (Text(f"result of {call.id}"),)) for call in calls)))
    return out


@pytest.mark.parametrize("name", NAMES)
@given(messages=MESSAGES)
def test_a_request_written_for_another_dialect_is_read_there_as_it_was(name, messages):
    dialect = DIALECTS[name]
    tools = (Tool("bash", "runs", '{"type":"object","properties":{"a":{"type":"string"}}}'),)
    request = ModelRequest(
        model="m", messages=fold(with_results(messages)), tools=tools, max_tokens=77, temperature=0.5
    )
    raw = json.loads(json.dumps(dialect.write_request(request)))
    cleaned, stripped = dialect.clean(raw, frozenset())
    read = dialect.parse_request(cleaned, Route(dialect=name, operation="generate", model="m"))
    assert stripped == []
    assert flat(read.messages) == flat(request.messages)
    assert (read.tools[0].name, read.max_tokens, read.temperature) == ("bash", 77, 0.5)


def flat(messages):
    """Words, calls and results in order; dialects cut messages differently."""
    out = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, ToolCall):
                out.append(("call", part.id, part.name, json.loads(part.arguments)))
            elif isinstance(part, ToolResult):
                out.append(("result", part.call, "".join(p.text for p in part.parts)))
            elif isinstance(part, Text):
                role = "user" if message.role == "tool" else message.role
                if out and out[-1][0] == role:
                    out[-1] = (role, out[-1][1] + part.text)
                else:
                    out.append((role, part.text))
    return out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "model",
                    "content",
                    "role",
                    "type",
                    "text",
                    "tools",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "input",
                    "output",
                    "choices",
                    "delta",
                    "message",
                    "index",
                    "id",
                    "call_id",
                    "contents",
                    "parts",
                    "functionCall",
                    "functionResponse",
                    "response",
                    "system",
                    "source",
                    "data",
                    "url",
                    "item",
                    "image_url",
                    "finish_reason",
                    "usage",
                    "candidates",
                    "content_block",
                    "tool_use_id",
                    "summary",
                    "error",
                ]
            )
            | WORDS,
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)
KINDS = [
    "message", "function_call", "text", "image_url", "tool_use", "tool_result", "input_image", "response.completed",
    "response.output_item.done", "content_block_start", "content_block_delta", "message_start", "message_delta",
]  # fmt: skip


def retyped(value, kinds):
    if isinstance(value, dict):
        return {k: (kinds.pop() if k == "type" and kinds else retyped(v, kinds)) for k, v in value.items()}
    return [retyped(v, kinds) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", NAMES)
@given(value=JSON, kinds=st.lists(st.sampled_from(KINDS), max_size=6))
def test_any_json_is_read_or_refused(name, value, kinds):
    dialect = DIALECTS[name]
    raw = retyped(value, kinds)
    if not isinstance(raw, dict):
        return
    route = Route(dialect=name, operation="generate", model="m", stream=False)
    try:
        cleaned, _ = dialect.clean(raw, frozenset())
        dialect.parse_request(cleaned, route)
    except DialectError:
        pass
    with contextlib.suppress(DialectError):
        dialect.parse_reply(raw)
    assembler = dialect.make_assembler(wants_usage=False)
    for event in SseReader().feed(b"data: " + json.dumps(raw).encode() + b"\n\n"):
        try:
            assembler.feed(event)
            assembler.finish()
        except DialectError:
            pass


HOSTED = {
    "chat": [
        {"tools": [{"type": "web_search"}]},
        {"web_search_options": {}, "x": 1},
        {"plugins": [{"id": "web"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://evil.test/x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "HTTPS://evil.test/x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "evil.test"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_url": "http://evil.test"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://evil.test"}}]}]},
    ],
    "responses": [
        {"tools": [{"type": "web_search_preview"}]},
        {"tools": [{"type": "mcp", "server_url": "https://evil.test"}]},
        {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        {"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]},
        {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "file_search", "x": "evil.test"}]}]},
        {"tools": [{"type": "computer_use_preview"}]},
        {"prompt": {"id": "evil.test"}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://evil.test"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://evil.test"}]}]},
        {"input": [{"type": "item_reference", "id": "evil.test"}]},
        {"input": [{"type": "mcp_approval_response", "approval_request_id": "evil.test", "approve": True}]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "http://evil.test"}]}]},
    ],
    "messages": [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]},
        {"tools": [{"type": "computer_20250124", "name": "computer"}]},
        {"tools": [{"type": "mcp_toolset", "mcp_server_name": "evil.test"}]},
        {"mcp_servers": [{"type": "url", "url": "https://evil.test"}]},
        {"container": {"id": "evil.test"}},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://evil.test"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "evil.test"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "evil.test"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {"type": "url", "url": "http://evil.test"}}]}]}]},
    ],
    "gemini": [
        {"tools": [{"googleSearch": {}}]},
        {"tools": [{"google_search": {}}]},
        {"tools": [{"urlContext": {}}]},
        {"tools": [{"code_execution": {}}]},
        {"tools": [{"fileSearch": {"fileSearchStoreNames": ["evil.test"]}}]},
        {"cachedContent": "cachedContents/evil.test"},
        {"cached_content": "cachedContents/evil.test"},
        {"contents": [{"parts": [{"fileData": {"fileUri": "https://evil.test"}}]}]},
        {"contents": [{"parts": [{"file_data": {"file_uri": "https://evil.test"}}]}]},
        {"contents": [{"parts": [{"functionResponse": {"name": "f", "response": {}, "parts": [{"fileData": {"fileUri": "http://evil.test"}}]}}]}]},
        {"toolConfig": {"retrievalConfig": {"x": "evil.test"}}, "tools": [{"functionDeclarations": [{"name": "f"}]}]},
    ],
}  # fmt: skip
BASE = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "responses": {"model": "m", "input": "hi"},
    "messages": {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
    "gemini": {"contents": [{"parts": [{"text": "hi"}]}]},
}
MARKS = ("evil.test", "search", "Search", "ontext", "nterpreter", "xecution", "omputer", "container", "plugins")


@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name, extras in HOSTED.items() for extra in extras])
def test_what_a_provider_would_do_by_itself_is_taken_out_and_named(name, extra):
    dialect = DIALECTS[name]
    cleaned, stripped = dialect.clean({**BASE[name], **extra}, frozenset())
    words = json.dumps({key: value for key, value in cleaned.items() if key not in ("include",)})
    words = words.replace("removed by the gateway", "")
    for name_of in stripped:
        words = words.replace(f"[{name_of} : not granted]", "")
    assert stripped
    assert not any(mark in words for mark in MARKS), words
    everything = frozenset(stripped)
    kept, still = dialect.clean({**BASE[name], **extra}, everything)
    assert not still
    assert any(mark in json.dumps(kept) for mark in MARKS), "granted, it stays"


def test_both_spellings_of_a_field_are_refused():
    with pytest.raises(DialectError):
        DIALECTS["gemini"].clean({**BASE["gemini"], "systemInstruction": {}, "system_instruction": {}}, frozenset())


def test_a_forced_tool_that_is_gone_is_not_forced():
    raw = {**BASE["chat"], "tools": [{"type": "web_search"}], "tool_choice": "required"}
    assert not {"tools", "tool_choice"} & set(DIALECTS["chat"].clean(raw, frozenset())[0])


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("POST", "/v1/chat/completions", ("chat", "generate", "")),
        ("POST", "/chat/completions/", ("chat", "generate", "")),
        ("POST", "/v1/responses", ("responses", "generate", "")),
        ("POST", "/v1/messages", ("messages", "generate", "")),
        ("POST", "/v1/messages/count_tokens", ("messages", "count", "")),
        ("POST", "/v1beta/models/gemini-2.5-pro:streamGenerateContent", ("gemini", "generate", "gemini-2.5-pro")),
        ("POST", "/v1beta/models/gemini-2.5-pro%3AgenerateContent", ("gemini", "generate", "gemini-2.5-pro")),
        ("POST", "/v1beta/models/x:countTokens", ("gemini", "count", "x")),
        ("GET", "/v1/models", ("chat", "models", "")),
        ("GET", "/v1beta/models/x", ("gemini", "model", "x")),
        ("GET", "/v1/chat/completions", None),
        ("POST", "/v1/files", None),
        ("POST", "/v1/responses/resp_1/cancel", None),
        ("POST", "/v1/embeddings", None),
        ("DELETE", "/v1/models/x", None),
    ],
)
def test_routes(method, path, wanted):
    route = find_route(method, path)
    assert (route and (route.dialect, route.operation, route.model)) == wanted


def test_a_models_name_cannot_leave_its_path():
    for name in ("../../v1/files", "a?b=c", "a b", "x:y/../z", ""):
        with pytest.raises(DialectError):
            DIALECTS["gemini"].target(name, stream=False)


def test_calls_of_gemini_without_ids_find_their_results():
    raw = {
        "contents": [
            {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"n": n}}} for n in (1, 2)]},
            {
                "role": "user",
                "parts": [{"functionResponse": {"name": "f", "response": {"output": f"r{n}"}}} for n in (1, 2)],
            },
        ]
    }
    cleaned, _ = DIALECTS["gemini"].clean(raw, frozenset())
    request = DIALECTS["gemini"].parse_request(cleaned, Route(dialect="gemini", operation="generate", model="m"))
    (asked, answered) = request.messages
    assert [p.id for p in asked.parts] == [p.call for p in answered.parts] == ["call_1", "call_2"]


def test_json_with_a_key_twice_is_sent_as_it_was_read():
    read = parse_object(b'{"tools": [{"type": "mcp"}], "tools": []}', "x")
    assert msgspec.json.encode(read) == b'{"tools":[]}'
