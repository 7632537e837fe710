"""The keys of ``[[allow]]``, ``[[hold]]`` and ``[[deny]]``: how each value is read, and what is said when it cannot be.

A reader gives None for what is not usable, or raises RuleError where there is more to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vallum.rules.conditions import check_condition
from vallum.rules.grants import PROTOCOLS, Budget, Rule, Selector, parse_cidr, parse_host
from vallum.rules.paths import parse_pattern

PHASES = ("setup", "run")
SERVICES = ("forward", "packages")
GIT = ("read", "write")
SSH = ("exec", "shell", "sftp", "git-read", "git-write")
GRANTING_ONLY = ("credential", "service", "ssh", "budget")
"""What says how something granted is done has no place in a denial."""
_RULE_ID = re.compile(r"[A-Za-z0-9*@][A-Za-z0-9.:/*@_-]{0,99}")
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PATTERN = re.compile(r"[\x21-\x7e]{1,200}")


class Field(NamedTuple):
    """A key: its reader, and what is allowed."""

    read: Callable[[Any], Any]
    allowed: str


def read_names(value: Any, read: Callable[[str], str | None]) -> tuple[str, ...] | None:
    """A list of one or more texts, each of which ``read`` can read; without repetitions."""
    if not isinstance(value, list) or not value:
        return None
    found = tuple(read(item) if isinstance(item, str) else None for item in value)
    return None if None in found else tuple(dict.fromkeys(item for item in found if item is not None))


def _text(read: Callable[[str], str | None]) -> Callable[[Any], str | None]:
    return lambda value: read(value) if isinstance(value, str) else None


def _list(read: Callable[[str], str | None]) -> Callable[[Any], tuple[str, ...] | None]:
    return lambda value: read_names(value, read)


def _one_of(*words: str) -> Callable[[str], str | None]:
    return lambda text: text if text in words else None


def _fits(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    return lambda text: text if pattern.fullmatch(text) else None


def _ports(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    usable = all(_is_count(port) and port <= 65535 for port in value)
    return tuple(dict.fromkeys(value)) if usable else None


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _condition(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return None
    check_condition(value)
    return value


def _selector(value: Any) -> Selector | None:
    if not isinstance(value, dict) or not value or not set(value) <= {"run", "episode", "agent", "steps"}:
        return None
    texts = {key: text for key, text in value.items() if key != "steps"}
    if not all(isinstance(text, str) and _PATTERN.fullmatch(text) for text in texts.values()):
        return None
    if "steps" not in value:
        return Selector(**texts)
    steps = value["steps"]
    if not isinstance(steps, list) or len(steps) not in {1, 2} or not all(_is_count(step, 0) for step in steps):
        return None
    last = steps[1] if len(steps) == 2 else None
    return None if last is not None and last < steps[0] else Selector(**texts, steps=(steps[0], last))


def _budget(value: Any) -> Budget | None:
    if not isinstance(value, dict) or not value or not set(value) <= set(Budget.__struct_fields__):
        return None
    return Budget(**value) if all(_is_count(limit) for limit in value.values()) else None


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


FIELDS: Mapping[str, Field] = {
    "id": Field(_text(_fits(_RULE_ID)), "give 1 to 100 letters, digits or . : / * @ _ -"),
    "host": Field(_text(parse_host), "give a host name, *.name or * (an address is a cidr)"),
    "cidr": Field(_text(parse_cidr), "give an address or a network such as 10.1.2.0/24, without host bits"),
    "ports": Field(_ports, "give a list of one or more ports from 1 to 65535, e.g. [443]"),
    "protocols": Field(_list(_one_of(*PROTOCOLS)), f"give a list of one or more of {', '.join(PROTOCOLS)}"),
    "phase": Field(_text(_one_of(*PHASES)), f"give one of {', '.join(PHASES)}, or leave it out for both"),
    "selector": Field(
        _selector,
        'give a table of run, episode, agent (shell patterns) and steps, e.g. { agent = "a*", steps = [3, 9] }',
    ),
    "methods": Field(_list(_fits(_METHOD)), 'give a list of HTTP methods in capital letters, e.g. ["GET", "HEAD"]'),
    "paths": Field(
        _list(parse_pattern),
        'give a list of path patterns in normal form, decoded, e.g. ["/simple/**"] (* within a segment, ** across)',
    ),
    "when": Field(_condition, "give a CEL condition, e.g. \"request.length < 1000 && phase == 'run'\""),
    "credential": Field(_text(_fits(_NAME)), "give the name of a credential of the node's store"),
    "service": Field(_text(_one_of(*SERVICES)), f"give one of {', '.join(SERVICES)}"),
    "git": Field(_text(_one_of(*GIT)), f"give one of {', '.join(GIT)}"),
    "tools": Field(_list(_fits(_PATTERN)), 'give a list of patterns of tool names, e.g. ["search_*"]'),
    "websocket": Field(_boolean, "give true or false"),
    "ssh": Field(_list(_one_of(*SSH)), f"give a list of one or more of {', '.join(SSH)}"),
    "budget": Field(_budget, f"give a table of numbers from 1 with some of {', '.join(Budget.__struct_fields__)}"),
}
"""Every key of a rule, in the order in which messages name them."""


def check_terms(verb: str, rule: Rule) -> tuple[str, str, str] | None:
    """What does not go together in a rule: the key, what is wrong and the remedy; None when all is well."""
    for key in GRANTING_ONLY if verb == "deny" else ():
        if getattr(rule, key) not in {"", "forward", (), None}:
            return key, f"{key} has no meaning in [[deny]]", "remove it, or write [[allow]] or [[hold]]"
    if rule.credential and rule.host in {None, "*"}:
        return "credential", "a credential would go to whoever asks", "give the host that it is for"
    if verb == "deny":
        return None
    admitted = {protocol for port in rule.ports or () for protocol in rule.protocols_for(port)}
    if rule.reads_requests and not admitted:
        return (
            "protocols",
            "its terms are about requests, and none of its protocols and ports carries any",
            "use http or tls, or remove what is about requests",
        )
    if rule.ssh and "ssh" not in admitted:
        return "ssh", "it does not admit ssh on any of its ports", 'use port 22, or protocols = ["ssh"]'
    return None
