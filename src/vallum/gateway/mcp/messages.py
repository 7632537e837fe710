"""JSON-RPC 2.0 messages of MCP, read so that nobody can read them in another way. Pure.

Covered: keys that come twice, also where only case or width tells them apart; NaN, infinities and numbers without end;
text that is no UTF-8; nesting and length without bounds; batches; members that JSON-RPC has not. What is sent on is
written anew from what was read. Not covered: what a server makes of arguments that are as they should be.
Source: JSON-RPC 2.0; MCP 2025-06-18, "Base Protocol" and "Transports".
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NoReturn

from vallum.core.text import show
from vallum.core.verdict import Decision

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Of the guest."""
MAX_DIGITS = 400
DENIED = -32003
"""Error code of what a rule denies, in the range that JSON-RPC leaves to implementations."""
UNKNOWN_METHOD = -32601

Message = dict[str, Any]
Kind = Literal["request", "notification", "response"]
_MEMBERS = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})


class MessageError(Exception):
    """It is no message of MCP. Says why; ``code`` is JSON-RPC's."""

    def __init__(self, reason: str, code: int = -32600) -> None:
        super().__init__(reason)
        self.code = code


def parse_message(data: bytes) -> Message:
    """One message.

    Raises:
        MessageError: it is none, or one that could be read in two ways.
    """
    try:
        message = json.loads(
            data.decode(), object_pairs_hook=_make_object, parse_constant=_refuse_number, parse_int=_read_int,
            parse_float=_read_float,
        )  # fmt: skip
    except RecursionError:
        raise MessageError("the message is nested too deeply", -32700) from None
    except ValueError as error:
        raise MessageError(f"the message is no JSON in UTF-8 ({error})", -32700) from error
    if isinstance(message, list):
        raise MessageError("batches are not taken (MCP 2025-06-18 has none): send one message in each request")
    if not isinstance(message, dict):
        raise MessageError("the message is no object")
    check_message(message)
    return message


def check_message(message: Message) -> None:
    """Raise MessageError unless it is a request, a notification or a response."""
    odd = message.keys() - _MEMBERS
    if odd:
        raise MessageError(f"the message has a member {show(min(odd), 40)!r} that JSON-RPC has not")
    if message.get("jsonrpc") != "2.0":
        raise MessageError("the message is not of JSON-RPC 2.0")
    has_id = "id" in message
    number = message.get("id")
    is_number = isinstance(number, int | str) and not isinstance(number, bool)
    if has_id and not is_number and not (number is None and "error" in message):
        raise MessageError("the id is neither text nor a whole number")
    if "method" in message:
        if not isinstance(message["method"], str) or "result" in message or "error" in message:
            raise MessageError("the message is both a request and an answer, or its method is no text")
        if not isinstance(message.get("params", {}), dict):
            raise MessageError("the parameters are no object", -32602)
        return
    if not has_id or ("result" in message) == ("error" in message) or "params" in message:
        raise MessageError("the message is neither a request nor an answer")


def kind_of(message: Message) -> Kind:
    """What a checked message is."""
    if "method" not in message:
        return "response"
    return "request" if "id" in message else "notification"


def write_message(message: Message) -> bytes:
    """The message as it is sent.

    Raises:
        MessageError: it holds text that UTF-8 cannot write (half of a surrogate pair).
    """
    try:
        return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise MessageError("the message holds half of a surrogate pair", -32700) from None


def write_denial(number: object, decision: Decision) -> bytes:
    """The JSON-RPC error that tells an agent of a refusal, with the rule."""
    reason = f"vallum: blocked by rule {show(decision.rule)}: {show(decision.reason, 400)}"
    # Clients try newer methods first, and fall back when there is no such method.
    code = UNKNOWN_METHOD if decision.rule == "mcp-method" else DENIED
    return _write_error(number, code, reason, {"rule": show(decision.rule)})


def write_error(number: object, error: MessageError) -> bytes:
    """The JSON-RPC error for what is no message."""
    return _write_error(number, error.code, f"vallum: {error}", {"rule": "malformed"})


def _write_error(number: object, code: int, reason: str, data: Message) -> bytes:
    clean = reason.encode("utf-8", "replace").decode()
    return write_message(
        {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": clean, "data": data}}
    )  # an id has been checked or is null


def _make_object(pairs: list[tuple[str, Any]]) -> Message:
    made = dict(pairs)
    # Some decoders take a member whose name only folds to the one that they look for.
    if len({key.casefold() for key in made}) != len(pairs):
        raise MessageError("the message has a member twice", -32700)
    return made


def _refuse_number(text: str) -> NoReturn:
    raise MessageError(f"{text} is no number of JSON", -32700)


def _read_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise MessageError("the message holds a number of too many digits", -32700)
    return int(text)


def _read_float(text: str) -> float:
    value = float(text)
    if len(text) > MAX_DIGITS or not math.isfinite(value):
        raise MessageError("the message holds a number that is too large", -32700)
    return value
