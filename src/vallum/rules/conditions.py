"""``when``: conditions of rules in the Common Expression Language (https://cel.dev), checked before they are used.

Every field is a declared variable of a known type, so a misspelt name or a comparison that cannot hold is an error of
the rule file. Covered: no loops, no I/O, regular expressions in linear time (RE2), a bound on iterations and on the
length of what is compiled and of what the guest can put into it. An error while one is evaluated is raised; who judges
by it denies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from typing import Any

from vallum.core.clock import wall_ns
from vallum.core.errors import RuleError
from vallum.core.text import show
from vallum.rules.facts import Asker, FlowFacts, RequestFacts

MAX_CONDITION = 2000
"""Characters of an expression."""
MAX_COMPREHENSIONS = 4
MAX_VALUE = 16_384
"""Characters of one text that a condition looks at; a longer one is an error, hence a denial."""
MAX_NAMES = 64

FIELDS: dict[str, str] = {
    "flow.dst_ip": "string",
    "flow.dst_port": "int",
    "flow.names": "list",
    "flow.protocol": "string",
    "flow.server_name": "string",
    "request.method": "string",
    "request.scheme": "string",
    "request.host": "string",
    "request.path": "string",
    "request.query": "string",
    "request.length": "int",
    "request.upgrade": "string",
    "request.content_type": "string",
    "scope.run": "string",
    "scope.episode": "string",
    "scope.agent": "string",
    "scope.step": "int",
    "phase": "string",
    "now": "timestamp",
}
"""Variable -> type. ``request.length`` and ``scope.step`` are -1 where they are not known; a text is empty then."""

_LITERAL = re.compile(r"[rRbB]*(?:\"\"\".*?\"\"\"|'''.*?'''|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')", re.DOTALL)
_COMPREHENSION = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(")
_CONTENT = frozenset({"flow.protocol", "flow.server_name"})


class Stage(IntEnum):
    """When enough is known to evaluate a condition."""

    ASKER = 0
    """Who, in which phase, when."""
    DESTINATION = 1
    """And where to."""
    CONTENT = 2
    """And what the first bytes are."""
    REQUEST = 3
    """And one request."""


class ConditionError(Exception):
    """A condition could not be evaluated on these facts."""


@lru_cache(maxsize=1024)
def fields_of(text: str) -> frozenset[str]:
    """The variables that an expression names (literals are not looked into)."""
    bare = re.sub(r"\s*\.\s*", ".", _LITERAL.sub("''", text))
    return frozenset(name for name in FIELDS if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", bare))


@lru_cache(maxsize=1024)
def stage_of(text: str) -> Stage:
    """What has to be known for it."""
    fields = fields_of(text)
    if any(name.startswith("request.") for name in fields):
        return Stage.REQUEST
    if fields & _CONTENT:
        return Stage.CONTENT
    return Stage.DESTINATION if any(name.startswith("flow.") for name in fields) else Stage.ASKER


@lru_cache(maxsize=1)
def _environment() -> tuple[Any, Any]:
    from cel_expr_python import cel  # type: ignore[import-untyped]  # 50 MB: loaded by whoever has a condition

    types = {
        "string": cel.Type.STRING,
        "int": cel.Type.INT,
        "list": cel.Type.List(cel.Type.STRING),
        "timestamp": cel.Type.TIMESTAMP,
    }
    return cel.NewEnv(variables={name: types[kind] for name, kind in FIELDS.items()}), cel.Type


@lru_cache(maxsize=1024)
def _compile(text: str) -> Any:
    if len(text) > MAX_CONDITION:
        raise RuleError(f"the condition has more than {MAX_CONDITION} characters: split it into several rules")
    if len(_COMPREHENSION.findall(_LITERAL.sub("''", text))) > MAX_COMPREHENSIONS:
        raise RuleError(f"the condition has more than {MAX_COMPREHENSIONS} comprehensions: split it into several rules")
    environment, types = _environment()
    try:
        program = environment.compile(text)
    except RuntimeError as error:
        what = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ERROR: ").replace("<input>:", "at ")
        known = f"; the variables are {', '.join(FIELDS)}" if "undeclared" in what else ""
        raise RuleError(f"{show(what, 300)}{known}") from error
    if program.return_type() != types.BOOL:
        raise RuleError(f"it is a {program.return_type()}, not a condition: compare it with something")
    return program


def check_condition(text: str) -> None:
    """Compile it.

    Raises:
        RuleError: it is no condition; says where in it and why.
    """
    _compile(text)


def evaluate(text: str, facts: FlowFacts | None, asker: Asker, request: RequestFacts | None = None) -> bool:
    """Whether the condition holds.

    Raises:
        ConditionError: it has no value on these facts (a division by zero, a bad regular expression, work beyond
            the bound), or is no condition at all.
    """
    try:
        result = _compile(text).eval(data=_bind(fields_of(text), facts, asker, request))
        value = result.value()
    except (RuleError, RuntimeError) as error:
        raise ConditionError(str(error).partition("\n")[0]) from error
    if not isinstance(value, bool):
        raise ConditionError(str(value))
    return value


def _bind(
    wanted: frozenset[str], facts: FlowFacts | None, asker: Asker, request: RequestFacts | None
) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for name in wanted:
        value = _value(name, facts, asker, request)
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if len(texts) > MAX_NAMES or any(len(text) > MAX_VALUE for text in texts):
            raise ConditionError(f"{name} is longer than a condition looks at")
        values[name] = value
    return values


def _value(name: str, facts: FlowFacts | None, asker: Asker, request: RequestFacts | None) -> Any:
    if name == "now":
        now_ns = wall_ns() if facts is None or facts.now_ns is None else facts.now_ns
        return datetime.fromtimestamp(now_ns / 1e9, UTC)
    if name == "phase":
        return asker.phase
    group, _, field = name.partition(".")
    source = {"flow": facts, "request": request, "scope": asker}[group]
    if source is None:
        raise ConditionError(f"{name} is not known here")
    value = getattr(source, field)
    if name == "flow.names":
        return [pin.name for pin in value]
    if value is None:
        return -1 if FIELDS[name] == "int" else ""
    return value
