"""Rules of detectors, as data: what they are called, how bad it is, what they match, when they are wrong.

The files are ``builtin/<family>.toml``; code decides how the words in ``match`` are compared.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

import msgspec

from vallum.core.errors import RuleError
from vallum.core.verdict import Severity


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of finding."""

    id: str
    """``family.name``; what ``Finding.detector`` says."""
    title: str
    description: str
    severity: Severity
    """Where the act was prevented, or where the act itself is what matters."""
    severity_allowed: Severity | None = None
    """Where a flow was let through, when that is another one."""
    attack: list[str]
    """MITRE ATT&CK technique ids (Enterprise v17)."""
    maturity: Literal["stable", "incubating", "sandbox"]
    false_positives: list[str]
    """What harmless work looks the same."""
    match: dict[str, list[str | int]] = {}

    def words(self, name: str) -> frozenset[str]:
        """Strings under ``match.name``, in lower case."""
        return frozenset(str(word).lower() for word in self.match.get(name, ()))

    def numbers(self, name: str) -> frozenset[int]:
        """Integers under ``match.name``."""
        return frozenset(word for word in self.match.get(name, ()) if isinstance(word, int))

    def severity_of(self, verdict: str) -> Severity:
        """Severity for a flow with this verdict."""
        return self.severity_allowed or self.severity if verdict == "allow" else self.severity


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: list[Rule]


def parse(raw: bytes, source: str) -> dict[str, Rule]:
    """Rules of one file by id.

    Raises:
        RuleError: not TOML, an unknown or missing key, a value of another type, an id twice.
    """
    try:
        rules = msgspec.toml.decode(raw, type=_File).rule
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RuleError(f"{source} cannot be used: {error}; see docs/detectors.md for its keys") from error
    found = {rule.id: rule for rule in rules}
    if len(found) != len(rules):
        raise RuleError(f"{source} has the same id twice; give every rule an id of its own")
    return found


def load(family: str) -> dict[str, Rule]:
    """Built-in rules of a family (``mining``, ``tunnel``, ``probing``).

    Raises:
        RuleError: there is no such family, or its file was damaged.
    """
    source = f"builtin/{family}.toml"
    try:
        raw = resources.files("vallum.detectors").joinpath(source).read_bytes()
    except OSError as error:
        raise RuleError(f"{source} cannot be read ({error.strerror}); install vallum again") from error
    return parse(raw, source)


FAMILIES = ("mining", "tunnel", "probing")
