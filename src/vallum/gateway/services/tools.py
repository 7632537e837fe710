"""Tools of the host, offered to a cell as an MCP server at ``http://tools.vallum.internal/mcp``.

What is offered is granted, unless a rule says otherwise: a ``[[deny]]`` or ``[[hold]]`` with
``host = "tools.vallum.internal"`` (or a denial of tools for ``*``). Streamable HTTP without sessions: every answer is
one JSON object.

Covered: a call that is denied does not reach the host's function; each is recorded, with the step that made it; a call
ends when the guest leaves. Not covered: what the function does with its arguments; they are the guest's words, and no
schema is enforced on them here. Source: MCP 2025-06-18.
"""

from __future__ import annotations

import asyncio

import msgspec

from vallum.core.clock import wall_ns
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GATEWAY_SERVICE, GatewayCell, NodeGoneError, Owner
from vallum.gateway.http.exchange import BodyTooLargeError, Carrier, DeniedError, Exchange, Headers
from vallum.gateway.http.judging import read_request
from vallum.gateway.kit import SERVICE_PORT, TOOLS_HOST
from vallum.gateway.mcp.calls import CallRecord
from vallum.gateway.mcp.judging import Asked, RefusedMessageError, read_asked
from vallum.gateway.mcp.messages import (
    MAX_MESSAGE_BYTES,
    Message,
    MessageError,
    parse_message,
    write_denial,
    write_error,
    write_message,
)
from vallum.gateway.names import stand_ins_of
from vallum.rules.facts import FlowFacts, Pin, RequestFacts
from vallum.rules.grants import Rule
from vallum.rules.verdicts import judge_tool
from vallum.version import __version__

SERVER = "tools"
"""How the record names it."""
PATH = "/mcp"
VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26")
_JSON: Headers = ((b"content-type", b"application/json"),)
_OFFERED = Rule(id=GATEWAY_SERVICE, host=TOOLS_HOST, ports=(SERVICE_PORT,), tools=("*",))


def make_service(carrier: Carrier) -> HostTools:
    """The service for one flow."""
    return HostTools(carrier)


def judge_host_tool(cell: GatewayCell, tool: str, request: RequestFacts, owner: Owner) -> Decision:
    """The verdict on a call of a tool of the host: allowed, unless a rule is about it."""
    rules = msgspec.structs.replace(
        cell.rules,
        allow=(_OFFERED,),
        hold=tuple(rule for rule in cell.rules.hold if rule.host == TOOLS_HOST),
        deny=tuple(rule for rule in cell.rules.deny if rule.host == TOOLS_HOST or rule.tools is not None),
    )
    facts = FlowFacts(
        dst_ip=stand_ins_of("tools")[0],
        dst_port=SERVICE_PORT,
        names=(Pin(name=TOOLS_HOST),),
        protocol="http",
        server_name=TOOLS_HOST,
        now_ns=wall_ns(),
    )
    return judge_tool(rules, facts, msgspec.structs.replace(request, host=TOOLS_HOST), tool, cell.asker(owner))


class HostTools:
    """See :class:`~vallum.gateway.http.exchange.Service`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def close(self) -> None:
        """As :meth:`Service.close`."""

    async def serve(self, exchange: Exchange) -> None:
        """As :meth:`Service.serve`."""
        head = exchange.head
        if head.path != PATH:
            raise DeniedError(_deny(f"there is no {show(head.path, 80)} here: the tools of the host are at {PATH}"))
        if head.method != "POST":
            await exchange.answer(405, ((b"allow", b"POST"),), b"")
            return
        kind = (head.header(b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json" or (head.header(b"content-encoding") or b"identity") != b"identity":
            raise DeniedError(_deny("a message of MCP is application/json without a content-encoding"))
        try:
            message = parse_message(await exchange.read_body(MAX_MESSAGE_BYTES))
            write_message(message)  # what cannot be written anew is refused, here as elsewhere
        except (MessageError, BodyTooLargeError) as error:
            failed = error if isinstance(error, MessageError) else MessageError(str(error))
            await exchange.answer(400, _JSON, write_error(None, failed))
            return
        try:
            asked = read_asked(message)
        except RefusedMessageError as error:
            await exchange.answer(200, _JSON, write_denial(message.get("id"), error.decision))
            return
        if asked.kind != "request":
            await exchange.answer(202, (), b"")
            return
        await exchange.answer(200, _JSON, await self._answer(exchange, asked))

    async def _answer(self, exchange: Exchange, asked: Asked) -> bytes:
        cell, owner = self._carrier.cell, await self._carrier.owner()
        _, request = read_request(exchange.head)
        if asked.method == "tools/call":
            return await self._call(exchange, asked, request, owner)
        if asked.method == "initialize":
            wanted = asked.arguments.get("protocolVersion")
            result: Message = {
                "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[1],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "vallum", "version": __version__},
            }
        elif asked.method == "tools/list":
            result = {
                "tools": [
                    {
                        "name": tool.name,
                        "description": tool.description,
                        "inputSchema": msgspec.json.decode(tool.input_schema),
                    }
                    for tool in cell.kit.tools
                    if judge_host_tool(cell, tool.name, request, owner).verdict != "deny"
                ]
            }
        elif asked.method == "ping":
            result = {}
        else:
            decision = Decision(verdict="deny", rule="mcp-method", reason=f"there is no {show(asked.method, 80)} here")
            return write_denial(asked.id, decision)
        return write_message({"jsonrpc": "2.0", "id": asked.id, "result": result})

    async def _call(self, exchange: Exchange, asked: Asked, request: RequestFacts, owner: Owner) -> bytes:
        cell, record = self._carrier.cell, CallRecord(exchange, SERVER, asked)
        if any(tool.name == asked.subject for tool in cell.kit.tools):
            decision = await record.settle(judge_host_tool(cell, asked.subject, request, owner))
        else:
            decision = _deny(f"the host offers no tool {show(asked.subject, 80)}")
        if decision.verdict != "allow":
            await record.write(decision)
            return write_denial(asked.id, decision)
        arguments = asked.arguments.get("arguments", {})
        try:
            said = await self._ask(exchange, asked.subject, write_message(arguments).decode())
            result = msgspec.json.decode(said, type=dict[str, object])
        except NodeGoneError as error:
            reason = f"vallum: the tool {asked.subject} gave no answer: {show(str(error), 200)}"
            result = {"content": [{"type": "text", "text": reason}], "isError": True}
        body = write_message({"jsonrpc": "2.0", "id": asked.id, "result": result})
        record.is_error, record.result_bytes = result.get("isError") is True, len(body)
        await record.write(decision)
        return body

    async def _ask(self, exchange: Exchange, tool: str, arguments: str) -> str:
        cell = self._carrier.cell
        calling = asyncio.ensure_future(
            cell.node.call_tool(cell.id, name=tool, arguments=arguments, flow=self._carrier.id)
        )
        left = asyncio.ensure_future(exchange.left())
        try:
            await asyncio.wait({calling, left}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                raise NodeGoneError("the guest left before it was answered")
            return calling.result()
        finally:
            calling.cancel()
            left.cancel()


def _deny(reason: str) -> Decision:
    return Decision(verdict="deny", rule=GATEWAY_SERVICE, reason=reason)
