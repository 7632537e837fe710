"""Decisions on flows and queries. Pure: the same facts and rules give the same decision, for the replayer too.

Order: a denial; the built-in guards (``metadata``, ``own-address``, ``private-range``, ...), which only an exact
grant opens; the grants; then, once the first bytes are known, the protocol and the name inside it.

Covered: every flow is judged before its first byte leaves; a name grant binds address, SNI and Host to that name.
Not covered: what an allowed, encrypted flow carries (an HTTP Host inside TLS); data put in the labels of names
under a granted wildcard.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.addresses import METADATA, OWN, Address, Guard, canonical, guards_of
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.names import METADATA_NAMES, normalise_name

SERVER_FIRST: frozenset[Protocol] = frozenset({"unknown", "ssh"})
"""Protocols in which the server may speak first."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A name that the gateway itself resolved to the address, for this cell."""

    name: str
    local: bool = False
    """It came from the host's own hosts file, so whoever runs the host meant it."""


class FlowFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a flow. ``protocol`` None: nothing has been seen of it yet."""

    dst_ip: str
    """Address that would be connected to."""
    dst_port: int
    names: tuple[Pin, ...] = ()
    """Names pinned to the address for this cell."""
    own: bool = False
    """The address is one of the host's own."""
    protocol: Protocol | None = None
    server_name: str | None = None
    """SNI or Host, normalised; None when there is none (or it is no host name)."""
    name_hidden: bool = False
    """The ClientHello carries an encrypted one (ECH, ESNI), so its SNI is not the whole truth."""
    refused: str = ""
    """Why the first bytes cannot be let through whatever they are for (malformed, CONNECT...)."""


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, for rules that are for somebody: what the node says, never the guest."""

    run: str = ""
    episode: str = ""
    agent: str = ""
    step: int | None = None
    phase: str = "run"


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one request inside an admitted flow."""

    method: str
    scheme: str
    host: str
    port: int
    path: str
    """Without query, percent-decoded once and normalised (no ``.`` or ``..`` segments, no empty ones): what is judged is what is sent."""
    query: str = ""
    length: int | None = None
    upgrade: str = ""
    content_type: str = ""


def may_connect(rules: Ruleset, facts: FlowFacts) -> Decision:
    """Whether any rule could allow this destination, whatever the first bytes turn out to be."""
    return judge_flow(rules, msgspec.structs.replace(facts, protocol=None))


def admits_server_first(rules: Ruleset, facts: FlowFacts) -> bool:
    """Whether a grant of this destination admits a protocol in which the server speaks first."""
    if may_connect(rules, facts).verdict != "allow":
        return False
    usable, _ = _usable(rules, facts, canonical(facts.dst_ip))
    return any(SERVER_FIRST & set(rule.protocols_for(facts.dst_port)) for rule in usable)


def judge_flow(rules: Ruleset, facts: FlowFacts) -> Decision:
    """The verdict on a flow. With ``facts.protocol`` None only destinations are judged (see :func:`may_connect`)."""
    try:
        address = canonical(facts.dst_ip)
    except ValueError:
        return _deny("internal-error", f"{show(facts.dst_ip)!r} is not an address")
    where = _where(facts)
    for rule in rules.deny:
        if _denies(rule, facts, address):
            return _deny(rule.id, f"{where} is denied by {rule.describe()}")
    usable, guard = _usable(rules, facts, address)
    if not usable:
        if guard is not None:
            remedy = "grant exactly that name or address to allow it"
            return _deny(guard.rule, f"{where} is {guard.what}; {remedy}")
        return _default(rules, facts, address, where)
    if facts.protocol is None:
        return Decision(verdict="allow", rule=usable[0].id, reason=f"{where} is granted by {usable[0].describe()}")
    if facts.refused:
        return _deny("malformed", f"{where}: {facts.refused}")
    failures = []
    for rule in usable:
        decision = _judge_content(rule, facts, where)
        if decision.verdict == "allow":
            return decision
        failures.append(decision)
    # The protocol was right but the name was not: that says more than the other way round.
    return next((d for d in failures if d.rule != "protocol-mismatch"), failures[0])


def reads_requests(rules: Ruleset, facts: FlowFacts) -> bool:
    """Whether an admitted flow must be read request by request: some rule that could apply to it says so."""
    usable, _ = _usable(rules, facts, canonical(facts.dst_ip))
    return any(rule.reads_requests for rule in usable)


def judge_request(rules: Ruleset, facts: FlowFacts, request: RequestFacts) -> Decision:
    """The verdict on one request of an admitted flow; ``decision.rule`` is the grant whose credential and service hold."""
    named = msgspec.structs.replace(facts, server_name=normalise_name(request.host))
    return judge_flow(rules, named)


def judge_query(rules: Ruleset, qname: str, qtype: str = "A") -> Decision:
    """Whether a name may be asked for outside at all. Nothing has been asked when this is called."""
    name = normalise_name(qname)
    if name is None:
        return _deny("bad-name", f"{show(qname)!r} is not a host name")
    for rule in rules.deny:
        if rule.ports is None and rule.protocols is None and rule.matches_name(name):
            return _deny(rule.id, f"{name} is denied by {rule.describe()}")
    grants = [rule for rule in rules.allow if rule.matches_name(name)]
    if name in METADATA_NAMES and not any(rule.is_exact for rule in grants):
        return _deny(METADATA.rule, f"{name} is {METADATA.what}; grant exactly that name to allow it")
    if grants:
        return Decision(verdict="allow", rule=grants[0].id, reason=f"{name} ({qtype}) is granted")
    if rules.containment == "locked":
        return _deny("locked", f"containment is locked, so {name} is not looked up")
    return _deny("default-deny", f"no rule grants {name}, so it was not looked up")


