"""Unit tests of rule files: ``[[test]]`` tables in the file itself, or in ``NAME.test.toml`` beside ``NAME.toml``.

A test file may also stand alone and say what it is about: ``rules = "FILE"``, ``containment`` and ``allow = [...]``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import msgspec

from vallum.core.errors import RuleError
from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.core.verdict import Decision, Verdict
from vallum.rules.explanation import explain, parse_target
from vallum.rules.facts import Asker
from vallum.rules.files import RuleFile, compose, parse_ruleset, read_text
from vallum.rules.grants import Ruleset
from vallum.rules.verdicts import judge_query

SUBJECTS = ("flow", "request", "query")
_ASKER = ("phase", "run", "episode", "agent", "step")
_KEYS = (*SUBJECTS, "verdict", "rule", "name", "protocol", "server_name", "address", "now", *_ASKER)
_TOP = ("test", "rules", "containment", "allow")
_TEST_SUFFIX = ".test.toml"
_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One expectation of a rule file."""

    source: str
    line: int | None
    name: str
    subject: str
    """``flow``, ``request`` or ``query``."""
    target: str
    verdict: Verdict
    rule: str | None = None
    """Id of the rule that has to decide; None: any."""
    protocol: Protocol | None = None
    server_name: str | None = None
    address: str | None = None
    now_ns: int | None = None
    asker: Asker = Asker()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a case."""

    case: Case
    decision: Decision
    considered: list[str]
    passed: bool

    def describe(self) -> list[str]:
        """Lines for a person; of a failure, the difference and what led to it."""
        case = self.case
        where = case.source if case.line is None else f"{case.source}, line {case.line}"
        title = f"{'ok  ' if self.passed else 'FAIL'} {case.name} ({where})"
        if self.passed:
            return [title]
        wanted = case.verdict + (f" by {case.rule}" if case.rule is not None else "")
        got = f"{self.decision.verdict} by {self.decision.rule}: {self.decision.reason}"
        return [title, f"  - expected {wanted}", f"  + got      {got}", *(f"      {line}" for line in self.considered)]


def read_cases(path: Path) -> tuple[Ruleset, list[Case]]:
    """The rules of a file and the tests of them.

    Raises:
        RuleError: a file cannot be read or used, or there is no test in it or beside it.
    """
    text = read_text(path)
    if path.name.endswith(_TEST_SUFFIX):
        rules, cases = _read_test_file(text, path)
    else:
        rules = compose(own=parse_ruleset(text, str(path)))
        cases = _parse_cases(text, str(path), tomllib.loads(text))
        beside = path.with_name(path.name.removesuffix(".toml") + _TEST_SUFFIX)
        if beside.exists():
            cases += _parse_cases(more := read_text(beside), str(beside), _load(more, str(beside)))
    if not cases:
        raise RuleError(f"{path} has no tests: write [[test]] tables into it or into a {_TEST_SUFFIX} file beside it")
    return rules, cases


def list_shipped() -> list[Path]:
    """The test files of the built-in containments and bundles."""
    folders = [Path(str(resources.files("vallum.rules") / name)) for name in ("builtin", "bundles")]
    return sorted(path for folder in folders for path in folder.glob(f"*{_TEST_SUFFIX}"))


def run_case(rules: Ruleset, case: Case) -> Outcome:
    """Judge it.

    Raises:
        RuleError: its target is not usable; says where.
    """
    try:
        if case.subject == "query":
            decision, considered = judge_query(rules, case.target, asker=case.asker), []
        else:
            target = parse_target(
                case.target, method="GET" if case.subject == "request" and " " not in case.target else None
            )
            told = explain(
                rules,
                target if case.subject == "request" else msgspec.structs.replace(target, request=None),
                protocol=case.protocol,
                server_name=case.server_name,
                address=case.address,
                asker=case.asker,
                now_ns=case.now_ns,
            )
            decision, considered = told.decision, told.considered
    except RuleError as error:
        raise RuleError(f"{case.source}, line {case.line}: {error}") from error
    passed = decision.verdict == case.verdict and case.rule in {None, decision.rule}
    return Outcome(case=case, decision=decision, considered=considered, passed=passed)


def _read_test_file(text: str, path: Path) -> tuple[Ruleset, list[Case]]:
    data, source = _load(text, str(path)), str(path)
    for key in data:
        if key not in _TOP:
            raise RuleError(f"{source}: the key {show(key)!r} is not known in a test file: use {', '.join(_TOP)}")
    allow = data.get("allow", [])
    if not isinstance(allow, list) or not all(isinstance(grant, str) for grant in allow):
        raise RuleError(f'{source}: allow is not a list of texts: write allow = ["@pypi"]')
    named = data.get("rules")
    own = None
    if isinstance(named, str):
        other = path.parent / named
        own = parse_ruleset(read_text(other), str(other))
    elif named is not None:
        raise RuleError(f'{source}: rules is not the path of a file: write rules = "FILE.toml"')
    elif not allow and "containment" not in data:
        other = path.with_name(path.name.removesuffix(_TEST_SUFFIX) + ".toml")
        own = parse_ruleset(read_text(other), str(other))
    containment = data.get("containment")
    if containment is not None and not isinstance(containment, str):
        raise RuleError(f'{source}: containment is not a word: write containment = "standard"')
    return compose(containment, own=own, allow=allow), _parse_cases(text, source, data)


def _load(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RuleError(f"{source}: not valid TOML ({error}): correct it there") from error


def _parse_cases(text: str, source: str, data: Mapping[str, Any]) -> list[Case]:
    tables = data.get("test", [])
    file = RuleFile(text, source)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise file.error(file.line_of_key("test"), "'test' is not a list of tables", "write [[test]]")
    return [_parse_case(file, index, table) for index, table in enumerate(tables)]


def _parse_case(file: RuleFile, index: int, table: Mapping[str, Any]) -> Case:
    def wrong(key: str, what: str, remedy: str) -> RuleError:
        return file.error(file.line_in_table("test", index, key), what, remedy)

    for key in table:
        if key not in _KEYS:
            raise wrong(key, f"the key {show(key)!r} of [[test]] is not known", f"use {', '.join(_KEYS)}")
    subjects = [key for key in SUBJECTS if key in table]
    if len(subjects) != 1:
        raise wrong("", "[[test]] needs exactly one of flow, request and query", "give one of them")
    if table.get("verdict") not in _VERDICTS:
        raise wrong("verdict", "[[test]] needs a verdict", f"give one of {', '.join(_VERDICTS)}")
    for key, value in table.items():
        usable = isinstance(value, datetime if key == "now" else int if key == "step" else str)
        if not usable or (key == "protocol" and value not in get_args(Protocol)):
            raise wrong(key, f"{key} = {show(repr(value))} is not usable", "see docs/rules.md, Tests")
    subject = subjects[0]
    now = table.get("now")
    return Case(
        source=file.source,
        line=file.line_of_table("test", index),
        name=table.get("name") or f"{subject} {show(table[subject], 100)}",
        subject=subject,
        target=table[subject],
        verdict=table["verdict"],
        rule=table.get("rule"),
        protocol=table.get("protocol"),
        server_name=table.get("server_name"),
        address=table.get("address"),
        now_ns=None if now is None else int((now if now.tzinfo else now.replace(tzinfo=UTC)).timestamp() * 1e9),
        asker=Asker(**{key: table[key] for key in _ASKER if key in table}),
    )
