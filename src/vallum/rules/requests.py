"""What a rule says of one HTTP request: methods, paths, git's smart protocol, WebSocket, tools of an MCP server.

Source: RFC 9110 (methods), gitprotocol-http(5), MCP 2025-06-18 (streamable HTTP).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal
from urllib.parse import parse_qs

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.facts import RequestFacts
from vallum.rules.grants import Rule
from vallum.rules.paths import match_path, read_ways

GitAction = Literal["", "read", "write"]
_GIT = {"git-upload-pack": "read", "git-receive-pack": "write"}
_MCP_METHODS = frozenset({"POST", "GET", "DELETE"})


def git_action(request: RequestFacts) -> GitAction:
    """What a request of git's smart protocol is for; empty when it is none."""
    if request.method == "GET" and request.path.endswith("/info/refs"):
        asked = parse_qs(request.query, keep_blank_values=True).get("service", [])
        service = asked[0] if len(asked) == 1 else ""
    elif request.method == "POST" and not request.query:
        service = request.path.rpartition("/")[2]
    else:
        return ""
    action = _GIT.get(service, "")
    return "read" if action == "read" else "write" if action == "write" else ""


def possible_git_actions(request: RequestFacts) -> frozenset[str]:
    """Whatever some server may take a request of git's smart protocol for: for denials, which hold in any reading."""
    asked = parse_qs(request.query, keep_blank_values=True).get("service", [])
    names = [name for way in read_ways(request.path) for name in way.rstrip("/").split("/")[-1:]]
    return frozenset(_GIT[name] for name in (*asked, *names) if name in _GIT)


def covers_request(rule: Rule, request: RequestFacts) -> bool:
    """Whether a denial is about this request: any reading of its path is enough."""
    if rule.methods is not None and request.method not in rule.methods:
        return False
    if rule.paths is not None and not any(match_path(p, way) for p in rule.paths for way in read_ways(request.path)):
        return False
    if rule.git:
        actions = possible_git_actions(request)
        if not actions or (rule.git == "write" and "write" not in actions):
            return False
    return not rule.websocket or bool(request.upgrade)


def refuse_request(rule: Rule, request: RequestFacts, where: str) -> Decision | None:
    """Why a grant does not admit the request, told with what it does admit; None when it does (its condition apart)."""
    if not rule.narrows_requests:
        return None
    what = f"{show(request.method, 40)} {where}{show(request.path, 120)}"
    if rule.git and (refusal := _refuse_git(rule, request, what)) is not None:
        return refusal
    methods = rule.methods if rule.tools is None else rule.methods or tuple(sorted(_MCP_METHODS))
    if methods is not None and request.method not in methods:
        return _deny("method-mismatch", f"{what} is not granted: {rule.id} admits {', '.join(methods)} only")
    if rule.paths is not None and not all(_fits(rule.paths, way) for way in read_ways(request.path)):
        paths = ", ".join(rule.paths[:5]) + (", ..." if len(rule.paths) > 5 else "")
        return _deny("path-mismatch", f"{what} is not granted: {rule.id} admits the paths {paths} only")
    if request.upgrade and not rule.websocket:
        return _deny(
            "upgrade-mismatch", f"{what} may not become a {show(request.upgrade, 40)}: {rule.id} does not grant it"
        )
    return None


def refuse_tool(rule: Rule, tool: str) -> Decision | None:
    """Why a grant does not admit a call of a tool; None when it does."""
    if rule.tools is None or _names_tool(rule.tools, tool):
        return None
    return _deny(
        "tool-mismatch",
        f"the tool {show(tool, 80)!r} is not granted: {rule.id} admits {', '.join(rule.tools[:8]) or 'none'} only",
    )


def denies_tool(rule: Rule, tool: str) -> bool:
    """Whether a denial is about calls of the tool. Case makes no difference: it may make none to the server."""
    return rule.tools is not None and any(fnmatchcase(tool.casefold(), pattern.casefold()) for pattern in rule.tools)


def _refuse_git(rule: Rule, request: RequestFacts, what: str) -> Decision | None:
    action = git_action(request)
    if not action:
        return _deny("git-mismatch", f"{what} is not granted: {rule.id} admits git's smart protocol only")
    if action == "write" and rule.git != "write":
        return _deny("git-read-only", f"{what} is a push, and {rule.id} grants git for reading only")
    return None


def _fits(patterns: Iterable[str], path: str) -> bool:
    return any(match_path(pattern, path) for pattern in patterns)


def _names_tool(patterns: Iterable[str], tool: str) -> bool:
    """Tools by their names; ``resource:URI`` and ``prompt:NAME`` only by patterns that begin so, too."""
    kind, mark, _ = tool.partition(":")
    prefix = f"{kind}:" if mark and kind in {"resource", "prompt"} else ""
    return any(fnmatchcase(tool, pattern) for pattern in patterns if pattern.startswith(prefix))


def _deny(rule: str, reason: str) -> Decision:
    return Decision(verdict="deny", rule=rule, reason=reason)
