"""Why a destination or a request would be allowed, held or denied, told rule by rule. Asks nobody: no name is looked up."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from vallum.core.errors import RuleError
from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.addresses import canonical, guards_of
from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.grants import Rule, Ruleset, parse_grant
from vallum.rules.names import normalise_name
from vallum.rules.paths import normalise_path
from vallum.rules.selection import holds_for
from vallum.rules.verdicts import find_denial, find_refusal, judge_flow, judge_query, judge_request, reads_requests

PLACEHOLDER = "203.0.113.1"
"""Stands for the public address of a name that nobody looked up (TEST-NET-3)."""
_URL = re.compile(r"(?:(?P<method>[A-Za-z][A-Za-z0-9_-]*)\s+)?(?P<url>(?:https?|wss?)://\S+)", re.IGNORECASE)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked about: a destination, and perhaps one request."""

    host: str | None
    """Name, normalised; None: an address."""
    ip: str | None
    port: int
    request: RequestFacts | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A decision with what led to it."""

    decision: Decision
    considered: list[str]
    """One line for each rule and guard that was looked at, in order."""


def parse_target(text: str, *, method: str | None = None, path: str | None = None) -> Target:
    """``HOST[:PORT]``, ``ADDRESS[:PORT]`` (port 443 when none is given), ``URL`` or ``METHOD URL``.

    Args:
        text: the target.
        method: of a request; GET when there is a path and no method.
        path: of a request, with its query, instead of the URL's.

    Raises:
        RuleError: it is none of these, or a path can be read in two ways.
    """
    url = _URL.fullmatch(text.strip())
    if url is None:
        place, scheme = text, ""
    else:
        parts = urlsplit(url["url"])
        scheme = parts.scheme.lower()
        secure = scheme in {"https", "wss"}
        authority = parts.netloc.rpartition("@")[2]
        place = authority if re.search(r":\d+$", authority) else f"{authority}:{443 if secure else 80}"
        method = method or url["method"]
        path = path or (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    wanted = parse_grant(place)
    if (wanted.host or "").startswith("*") or (wanted.network is not None and wanted.network.num_addresses != 1):
        raise RuleError(
            f"{show(text)!r} is not one destination: give a host name or one address, with an optional :PORT, or a URL"
        )
    port = (wanted.ports or (443,))[-1]
    ip = None if wanted.host is not None else str(canonical((wanted.cidr or "").partition("/")[0]))
    request = None
    if method is not None or path is not None:
        way, _, query = (path or "/").partition("?")
        normal = normalise_path(way)
        if normal is None:
            raise RuleError(
                f"the path {show(way)!r} is refused as malformed wherever requests are read: it can be read in two ways"
            )
        request = RequestFacts(
            method=(method or "GET").upper(),
            scheme="http" if scheme in {"http", "ws"} or (not scheme and port == 80) else "https",
            host=wanted.host or ip or "",
            port=port,
            path=normal,
            query=query,
            upgrade="websocket" if scheme in {"ws", "wss"} else "",
        )
    return Target(host=wanted.host, ip=ip, port=port, request=request)


def explain(
    rules: Ruleset,
    target: str | Target,
    *,
    protocol: Protocol | None = None,
    server_name: str | None = None,
    address: str | None = None,
    asker: Asker | None = None,
    now_ns: int | None = None,
) -> Explanation:
    """Explain a flow to ``target`` (see :func:`parse_target`), and its request if it names one.

    For a name, ``address`` says what it resolves to; without it, some public address is assumed. With a
    ``protocol`` (or a request, which has one) the first bytes are judged too; ``server_name`` is then the SNI or Host
    (default: the name). ``asker`` None: nobody in particular, in phase run. ``now_ns`` is the time for conditions
    (nanoseconds since the epoch; None: now).

    Raises:
        RuleError: the target, name or address is not usable.
    """
    wanted = parse_target(target) if isinstance(target, str) else target
    request = wanted.request
    if protocol is None and request is not None:
        protocol = "http" if request.scheme == "http" else "tls"
    lines: list[str] = []
    names: tuple[Pin, ...] = ()
    if wanted.host is not None:
        query = judge_query(rules, wanted.host, asker=asker)
        lines.append(f"query {wanted.host}: {query.verdict} by {query.rule}: {query.reason}")
        if query.verdict != "allow":
            return Explanation(decision=query, considered=lines)
        names = (Pin(name=wanted.host, local=True),)
        ip = _address(address) if address else PLACEHOLDER
        if not address:
            lines.append("no address was given, so a public one is assumed")
    else:
        ip = wanted.ip or ""
    inside = server_name or wanted.host
    facts = FlowFacts(
        dst_ip=ip,
        dst_port=wanted.port,
        names=names,
        protocol=protocol,
        server_name=normalise_name(inside) if inside else None,
        now_ns=now_ns,
    )
    lines += [f"guard {guard.rule}: {ip} is {guard.what}" for guard in guards_of(canonical(ip))]
    lines += [_consider_denial(rule, facts, asker, request) for rule in rules.deny]
    lines += [_consider("hold", rule, facts, asker, request) for rule in rules.hold]
    lines += [_consider("allow", rule, facts, asker, request) for rule in rules.allow]
    decision = judge_flow(rules, facts, asker)
    if decision.verdict == "deny" or request is None:
        return Explanation(decision=decision, considered=lines)
    if not reads_requests(rules, facts, asker):
        lines.append("no rule for it looks at requests, so the gateway does not read them")
        return Explanation(decision=decision, considered=lines)
    lines.append(f"flow: {decision.verdict} by {decision.rule}; its requests are read")
    return Explanation(decision=judge_request(rules, facts, request, asker), considered=lines)


def _address(text: str) -> str:
    try:
        return str(canonical(text))
    except ValueError:
        raise RuleError(f"{show(text)!r} is not an address: give an IPv4 or IPv6 address") from None


def _consider_denial(rule: Rule, facts: FlowFacts, asker: Asker | None, request: RequestFacts | None) -> str:
    why = _cover(rule, facts, asker, denial=True)
    if not why:
        holds = find_denial(Ruleset(deny=(rule,)), facts, canonical(facts.dst_ip), "it", asker, request, None)
        why = "covers it" if holds is not None else "its other terms do not apply"
    return f"deny {rule.describe()}: {why}"


def _consider(verb: str, rule: Rule, facts: FlowFacts, asker: Asker | None, request: RequestFacts | None) -> str:
    why = _cover(rule, facts, asker, denial=False)
    if not why:
        refusal = find_refusal(rule, facts, "it", asker, request, None)
        why = "covers it" if refusal is None else f"{refusal.rule}: {refusal.reason}"
        if facts.protocol is not None and refusal is not None and refusal.rule == "protocol-mismatch":
            why = f"does not admit {facts.protocol}"
    return f"{verb} {rule.describe()}: {why}"


def _cover(rule: Rule, facts: FlowFacts, asker: Asker | None, *, denial: bool) -> str:
    """Why the rule is not about this destination; empty when it is."""
    address = canonical(facts.dst_ip)
    by_address = rule.matches_any_form(address) if denial else rule.matches_address(address)
    if not by_address and not any(rule.matches_name(pin.name) for pin in facts.names):
        return "another destination"
    if not rule.matches_port(facts.dst_port):
        return f"not for port {facts.dst_port}"
    if not holds_for(rule, asker, unknown=denial):
        return "not for this asker or phase"
    return ""
