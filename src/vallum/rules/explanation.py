"""Why a destination would be allowed or denied, told rule by rule. Asks nobody: no name is looked up."""

from __future__ import annotations

import msgspec

from vallum.core.errors import RuleError
from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.addresses import canonical, guards_of
from vallum.rules.grants import Rule, Ruleset, parse_grant
from vallum.rules.names import normalise_name
from vallum.rules.verdicts import FlowFacts, Pin, judge_flow, judge_query

PLACEHOLDER = "203.0.113.1"
"""Stands for the public address of a name that nobody looked up (TEST-NET-3)."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A decision with what led to it."""

    decision: Decision
    considered: list[str]
    """One line for each rule and guard that was looked at, in order."""


def explain(
    rules: Ruleset,
    target: str,
    *,
    protocol: Protocol | None = None,
    server_name: str | None = None,
    address: str | None = None,
) -> Explanation:
    """Explain a flow to ``target`` (``HOST[:PORT]`` or ``ADDRESS[:PORT]``; port 443 when none is given).

    For a name, ``address`` says what it resolves to; without it, some public address is assumed. With a
    ``protocol`` the first bytes are judged too; ``server_name`` is then the SNI or Host (default: the name).

    Raises:
        RuleError: the target, name or address is not usable.
    """
    wanted = parse_grant(target)
    if (wanted.host or "").startswith("*") or (wanted.network is not None and wanted.network.num_addresses != 1):
        raise RuleError(
            f"{show(target)!r} is not one destination: give a host name or one address, with an optional :PORT"
        )
    port = (wanted.ports or (443,))[-1]
    lines: list[str] = []
    names: tuple[Pin, ...] = ()
    if wanted.host is not None:
        query = judge_query(rules, wanted.host)
        lines.append(f"query {wanted.host}: {query.verdict} by {query.rule}: {query.reason}")
        if query.verdict != "allow":
            return Explanation(decision=query, considered=lines)
        names = (Pin(name=wanted.host, local=True),)
        ip = _address(address) if address else PLACEHOLDER
        if not address:
            lines.append("no address was given, so a public one is assumed")
    else:
        ip = _address((wanted.cidr or "").partition("/")[0])
    inside = server_name or wanted.host
    facts = FlowFacts(
        dst_ip=ip,
        dst_port=port,
        names=names,
        protocol=protocol,
        server_name=normalise_name(inside) if inside else None,
    )
    lines += [f"guard {guard.rule}: {ip} is {guard.what}" for guard in guards_of(canonical(ip))]
    lines += [_consider("deny", rule, facts) for rule in rules.deny]
    lines += [_consider("allow", rule, facts) for rule in rules.allow]
    return Explanation(decision=judge_flow(rules, facts), considered=lines)


def _address(text: str) -> str:
    try:
        return str(canonical(text))
    except ValueError:
        raise RuleError(f"{show(text)!r} is not an address: give an IPv4 or IPv6 address") from None


def _consider(verb: str, rule: Rule, facts: FlowFacts) -> str:
    covers = rule.matches_address(canonical(facts.dst_ip)) or any(rule.matches_name(pin.name) for pin in facts.names)
    if not covers:
        why = "another destination"
    elif not rule.matches_port(facts.dst_port):
        why = f"not for port {facts.dst_port}"
    elif facts.protocol is not None and verb == "allow" and facts.protocol not in rule.protocols_for(facts.dst_port):
        why = f"does not admit {facts.protocol}"
    else:
        why = "covers it"
    return f"{verb} {rule.describe()}: {why}"
