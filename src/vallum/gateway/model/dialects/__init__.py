"""The dialects by name, and which one a path asks for."""

from __future__ import annotations

import re
from urllib.parse import unquote

from vallum.core.messages import DialectName
from vallum.gateway.model.dialects.chat import Chat
from vallum.gateway.model.dialects.contract import Dialect, Route
from vallum.gateway.model.dialects.gemini import Gemini
from vallum.gateway.model.dialects.messages import Messages
from vallum.gateway.model.dialects.responses import RESPONSES

DIALECTS: dict[DialectName, Dialect] = {
    "chat": Chat(),
    "responses": RESPONSES,
    "messages": Messages(),
    "gemini": Gemini(),
}

_VERSION = re.compile(r"^/(v1|v1beta|v1alpha)(?=/)")
_GEMINI = re.compile(
    r"/models/(?P<model>[^:?]+(?::[^:?]+)?):(?P<verb>generateContent|streamGenerateContent|countTokens)"
)
_POSTED: dict[str, Route] = {
    "/chat/completions": Route(dialect="chat", operation="generate"),
    "/responses": Route(dialect="responses", operation="generate"),
    "/responses/input_tokens": Route(dialect="responses", operation="count"),
    "/messages": Route(dialect="messages", operation="generate"),
    "/messages/count_tokens": Route(dialect="messages", operation="count"),
}


def find_route(method: str, path: str) -> Route | None:
    """What a request asks for; ``path`` without its query. None: nothing that a model gateway has.

    The version in front (``/v1``, ``/v1beta``) may be left out: agents differ in what they take for the base URL.
    """
    version = _VERSION.match(path)
    rest = (path[version.end() :] if version else path).rstrip("/")
    if method == "POST":
        if found := _GEMINI.fullmatch(unquote(rest)):
            is_count = found["verb"] == "countTokens"
            stream = found["verb"] == "streamGenerateContent"
            return Route(
                dialect="gemini", operation="count" if is_count else "generate", model=found["model"], stream=stream
            )
        return _POSTED.get(rest)
    if method == "GET":
        dialect: DialectName = "gemini" if version and version[1] != "v1" else "chat"
        if rest == "/models":
            return Route(dialect=dialect, operation="models")
        if rest.startswith("/models/"):
            return Route(dialect=dialect, operation="model", model=unquote(rest.removeprefix("/models/")))
    return None
