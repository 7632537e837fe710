"""Messages of MCP: read in one way or not at all, judged by what they ask for, lists filtered."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vallum.gateway.mcp.answers import Definitions, filter_message
from vallum.gateway.mcp.judging import RefusedMessageError, read_asked, strip_offers
from vallum.gateway.mcp.messages import MessageError, parse_message, write_message


def request(method, params=None, number=1):
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params or {}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abcdef"), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["text", "count", "more"]), JSON), st.integers() | st.text())
def test_what_is_sent_on_is_what_was_read(arguments, number):
    message = request("tools/call", {"name": "echo", "arguments": arguments}, number)
    try:
        read = parse_message(json.dumps(message).encode())
        assert json.loads(write_message(read)) == json.loads(json.dumps(message))
    except MessageError:
        assert "\\ud" in json.dumps(message), "only half a surrogate pair is refused"


@given(st.binary(max_size=200))
def test_anything_is_read_or_refused(data):
    try:
        parse_message(data)
    except MessageError:
        pass
    else:
        assert json.loads(data)["jsonrpc"] == "2.0"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "1", '"x"', "null", "{}", '{"jsonrpc":"1.0","id":1,"method":"ping"}',
        '{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}', '{"jsonrpc":"2.0","id":1}',
        '{"jsonrpc":"2.0","id":1,"result":{},"error":{}}', '{"jsonrpc":"2.0","id":true,"method":"ping"}',
        '{"jsonrpc":"2.0","id":1.5,"method":"ping"}', '{"jsonrpc":"2.0","id":null,"method":"ping"}',
        '{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', '{"jsonrpc":"2.0","id":1,"method":"ping","extra":1}',
        '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":1,"A":2}}',
        '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"K":1,"\\u212a":2}}',
        '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":1e999}}',
        '{"jsonrpc":"2.0","id":' + "9" * 500 + ',"method":"ping"}',
    ],
)  # fmt: skip
def test_what_is_no_message(text):
    with pytest.raises(MessageError):
        parse_message(text.encode())


@pytest.mark.parametrize(
    ("message", "subject"),
    [
        (request("tools/call", {"name": "a.b/c-d_E"}), "a.b/c-d_E"),
        (request("resources/read", {"uri": "file:///x"}), "resource:file:///x"),
        (request("prompts/get", {"name": "p"}), "prompt:p"),
        (request("completion/complete", {"ref": {"type": "ref/prompt", "name": "p"}}), "prompt:p"),
        (request("tools/list"), ""),
        ({"jsonrpc": "2.0", "method": "notifications/initialized"}, ""),
        ({"jsonrpc": "2.0", "id": 3, "result": {}}, ""),
    ],
)
def test_what_a_message_asks_for(message, subject):
    assert read_asked(message).subject == subject


@pytest.mark.parametrize(
    "message",
    [
        request("tools/call", {"name": name}) for name in ("", "a b", "a:b", "\uff41", "a\n", "x" * 129, 5, None)
    ]
    + [
        request("tools/call", {"name": "a", "task": {}}), request("tasks/get", {"taskId": "1"}),
        request("resources/read", {"uri": "file:///\u00e9"}), request("server/discover"),
        request("completion/complete", {"ref": "x"}), {"jsonrpc": "2.0", "method": "notifications/other"},
        {"jsonrpc": "2.0", "id": 3, "result": {"content": "secret"}},
    ],
)  # fmt: skip
def test_what_may_not_be_sent(message):
    with pytest.raises(RefusedMessageError):
        read_asked(message)


def test_a_server_is_not_told_that_it_could_ask():
    offered = {"sampling": {}, "elicitation": {}, "roots": {}, "own": {}}
    sent = strip_offers(request("initialize", {"capabilities": offered, "protocolVersion": "x"}))
    assert sent["params"] == {"capabilities": {"own": {}}, "protocolVersion": "x"}


def test_lists_are_filtered_and_changes_told():
    known = Definitions()
    tools = [{"name": "ok", "description": "1"}, {"name": "no"}, {"name": "o k"}, "odd"]

    def listed(entries, method="tools/list"):
        message = {"jsonrpc": "2.0", "id": 1, "result": {"tools": entries}}
        return filter_message(message, method, lambda subject: subject == "ok", known)

    first = listed(tools)
    assert first.message["result"]["tools"] == [tools[0]]
    assert (first.hidden, first.changed) == (3, [])
    assert listed(tools, None).message["result"]["tools"] == [tools[0]], "also where it is not known what is answered"
    assert listed([{"name": "ok", "description": "2"}]).changed == ["ok"]
    assert known.changed == {"ok"}


@pytest.mark.parametrize("method", ["sampling/createMessage", "elicitation/create", "roots/list"])
def test_questions_of_a_server_do_not_reach_the_guest(method):
    assert filter_message(request(method), None, lambda _: True, Definitions()).message is None
    assert filter_message(request("ping"), None, lambda _: True, Definitions()).message is not None