def judge_answer(rules: Ruleset, name: str, address: str, *, local: bool = False, own: bool = False) -> Decision:
    """Whether an address that a granted name resolved to may be given to the guest (a name must not be led inside)."""
    try:
        parsed = canonical(address)
    except ValueError:
        return _deny("internal-error", f"{show(address)!r} is not an address")
    pins = (Pin(name=name, local=local),)
    guards = guards_of(parsed, own=own)
    for rule in rules.deny:
        if rule.ports is None and rule.protocols is None and rule.matches_any_form(parsed):
            return _deny(rule.id, f"{name} resolved to {parsed}, which is denied by {rule.describe()}")
    for rule in rules.allow:
        by_name = rule.matches_name(name)
        by_range = rule.matches_address(parsed)
        if (by_name or by_range) and all(_opens(rule, guard, pins) for guard in guards):
            return Decision(verdict="allow", rule=rule.id, reason=f"{name} is {parsed}")
    if guards:
        return _deny(guards[0].rule, f"{name} resolved to {parsed}, which is {guards[0].what}")
    return _deny("default-deny", f"no rule grants {name}")


def _deny(rule: str, reason: str) -> Decision:
    return Decision(verdict="deny", rule=rule, reason=reason)


def _where(facts: FlowFacts) -> str:
    ip = f"[{facts.dst_ip}]" if ":" in facts.dst_ip else facts.dst_ip
    names = ", ".join(pin.name for pin in facts.names[:3])
    return f"{names} ({ip}:{facts.dst_port})" if names else f"{ip}:{facts.dst_port}"


def _denies(rule: Rule, facts: FlowFacts, address: Address) -> bool:
    if not rule.matches_port(facts.dst_port):
        return False
    if rule.protocols is not None and facts.protocol not in rule.protocols:
        return False
    names = [pin.name for pin in facts.names]
    if facts.server_name is not None:
        names.append(facts.server_name)
    if rule.host == "*":
        return True
    return rule.matches_any_form(address) or any(map(rule.matches_name, names))


def _usable(rules: Ruleset, facts: FlowFacts, address: Address) -> tuple[list[Rule], Guard | None]:
    """Grants of this destination that open every guard on it, and the first guard that was not opened."""
    guards = guards_of(address, own=facts.own)
    shut = guards[0] if guards else None
    usable = []
    for rule in rules.allow:
        if not rule.matches_port(facts.dst_port):
            continue
        pins = tuple(pin for pin in facts.names if rule.matches_name(pin.name))
        if not pins and not rule.matches_address(address):
            continue
        closed = [guard for guard in guards if not _opens(rule, guard, pins)]
        if closed:
            shut = closed[0]
        else:
            usable.append(rule)
    return usable, shut


def _opens(rule: Rule, guard: Guard, pins: Iterable[Pin]) -> bool:
    """Whether a grant that covers the destination was meant for this guarded address too."""
    network = rule.network
    if network is not None:
        if network.num_addresses == 1:
            return True
        if guard.single:
            return False
        return any(network.version == n.version and network.subnet_of(n) for n in guard.networks)  # type: ignore[arg-type]
    if not rule.is_exact or not any(rule.matches_name(pin.name) for pin in pins):
        return False
    if guard is METADATA:
        return rule.host in METADATA_NAMES
    if guard.rule == "loopback":
        # Who controls the name's DNS must not choose a service on the host's loopback; the hosts file may.
        return any(pin.local for pin in pins)
    return guard is OWN or guard.rule == "private-range"


def _default(rules: Ruleset, facts: FlowFacts, address: Address, where: str) -> Decision:
    if rules.containment == "locked":
        return _deny("locked", f"containment is locked, so {where} is not reached")
    others = {
        port
        for rule in rules.allow
        if rule.matches_address(address) or any(rule.matches_name(pin.name) for pin in facts.names)
        for port in rule.ports or ()
    }
    if others:
        ports = ", ".join(map(str, sorted(others)[:8]))
        return _deny("default-deny", f"{where} is granted on port {ports} only")
    if not facts.names and any(rule.host is not None for rule in rules.allow):
        return _deny("default-deny", f"no rule grants {where}, and no granted name was resolved to it")
    return _deny("default-deny", f"no rule grants {where}")


def _judge_content(rule: Rule, facts: FlowFacts, where: str) -> Decision:
    protocol = facts.protocol
    admitted = rule.protocols_for(facts.dst_port)
    if protocol not in admitted:
        return _deny("protocol-mismatch", f"{where} is granted for {', '.join(admitted)}, but this is {protocol}")
    if rule.host is not None and protocol in {"tls", "http"}:
        what, name = ("SNI", "sni-mismatch") if protocol == "tls" else ("Host", "host-mismatch")
        granted = {pin.name for pin in facts.names if rule.matches_name(pin.name)}
        if facts.name_hidden:
            return _deny("encrypted-sni", f"{where}: the ClientHello hides a second server name (ECH); switch ECH off")
        if facts.server_name is None:
            return _deny(name, f"{where}: no {what} was sent, so the granted name cannot be checked")
        if facts.server_name not in granted:
            return _deny(name, f"{where}: {what} is {show(facts.server_name)}, which is not the granted name of it")
    return Decision(verdict="allow", rule=rule.id, reason=f"{where} is granted by {rule.describe()}")
