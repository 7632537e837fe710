"""What a guest's message asks for, in the words that rules are about. Pure.

* ``tools/call``: the name of the tool. ``resources/read``, ``subscribe``, ``unsubscribe``: ``resource:URI``.
  ``prompts/get``: ``prompt:NAME``. ``completion/complete``: what it completes. These are judged.
* ``initialize``, ``ping``, ``logging/setLevel``, lists, and the notifications that belong to them: admitted on a
  granted server; lists come back with only what is granted.
* Everything else (tasks, methods that we do not know): refused.
* What a server may ask of a client (sampling, elicitation, roots) is not offered: it is taken out of ``initialize``,
  and the only answers of a guest that are passed on are the empty one (to ``ping``) and errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.mcp.messages import Kind, Message, kind_of

_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")
"""Names of tools: what MCP 2025-11-25 asks for. No other can look like one that is granted."""
_ADMITTED = frozenset(
    {
        "initialize", "ping", "logging/setLevel", "tools/list", "resources/list", "resources/templates/list",
        "prompts/list",
    }
)  # fmt: skip
_NOTIFICATIONS = frozenset({"notifications/initialized", "notifications/cancelled", "notifications/progress"})
_RESOURCES = frozenset({"resources/read", "resources/subscribe", "resources/unsubscribe"})
_OFFERED_BY_CLIENTS = ("sampling", "elicitation", "roots", "tasks", "experimental")


class RefusedMessageError(Exception):
    """A message that may not be sent, whatever the rules grant."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.decision = Decision(verdict="deny", rule=rule, reason=reason)


@dataclass(frozen=True)
class Asked:
    """What a message of the guest is."""

    kind: Kind
    id: int | str | None
    method: str
    subject: str
    """What rules are asked about; empty where the message is admitted on a granted server."""
    arguments: Message


def read_asked(message: Message) -> Asked:
    """What a checked message of the guest asks for.

    Raises:
        RefusedMessageError: it may not be sent.
    """
    kind, method, number = kind_of(message), message.get("method", ""), message.get("id")
    if kind == "response":
        if message.get("result", {}) != {}:
            raise RefusedMessageError("mcp-method", "a server may ask this client for nothing, so no answer is sent")
        return Asked(kind, number, "", "", {})
    params: Message = message.get("params", {})
    if kind == "notification":
        if method not in _NOTIFICATIONS:
            raise RefusedMessageError("mcp-method", f"the notification {show(method, 80)} is not passed on")
        return Asked(kind, None, method, "", params)
    return Asked(kind, number, method, _subject_of(method, params), params)


def _subject_of(method: str, params: Message) -> str:
    if method in _ADMITTED:
        return ""
    if method == "tools/call":
        if params.keys() - {"name", "arguments", "_meta"}:
            raise RefusedMessageError("malformed", "a call of a tool has a name, arguments and _meta, and nothing else")
        return name_tool(params.get("name"))
    if method in _RESOURCES:
        return name_other("resource", params.get("uri"))
    if method == "prompts/get":
        return name_other("prompt", params.get("name"))
    if method == "completion/complete" and isinstance(ref := params.get("ref"), dict):
        if ref.get("type") == "ref/resource":
            return name_other("resource", ref.get("uri"))
        if ref.get("type") == "ref/prompt":
            return name_other("prompt", ref.get("name"))
    raise RefusedMessageError("mcp-method", f"the method {show(method, 80)!r} is not passed on")


def name_tool(name: object) -> str:
    """The subject of a call of a tool.

    Raises:
        RefusedMessageError: it is no name that could be judged.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RefusedMessageError(
            "malformed", "the name of a tool is 1 to 128 of A-Z, a-z, 0-9, '_', '-', '.' and '/', nothing else"
        )
    return name


def name_other(prefix: str, name: object) -> str:
    """The subject of a resource or prompt.

    Raises:
        RefusedMessageError: it is no name that could be judged.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 2048 or not name.isascii() or not name.isprintable():
        raise RefusedMessageError(
            "malformed", f"the name of the {prefix} is not printable ASCII of 1 to 2048 characters"
        )
    return f"{prefix}:{name}"


def strip_offers(message: Message) -> Message:
    """``initialize`` without what a server could ask of the client; others as they are."""
    params = message.get("params")
    if message.get("method") != "initialize" or params is None:
        return message
    offered = params.get("capabilities")
    kept = {} if not isinstance(offered, dict) else {k: v for k, v in offered.items() if k not in _OFFERED_BY_CLIENTS}
    return {**message, "params": {**params, "capabilities": kept}}
