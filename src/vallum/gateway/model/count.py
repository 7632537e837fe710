"""The small questions that agents ask besides: how many tokens a request has, and which models there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from vallum.core.messages import estimate_tokens
from vallum.gateway.kit import Kit
from vallum.gateway.model.client import forwarded_headers
from vallum.gateway.model.dialects import DIALECTS
from vallum.gateway.model.dialects.contract import DialectError, Route
from vallum.gateway.model.dialects.fields import parse_object
from vallum.gateway.model.dialects.hosted import name_hosted
from vallum.gateway.model.plan import RefusedError, check_canaries, find_credential
from vallum.gateway.model.upstreams.http import HttpServer
from vallum.gateway.tls.termination import HandshakeError

if TYPE_CHECKING:
    from vallum.gateway.model.calls import Asked, ModelCalls

MAX_COUNT_BYTES = 64 * 1024
_COUNTED = ("messages", "gemini")
"""Dialects whose providers count for nothing."""


async def count_tokens(kit: Kit, calls: ModelCalls, asked: Asked) -> tuple[int, Any]:
    """(status, JSON): what the upstream counts, if it speaks as the agent does and can count; an estimate otherwise.

    Raises:
        RefusedError: the request cannot be read, or must not be sent.
    """
    dialect, door = DIALECTS[asked.route.dialect], kit.model
    if door is None:
        raise RefusedError(404, "no-model-door", "this cell has no model")
    granted = frozenset(name_hosted(name) for name in door.hosted)
    try:
        given = parse_object(asked.body, "the request")
        if asked.route.dialect == "gemini" and "contents" not in given and "generateContentRequest" not in given:
            given = {**given, "contents": []}
        raw, _ = dialect.clean(given, granted)
        request = dialect.parse_request(raw, asked.route)
        model = door.model or request.model
        target = dialect.target(model, stream=False, count=True)
    except DialectError as error:
        raise RefusedError(400, "malformed", str(error)) from error
    estimate = dialect.write_count(estimate_tokens(request))
    upstream = calls.upstream(door)
    if not isinstance(upstream, HttpServer) or door.dialect != "same" or dialect.name not in _COUNTED:
        return 200, estimate
    if dialect.name == "messages":
        raw = {key: raw[key] for key in ("messages", "system", "tools", "tool_choice", "thinking") if key in raw}
        raw["model"] = model
    else:
        raw = {"generateContentRequest": {**raw, "model": f"models/{model}"}}
    body = check_canaries(kit, msgspec.json.encode(raw))
    credential = find_credential(kit, door)
    keys = dialect.key_headers(credential.secret) if credential is not None else ()
    extra = forwarded_headers(asked.headers, granted) if dialect.name == "messages" else ()
    try:
        got = await upstream.ask("POST", target, (*keys, *extra), body)
        try:
            counted = (
                parse_object(await got.read(MAX_COUNT_BYTES), "the upstream's answer") if got.status == 200 else {}
            )
        finally:
            got.close()
    except (OSError, DialectError, HandshakeError):
        return 200, estimate
    key = next(iter(estimate))
    return 200, {key: counted[key]} if isinstance(counted.get(key), int) else estimate


def list_models(kit: Kit, route: Route) -> tuple[int, Any]:
    """(status, JSON): the door's model, in the form of the dialect. A door that keeps the agent's choice lists none."""
    name = kit.model.model if kit.model is not None else ""
    wanted = route.model or name
    if route.dialect == "gemini":
        entry: dict[str, Any] = {
            "name": f"models/{wanted}",
            "displayName": wanted,
            "supportedGenerationMethods": ["generateContent", "countTokens"],
        }
        return 200, entry if route.operation == "model" else {"models": [entry] if name else []}
    entry = {
        "id": wanted,
        "object": "model",
        "type": "model",
        "display_name": wanted,
        "created": 0,
        "owned_by": "vallum",
    }
    if route.operation == "model":
        return 200, entry
    return 200, {
        "object": "list",
        "data": [entry] if name else [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }
