"""What a provider would do by itself if asked: search the web, run code, call servers, fetch addresses.

Each of these reaches the world past every wall of the cell, so each is taken out of requests unless the door grants
it. Names that the providers give to one thing are one name here, which is what :attr:`ModelDoor.hosted` lists.
Covered: tools, servers, containers, stored files and addresses to fetch, and any kind that is not known.
"""

from __future__ import annotations

import re
from typing import Any

_DATED = re.compile(r"_(20\d{6}|preview(_20\d\d_\d\d_\d\d)?|20\d\d_\d\d_\d\d|preview_20\d\d_\d\d_\d\d)$")

_ONE_NAME = {
    "googleSearch": "web_search",
    "googleSearchRetrieval": "web_search",
    "web_search_options": "web_search",
    "urlContext": "url_content",
    "web_fetch": "url_content",
    "codeExecution": "code_interpreter",
    "code_execution": "code_interpreter",
    "bash_code_execution": "code_interpreter",
    "computer_use": "computer",
    "computerUse": "computer",
    "mcp_servers": "mcp",
    "mcpServers": "mcp",
    "mcp_toolset": "mcp",
    "fileSearch": "file_search",
}


def name_hosted(kind: Any) -> str:
    """The one name of a kind of hosted tool, without version or preview."""
    if not isinstance(kind, str) or not kind:
        return "unknown"
    plain = _DATED.sub("", kind)
    return _ONE_NAME.get(plain, plain)[:64]


def is_web_address(url: Any) -> bool:
    """Whether a provider would fetch it. Everything but inline data is taken for an address."""
    return not (isinstance(url, str) and url[:5].lower() == "data:")


def removed(name: str) -> str:
    """What stands in the place of a content that was taken out, for the model."""
    return f"[{name} removed by the gateway: not granted]"


def keep_known(
    raw: dict[str, Any], known: frozenset[str], granted: frozenset[str], stripped: list[str]
) -> dict[str, Any]:
    """``raw`` with the fields that are known or granted; the names of the others go to ``stripped``."""
    kept = {}
    for key, value in raw.items():
        if key in known or name_hosted(key) in granted:
            kept[key] = value
        elif value is not None and value is not False and value != [] and value != "":  # {} asks for a tool as it is
            stripped.append(name_hosted(key))
    return kept
