"""MCP messages: what passes is written so that it reads the same again; the rest is refused by the two documented errors.

The first byte says whether the guest or a server speaks.
"""

from __future__ import annotations

from vallum.gateway.mcp.answers import Definitions, filter_message
from vallum.gateway.mcp.judging import RefusedMessageError, read_asked, strip_offers
from vallum.gateway.mcp.messages import MessageError, parse_message, write_denial, write_error, write_message

SEEDS = (
    b'\x00{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a","arguments":{"x":[1,1.5,null]}}}',
    b'\x00{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"capabilities":{"sampling":{},"x":{}}}}',
    b'\x00{"jsonrpc":"2.0","id":"a","method":"resources/read","params":{"uri":"file:///a"}}',
    b'\x00{"jsonrpc":"2.0","id":1,"method":"completion/complete","params":{"ref":{"type":"ref/prompt","name":"a"}}}',
    b'\x01{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"a"},{"name":"b"}]}}',
    b'\x01{"jsonrpc":"2.0","id":1,"method":"sampling/createMessage"}',
)


def fuzz(data: bytes) -> None:
    if not data:
        return
    try:
        message = parse_message(data[1:])
        if data[0] & 1:
            for method in (None, "tools/list", "resources/list"):
                passed = filter_message(message, method, lambda subject: subject == "a", Definitions())
                assert passed.message is None or parse_message(write_message(passed.message)) == passed.message
            return
        asked = read_asked(message)
        sent = strip_offers(message)
        assert read_asked(parse_message(write_message(sent))).subject == asked.subject
    except MessageError as error:
        parse_message(write_error(None, error))
    except RefusedMessageError as error:
        parse_message(write_denial(message.get("id"), error.decision))
