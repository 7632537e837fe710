"""What a request says about who sends it. Pure; nothing of it is evidence but the capability."""

from __future__ import annotations

import hmac
from urllib.parse import parse_qsl

from vallum.core.text import show
from vallum.gateway.http.exchange import Headers
from vallum.gateway.model.dialects.hosted import name_hosted

_AGENT_HEADERS = (
    b"x-claude-code-session-id",
    b"x-claude-code-agent-id",
    b"x-parent-session-id",
    b"x-session-id",
    b"x-session-affinity",
    b"session-id",
    b"session_id",
    b"thread-id",
    b"x-agent-id",
)
"""Headers in which agents say which of their agents or conversations asks."""
_RETRY_HEADERS = (b"x-stainless-retry-count", b"x-retry-count")


def is_capable(headers: Headers, query: str, capability: str) -> bool:
    """Whether one of the keys presented is the capability. Takes as long whatever was presented."""
    presented = [value for name, value in parse_qsl(query) if name == "key"]
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"authorization":
            scheme, _, rest = text.partition(" ")
            presented.append(rest.strip() if scheme.lower() == "bearer" else "")
        elif name in (b"x-api-key", b"x-goog-api-key", b"api-key"):
            presented.append(text)
    expected = capability.encode()
    matches = [hmac.compare_digest(key.encode("utf-8", "surrogatepass"), expected) for key in presented]
    return bool(capability) and any(matches)


def read_agent(headers: Headers) -> str:
    """Which of its agents asks, in the client's own words; empty when it does not say."""
    said = []
    for wanted in _AGENT_HEADERS:
        value = next((value for name, value in headers if name == wanted), b"")
        if value:
            said.append(show(value.decode("latin-1"), 80))
    return "/".join(said)[:240]


def is_retry(headers: Headers) -> bool:
    """Whether the client says that it asks again."""
    return any(name in _RETRY_HEADERS and value.strip() not in (b"", b"0") for name, value in headers)


def forwarded_headers(headers: Headers, granted: frozenset[str]) -> Headers:
    """The few headers of an agent that an upstream of its dialect gets: which version and which betas it speaks."""
    version = next((value for name, value in headers if name == b"anthropic-version"), b"2023-06-01")
    out: list[tuple[bytes, bytes]] = [(b"anthropic-version", version[:32])]
    betas = b",".join(value for name, value in headers if name == b"anthropic-beta").decode("latin-1").split(",")
    kept = [beta.strip() for beta in betas if beta.strip() and _may_pass(beta.strip(), granted)]
    if kept:
        out.append((b"anthropic-beta", ",".join(kept)[:2000].encode("latin-1", "replace")))
    return tuple(out)


_HOSTED_BETAS = {
    "mcp": "mcp",
    "code-execution": "code_interpreter",
    "files-api": "files",
    "web-search": "web_search",
    "web-fetch": "url_content",
    "computer-use": "computer",
    "skills": "container",
}


def _may_pass(beta: str, granted: frozenset[str]) -> bool:
    return all(name_hosted(name) in granted for prefix, name in _HOSTED_BETAS.items() if beta.startswith(prefix))
