"""Rule files (TOML, schema 2) to a checked :class:`~vallum.rules.grants.Ruleset`. An unknown key is an error."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from vallum.core.errors import RuleError
from vallum.core.text import show
from vallum.rules.fields import FIELDS, PHASES, check_terms
from vallum.rules.grants import CONTAINMENTS, DEFAULT_PORTS, Containment, Rule, Ruleset, name_rule, parse_grant

MAX_FILE_BYTES = 1024 * 1024
VERBS = ("allow", "hold", "deny")
_TOP = ("containment", "allow", "deny", "hold", "bundles", "setup", "run", "test")
_BUNDLE = re.compile(r"(?:@|bundle:)(.*)", re.DOTALL)
Phase = Literal["setup", "run"]


def read_text(path: Path) -> str:
    """The text of a rule file.

    Raises:
        RuleError: it cannot be read, is too large or is not UTF-8.
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
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(f"the rule file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_ruleset(path: Path) -> Ruleset:
    """The rules of a file.

    Raises:
        RuleError: it cannot be read or used; names file, line, key and what is allowed.
    """
    return parse_ruleset(read_text(path), str(path))


def parse_ruleset(text: str, source: str) -> Ruleset:
    """The rules in a TOML text; ``source`` is what messages call it.

    Raises:
        RuleError: as :func:`read_ruleset`.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RuleError(f"{source}: not valid TOML ({error}): correct it there") from error
    return RuleFile(text, source).parse(data)


@functools.cache
def read_builtin(containment: Containment) -> Ruleset:
    """The built-in rules of one containment."""
    text = (resources.files("vallum.rules") / "builtin" / f"{containment}.toml").read_text("utf-8")
    return parse_ruleset(text, f"builtin/{containment}.toml")


@functools.cache
def list_bundles() -> tuple[str, ...]:
    """Names of the bundles, sorted."""
    names = (entry.name for entry in (resources.files("vallum.rules") / "bundles").iterdir())
    return tuple(
        sorted(
            name.removesuffix(".toml") for name in names if name.endswith(".toml") and not name.endswith(".test.toml")
        )
    )


@functools.cache
def read_bundle(name: str) -> tuple[Rule, ...]:
    """The grants of a bundle.

    Raises:
        RuleError: there is none of that name; says which there are.
    """
    if name not in list_bundles():
        raise RuleError(f"there is no bundle {show(name, 60)!r}: use one of {', '.join(list_bundles())}")
    text = (resources.files("vallum.rules") / "bundles" / f"{name}.toml").read_text("utf-8")
    rules = parse_ruleset(text, f"bundles/{name}.toml").allow
    return tuple(msgspec.structs.replace(rule, source=f"bundle {name}") for rule in rules)


def expand_grant(text: str) -> tuple[Rule, ...]:
    """The grants of an ``--allow`` text: ``HOST[:PORT]`` (see :func:`~vallum.rules.grants.parse_grant`), or a bundle
    as ``@NAME`` or ``bundle:NAME``.

    Raises:
        RuleError: it is none of these.
    """
    bundle = _BUNDLE.fullmatch(text.strip())
    if bundle is not None:
        return read_bundle(bundle[1])
    return (msgspec.structs.replace(parse_grant(text), source="--allow"),)


def compose(containment: str | None = None, *, own: Ruleset | None = None, allow: Sequence[str] = ()) -> Ruleset:
    """The rules of a cell: the built-in ones of a containment, then its owner's (of a file), then ``--allow`` texts.

    ``containment`` wins over the file's; without either it is ``standard``.

    Raises:
        RuleError: unknown containment, an unusable file, grant or bundle, or grants under ``locked``.
    """
    level = containment or (own.containment if own is not None else "standard")
    if level not in CONTAINMENTS:
        raise RuleError(f"containment {show(level)!r} is not known: use one of {', '.join(CONTAINMENTS)}")
    base = read_builtin(level)
    own = own or Ruleset()
    granted = [*own.allow, *(rule for text in allow for rule in expand_grant(text))]
    refused = [*own.hold, *granted]
    if level == "locked" and refused:
        raise RuleError(
            f"containment is locked, so the grant {refused[0].id!r} cannot have an effect: "
            "remove it, or use containment standard"
        )
    taken = {rule.id for rule in (*own.deny, *own.hold)}
    return Ruleset(
        containment=level, allow=tuple(distinguish([*base.allow, *granted], taken)), hold=own.hold, deny=own.deny
    )


def distinguish(rules: Iterable[Rule], taken: Iterable[str] = ()) -> list[Rule]:
    """The rules, with ``#2``, ``#3``... after ids that would otherwise mean two rules with different terms.

    Rules of hosts, ports and protocols alone may share one: nothing is looked up by it. What is there twice is dropped.
    """
    seen: dict[str, Rule | None] = dict.fromkeys(taken)
    kept: dict[Rule, Rule] = {}
    for rule in rules:
        terms = msgspec.structs.replace(rule, source="")
        if terms in kept:
            continue
        name, number = rule.id, 1
        while name in seen and not _may_share(seen[name], rule):
            number += 1
            name = f"{rule.id}#{number}"
        seen.setdefault(name, rule)
        kept[terms] = msgspec.structs.replace(rule, id=name)
    return list(kept.values())


def _may_share(one: Rule | None, other: Rule) -> bool:
    return one is not None and _is_plain(one) and _is_plain(other)


def _is_plain(rule: Rule) -> bool:
    same = {"id": "x", "host": "*", "cidr": None, "ports": None, "protocols": None, "source": ""}
    return msgspec.structs.replace(rule, **same) == Rule(id="x", host="*")


class RuleFile:
    """Turns parsed TOML into rules, and knows the text for the sake of line numbers."""

    def __init__(self, text: str, source: str) -> None:
        self.lines = text.splitlines()
        self.source = source

    def parse(self, data: Mapping[str, Any]) -> Ruleset:
        """The rules. Raises RuleError."""
        for key in data:
            if key not in _TOP:
                raise self.error(self.line_of_key(key), f"the key {show(key)!r} is not known", f"use {', '.join(_TOP)}")
        level = data.get("containment", "standard")
        if level not in CONTAINMENTS:
            line = self.line_of_key("containment")
            raise self.error(line, f"containment is {show(repr(level))}", f"use one of {', '.join(CONTAINMENTS)}")
        allow, hold, deny = (self.tables(data, verb) for verb in VERBS)
        bundled = self.bundles(data)
        for verb, there in (("allow", allow), ("hold", hold), ("bundles", bundled)):
            if level == "locked" and there:
                line = self.line_of_table(verb, 0)
                raise self.error(line, "containment is locked, so a grant has no effect", "remove it, or use standard")
        self.check_ids(data)
        denied = distinguish(deny)
        held = distinguish(hold, {rule.id for rule in denied})
        taken = {rule.id for rule in (*denied, *held)}
        return Ruleset(
            containment=level, allow=tuple(distinguish([*allow, *bundled], taken)), hold=tuple(held), deny=tuple(denied)
        )

    def check_ids(self, data: Mapping[str, Any]) -> None:
        """Ids that were given are given once: decisions name rules by them."""
        seen: set[str] = set()
        for verb in VERBS:
            for index, table in enumerate(data.get(verb, ())):
                name = table.get("id")
                if name in seen:
                    line = self.line_in_table(verb, index, "id")
                    raise self.error(line, f"the id {name!r} is used twice", "give every rule an id of its own")
                if name is not None:
                    seen.add(name)

    def bundles(self, data: Mapping[str, Any]) -> list[Rule]:
        """The grants of the bundles that are named, for both phases or for one."""
        rules = self.bundle_rules(data.get("bundles", []), None, None)
        for phase in PHASES:
            table = data.get(phase, {})
            if not isinstance(table, dict) or set(table) - {"bundles"}:
                line = self.line_of_key(phase)
                raise self.error(
                    line, f"[{phase}] holds something else than bundles", f'write [{phase}] and bundles = ["pypi"]'
                )
            rules += self.bundle_rules(table.get("bundles", []), phase, self.line_of_section(phase))
        return rules

    def bundle_rules(self, names: Any, phase: str | None, start: int | None) -> list[Rule]:
        """The grants of a list of bundles."""
        line = self.line_of_key("bundles", start or 0)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            known = ", ".join(list_bundles())
            raise self.error(line, f"bundles = {show(repr(names))} is not usable", f"give a list of some of {known}")
        rules: list[Rule] = []
        for name in names:
            try:
                found = read_bundle(name)
            except RuleError as error:
                raise self.error(line, "bundles", str(error)) from error
            if phase is not None:
                found = tuple(
                    msgspec.structs.replace(rule, phase=phase) for rule in found if rule.phase in {None, phase}
                )
            rules += found
        return rules

    def tables(self, data: Mapping[str, Any], verb: str) -> tuple[Rule, ...]:
        """The rules of one verdict."""
        tables = data.get(verb, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self.error(self.line_of_key(verb), f"{verb!r} is not a list of tables", f"write [[{verb}]]")
        return tuple(self.rule(verb, index, table) for index, table in enumerate(tables))

    def rule(self, verb: str, index: int, table: Mapping[str, Any]) -> Rule:
        """One rule."""
        for key in table:
            if key not in FIELDS:
                line = self.line_in_table(verb, index, key)
                raise self.error(line, f"the key {show(key)!r} of [[{verb}]] is not known", f"use {', '.join(FIELDS)}")
        if ("host" in table) == ("cidr" in table):
            line = self.line_of_table(verb, index)
            raise self.error(line, f"[[{verb}]] needs exactly one of host and cidr", "give one of them")
        values = {key: self.field(verb, index, key, table[key]) for key in FIELDS if key in table}
        if verb != "deny":
            values.setdefault("ports", DEFAULT_PORTS)
        values.setdefault("id", name_rule(verb, values.get("host"), values.get("cidr")))
        rule = Rule(**values, source=self.source)
        wrong = check_terms(verb, rule)
        if wrong is not None:
            key, what, remedy = wrong
            raise self.error(self.line_in_table(verb, index, key), what, remedy)
        return rule

    def field(self, verb: str, index: int, key: str, raw: Any) -> Any:
        """One value."""
        try:
            value = FIELDS[key].read(raw)
        except RuleError as error:
            line = self.line_in_table(verb, index, key)
            raise self.error(line, f"{key} = {show(repr(raw))} is not usable", str(error)) from error
        if value is None:
            line = self.line_in_table(verb, index, key)
            raise self.error(line, f"{key} = {show(repr(raw))} is not usable", FIELDS[key].allowed)
        return value

    def error(self, line: int | None, what: str, remedy: str) -> RuleError:
        """The error that names the place."""
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

    def line_of_section(self, name: str) -> int | None:
        """Number of the line ``[name]``."""
        return next((n for n, line in enumerate(self.lines, 1) if re.match(rf"\s*\[\s*{name}\s*\]", line)), None)

    def line_of_table(self, verb: str, index: int) -> int | None:
        """Number of the line ``[[verb]]`` that begins its table number ``index``."""
        found = [n for n, line in enumerate(self.lines, 1) if re.match(rf"\s*\[\[\s*{verb}\s*\]\]", line)]
        return found[index] if index < len(found) else self.line_of_key(verb)

    def line_in_table(self, verb: str, index: int, key: str) -> int | None:
        """Number of the line that sets ``key`` in that table, or that begins it."""
        start = self.line_of_table(verb, index)
        return start and (self.line_of_key(key, start, stop_at_table=True) or start)
