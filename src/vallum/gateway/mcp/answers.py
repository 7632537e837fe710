"""What a server says: lists with only what is granted, no questions to the client, and whether a tool has changed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from vallum.gateway.mcp.judging import RefusedMessageError, name_other, name_tool
from vallum.gateway.mcp.messages import Message, kind_of, write_message

MAX_TOOLS = 4096
"""Tools of one server whose definitions are remembered."""
_LISTS = {
    "tools": ("name", ""),
    "resources": ("uri", "resource"),
    "resourceTemplates": ("uriTemplate", "resource"),
    "prompts": ("name", "prompt"),
}
_METHODS = {
    "tools/list": "tools",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
    "prompts/list": "prompts",
}

Admits = Callable[[str], bool]
"""Whether a subject (as in rules) is granted or held."""


@dataclass
class Definitions:
    """The tools of one server as they were when they were first listed."""

    first: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Those that were listed otherwise since: a server may first show a harmless tool, and another later."""

    def learn(self, tool: str, definition: Message) -> bool:
        """Whether it is another than the first one."""
        digest = sha256(write_message(definition)).hexdigest()
        if tool not in self.first and len(self.first) >= MAX_TOOLS:
            return False
        if self.first.setdefault(tool, digest) == digest:
            return False
        self.changed.add(tool)
        return True


@dataclass
class Passed:
    """What may be given to the guest of a server's message."""

    message: Message | None
    """None: nothing of it."""
    hidden: int = 0
    """Entries of a list that are not granted."""
    changed: list[str] = field(default_factory=list)
    """Tools whose definition is not the one that was first listed."""


def filter_message(message: Message, method: str | None, admits: Admits, definitions: Definitions) -> Passed:
    """Filter a checked message of the server; ``method`` is what it answers, None where that is not known."""
    kind = kind_of(message)
    if kind == "notification" or (kind == "request" and message["method"] == "ping"):
        return Passed(message)
    if kind == "request":
        return Passed(None)  # sampling, elicitation, roots: not offered
    result = message.get("result")
    if not isinstance(result, dict):
        return Passed(message)
    wanted = _LISTS if method is None else {name: _LISTS[name] for name in (_METHODS.get(method),) if name}
    passed = Passed(message)
    for name, (key, prefix) in wanted.items():
        entries = result.get(name)
        if not isinstance(entries, list):
            continue
        kept = []
        for entry in entries:
            subject = _subject(entry, key, prefix)
            if subject is None or not admits(subject):
                passed.hidden += 1
                continue
            if name == "tools" and definitions.learn(subject, entry):
                passed.changed.append(subject)
            kept.append(entry)
        result = {**result, name: kept}
    passed.message = {**message, "result": result}
    return passed


def _subject(entry: object, key: str, prefix: str) -> str | None:
    if not isinstance(entry, dict):
        return None
    try:
        return name_other(prefix, entry.get(key)) if prefix else name_tool(entry.get(key))
    except RefusedMessageError:
        return None
