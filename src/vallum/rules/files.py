"""Rule files (TOML, schema 1) to a checked :class:`~vallum.rules.grants.Ruleset`. An unknown key is an error."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vallum.core.errors import RuleError
from vallum.core.text import show
from vallum.rules.grants import (
    CONTAINMENTS,
    DEFAULT_PORTS,
    PROTOCOLS,
    Containment,
    Rule,
    Ruleset,
    name_rule,
    parse_cidr,
    parse_grant,
    parse_host,
)

MAX_FILE_BYTES = 1024 * 1024
_KEYS = ("id", "host", "cidr", "ports", "protocols")
_TOP = ("containment", "allow", "deny")
_RULE_ID = re.compile(r"[A-Za-z0-9*][A-Za-z0-9.:/*_-]{0,99}")


def read_ruleset(path: Path) -> Ruleset:
    """The rules of a file.

    Raises:
        RuleError: it cannot be read or used; names file, line, key and what is allowed.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RuleError(
            f"the rule file {path} cannot be read ({error.strerror}): give the path of a TOML file"
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise RuleError(f"the rule file {path} is larger than {MAX_FILE_BYTES} bytes: split it or grant networks")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(f"the rule file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return parse_ruleset(text, str(path))


def parse_ruleset(text: str, source: str) -> Ruleset:
    """The rules in a TOML text; ``source`` is what messages call it.

    Raises:
        RuleError: as :func:`read_ruleset`.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RuleError(f"{source}: not valid TOML ({error}): correct it there") from error
    return _File(text, source).parse(data)


@functools.cache
def read_builtin(containment: Containment) -> Ruleset:
    """The built-in rules of one containment."""
    text = (resources.files("vallum.rules") / "builtin" / f"{containment}.toml").read_text("utf-8")
    return parse_ruleset(text, f"builtin/{containment}.toml")


def compose(containment: str | None = None, *, own: Ruleset | None = None, allow: Sequence[str] = ()) -> Ruleset:
    """The rules of a cell: the built-in ones of a containment, then its owner's (of a file), then ``--allow`` texts.

    ``containment`` wins over the file's; without either it is ``standard``.

    Raises:
        RuleError: unknown containment, an unusable file or grant, or grants under ``locked``.
    """
    level = containment or (own.containment if own is not None else "standard")
    if level not in CONTAINMENTS:
        raise RuleError(f"containment {show(level)!r} is not known: use one of {', '.join(CONTAINMENTS)}")
    base = read_builtin(level)
    granted = [*(own.allow if own else ()), *(parse_grant(text) for text in allow)]
    if level == "locked" and granted:
        raise RuleError(
            f"containment is locked, so the grant {granted[0].id!r} cannot have an effect: "
            "remove it, or use containment standard"
        )
    return Ruleset(containment=level, allow=(*base.allow, *granted), deny=own.deny if own else ())


class _File:
    """Turns parsed TOML into rules, and knows the text for the sake of line numbers."""

    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source

    def parse(self, data: Mapping[str, Any]) -> Ruleset:
        for key in data:
            if key not in _TOP:
                raise self.error(self.line_of_key(key), f"the key {show(key)!r} is not known", f"use {', '.join(_TOP)}")
        level = data.get("containment", "standard")
        if level not in CONTAINMENTS:
            line = self.line_of_key("containment")
            raise self.error(line, f"containment is {show(repr(level))}", f"use one of {', '.join(CONTAINMENTS)}")
        allow, deny = (self.tables(data, verb) for verb in ("allow", "deny"))
        if level == "locked" and allow:
            line = self.line_of_table("allow", 0)
            raise self.error(line, "containment is locked, so a grant has no effect", "remove it, or use standard")
        seen: set[str] = set()
        for verb, rules in (("allow", allow), ("deny", deny)):
            for index, rule in enumerate(rules):
                if rule.id in seen and verb == "deny":
                    line = self.line_of_table(verb, index)
                    raise self.error(line, f"the id {rule.id!r} is used twice", "give every denial an id of its own")
                seen.add(rule.id)
        return Ruleset(containment=level, allow=allow, deny=deny)

    def tables(self, data: Mapping[str, Any], verb: str) -> tuple[Rule, ...]:
        tables = data.get(verb, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self.error(self.line_of_key(verb), f"{verb!r} is not a list of tables", f"write [[{verb}]]")
        return tuple(self.rule(verb, index, table) for index, table in enumerate(tables))

    def rule(self, verb: str, index: int, table: Mapping[str, Any]) -> Rule:
        for key in table:
            if key not in _KEYS:
                line = self.line_in_table(verb, index, key)
                raise self.error(line, f"the key {show(key)!r} of [[{verb}]] is not known", f"use {', '.join(_KEYS)}")
        if ("host" in table) == ("cidr" in table):
            line = self.line_of_table(verb, index)
            raise self.error(line, f"[[{verb}]] needs exactly one of host and cidr", "give one of them")

        def field(key: str, parse: Callable[[Any], Any], allowed: str) -> Any:
            if key not in table:
                return None
            value = parse(table[key])
            if value is None:
                line = self.line_in_table(verb, index, key)
                raise self.error(line, f"{key} = {show(repr(table[key]))} is not usable", allowed)
            return value

        host = field("host", _text(parse_host), "give a host name, *.name or *")
        cidr = field("cidr", _text(parse_cidr), "give an address or a network such as 10.1.2.0/24, without host bits")
        ports = field("ports", _ports, "give a list of one or more ports from 1 to 65535, e.g. [443]")
        protocols = field("protocols", _protocols, f"give a list of one or more of {', '.join(PROTOCOLS)}")
        name = field("id", _id, "give 1 to 100 letters, digits or . : / * _ -")
        if verb == "allow" and ports is None:
            ports = DEFAULT_PORTS
        return Rule(id=name or name_rule(verb, host, cidr), host=host, cidr=cidr, ports=ports, protocols=protocols)

    def error(self, line: int | None, what: str, remedy: str) -> RuleError:
        where = self.source if line is None else f"{self.source}, line {line}"
        return RuleError(f"{where}: {what}: {remedy}")

    def line_of_key(self, key: str, start: int = 0, *, stop_at_table: bool = False) -> int | None:
        """Number (from 1) of the line that sets ``key``; found by its look, so None where TOML is written oddly."""
        bare = re.escape(key)
        pattern = re.compile(rf"(?:^|[\s{{,\[])[\"']?{bare}[\"']?\s*(?:[.=\]])")
        for number, line in enumerate(self.lines[start:], start + 1):
            if stop_at_table and re.match(r"\s*\[", line):
                return None
            if pattern.search(line.split("#", 1)[0]):
                return number
        return None

    def line_of_table(self, verb: str, index: int) -> int | None:
        found = [n for n, line in enumerate(self.lines, 1) if re.match(rf"\s*\[\[\s*{verb}\s*\]\]", line)]
        return found[index] if index < len(found) else self.line_of_key(verb)

    def line_in_table(self, verb: str, index: int, key: str) -> int | None:
        start = self.line_of_table(verb, index)
        return start and (self.line_of_key(key, start, stop_at_table=True) or start)


def _text(parse: Callable[[str], str | None]) -> Callable[[Any], str | None]:
    return lambda value: parse(value) if isinstance(value, str) else None


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and _RULE_ID.fullmatch(value) else None


def _ports(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    usable = all(isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535 for port in value)
    return tuple(dict.fromkeys(value)) if usable else None


def _protocols(value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    return tuple(dict.fromkeys(value)) if all(isinstance(p, str) and p in PROTOCOLS for p in value) else None
