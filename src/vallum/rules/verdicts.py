"""Decisions on flows, requests and queries. Pure: the same facts and rules give the same decision, for the replayer too.

Order: a denial; the built-in guards (``metadata``, ``own-address``, ``private-range``, ...), which only an exact
grant opens; a hold; the grants; then, once the first bytes are known, the protocol and the name inside it; then, where
requests are read, each request. One grant that admits is enough: a narrower one beside it narrows nothing.

Covered: every flow is judged before its first byte leaves; a name grant binds address, SNI and Host to that name; in a
flow that is read, the Host of every request is the name that the flow was opened for (no domain fronting). What is not
known yet never widens: a denial or hold for a particular step applies while the step is unknown, a grant does not.
Not covered: what an allowed flow that is not read carries (an HTTP Host inside TLS); data put in the labels of names
under a granted wildcard, but for the limits of :mod:`vallum.rules.queries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.rules.addresses import METADATA, OWN, Address, Guard, canonical, guards_of
from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.names import METADATA_NAMES, normalise_name
from vallum.rules.paths import normalise_path
from vallum.rules.requests import covers_request, denies_tool, refuse_request, refuse_tool
from vallum.rules.selection import condition, failed_condition, holds_for
from vallum.rules.sessions import SessionFacts, covers_session, denies_session, kinds_of

__all__ = [
    "SERVER_FIRST",
    "Asker",
    "FlowFacts",
    "Pin",
    "RequestFacts",
    "admits_server_first",
    "judge_answer",
    "judge_flow",
    "judge_query",
    "judge_request",
    "judge_session",
    "judge_tool",
    "may_connect",
    "reads_requests",
    "reads_sessions",
]

SERVER_FIRST: frozenset[Protocol] = frozenset({"unknown", "ssh"})
"""Protocols in which the server may speak first. Of SSH only what is relayed unread, as both sides begin at once."""


def may_connect(rules: Ruleset, facts: FlowFacts, asker: Asker | None = None) -> Decision:
    """Whether any rule could allow this destination, whatever the first bytes turn out to be.

    ``hold``: a person would be asked once they are known. Nothing may be connected to before.
    """
    return judge_flow(rules, msgspec.structs.replace(facts, protocol=None), asker)


def admits_server_first(rules: Ruleset, facts: FlowFacts, asker: Asker | None = None) -> bool:
    """Whether a grant of this destination (one that holds, too) admits a protocol in which the server speaks first."""
    if may_connect(rules, facts, asker).verdict == "deny":
        return False
    usable, _ = _usable((*rules.allow, *rules.hold), facts, canonical(facts.dst_ip), asker, unknown=False)
    first = SERVER_FIRST if rules.containment == "research" else SERVER_FIRST - {"ssh"}
    return any(first & set(rule.protocols_for(facts.dst_port)) for rule in usable)


def judge_flow(rules: Ruleset, facts: FlowFacts, asker: Asker | None = None) -> Decision:
    """The verdict on a flow. With ``facts.protocol`` None only destinations are judged (see :func:`may_connect`).

    Args:
        rules: of the cell.
        facts: what is known. Rules in ``facts.approved`` grant instead of holding.
        asker: who asks. None: nobody in particular, in phase run; no grant for somebody applies then.
    """
    return _judge(rules, facts, asker, None)


def reads_requests(rules: Ruleset, facts: FlowFacts, asker: Asker | None = None) -> bool:
    """Whether an admitted flow must be read request by request: some rule that could apply to it says so.

    HTTP/2 in clear to a name always is: nothing else tells which hosts its requests are for.
    """
    address = canonical(facts.dst_ip)
    usable, _ = _usable((*rules.hold, *rules.allow), facts, address, asker, unknown=True)
    if any(rule.reads_requests for rule in usable):
        return True
    if facts.protocol == "http2" and any(rule.host is not None for rule in usable):
        return True
    # Where addresses are granted, the next request may name any host, also one that a denial is about.
    free = any(rule.cidr is not None for rule in usable) and (facts.protocol != "tls" or facts.server_name is None)
    return any(
        rule.narrows_requests
        and holds_for(rule, asker, unknown=True)
        and rule.matches_port(facts.dst_port)
        and (_reaches(rule, facts, address) or (free and rule.host is not None))
        for rule in (*rules.deny, *rules.hold)
    )


def judge_request(rules: Ruleset, facts: FlowFacts, request: RequestFacts, asker: Asker | None = None) -> Decision:
    """The verdict on one request of an admitted flow.

    ``decision.rule`` is the grant (or hold) whose credential, service and budget are for this request. ``facts`` are the
    flow's, with the SNI as ``server_name`` if it is TLS. Grants that look at requests are tried before the others, so
    that a credential is put in although another grant admits the host as a whole.
    """
    where = f"{show(request.host)}"
    if normalise_path(request.path) != request.path and (request.method, request.path) != ("OPTIONS", "*"):
        return _deny(
            "malformed", f"the path of this request to {where} is not in its normal form, so it can be read in two ways"
        )
    name = normalise_name(request.host)
    if facts.protocol == "tls" and facts.server_name is not None and name != facts.server_name:
        return _deny(
            "host-mismatch",
            f"this request is for {where}, but the connection was opened for {show(facts.server_name)}: open one for each",
        )
    return _judge(rules, msgspec.structs.replace(facts, server_name=name), asker, request)


def reads_sessions(rules: Ruleset, facts: FlowFacts, asker: Asker | None = None) -> bool:
    """Whether an admitted SSH flow is ended by the gateway: some rule that could apply to it says what for.

    One that no rule speaks of is only admitted under ``research``, and relayed unread.
    """
    if rules.containment != "research":
        return True
    usable, _ = _usable((*rules.hold, *rules.allow), facts, canonical(facts.dst_ip), asker, unknown=True)
    return any(kinds_of(rule) for rule in usable)


def judge_session(rules: Ruleset, facts: FlowFacts, session: SessionFacts, asker: Asker | None = None) -> Decision:
    """The verdict on one request of a session inside an admitted SSH flow (``facts.protocol`` is ``ssh``).

    ``decision.rule`` is the grant (or hold) whose credential and budget are for this session.
    """
    flow = judge_flow(rules, facts, asker)
    if flow.verdict == "deny":
        return flow
    where, address = _where(facts), canonical(facts.dst_ip)
    for rule in rules.deny:
        if holds_for(rule, asker, unknown=True) and _reaches(rule, facts, address) and denies_session(rule, session):
            return _deny(rule.id, f"{where} is denied by {rule.describe()}")
    failure: Decision | None = None
    for verdict, some in (("hold", rules.hold), ("allow", rules.allow)):
        usable, _ = _usable(some, facts, address, asker, unknown=verdict == "hold")
        for rule in usable:
            refusal = find_refusal(rule, facts, where, asker, None, None)
            if refusal is not None:
                failure = failure or refusal
            elif covers_session(rule, session) and (verdict == "allow" or rule.id in facts.approved):
                return Decision(verdict="allow", rule=rule.id, reason=f"{where} is granted by {rule.describe()}")
            elif covers_session(rule, session):
                return Decision(
                    verdict="hold", rule=rule.id, reason=f"{where} waits for an approval of {rule.describe()}"
                )
            else:
                said = ", ".join(sorted(kinds_of(rule))) + (f" of {' '.join(rule.paths)}" if rule.paths else "")
                failure = _deny(
                    "session-mismatch", f"{where}: {rule.id} grants {said} over SSH, and this is {session.describe()}"
                )
    return failure or flow


def judge_tool(
    rules: Ruleset, facts: FlowFacts, request: RequestFacts, tool: str, asker: Asker | None = None
) -> Decision:
    """The verdict on a call of an MCP tool, which ``request`` carries in a body that was read."""
    return _judge(rules, msgspec.structs.replace(facts, server_name=normalise_name(request.host)), asker, request, tool)


def judges_tools(
    rules: Ruleset, facts: FlowFacts, request: RequestFacts, decision: Decision, asker: Asker | None = None
) -> bool:
    """Whether the messages inside an admitted request have to be judged one by one (:func:`judge_tool`): its grant is for
    tools, or a denial of tools may be about its host. What cannot be told counts as yes."""
    granting = rules.find(decision.rule)
    if granting is not None and granting.tools is not None:
        return True
    try:
        address = canonical(facts.dst_ip)
    except ValueError:
        return True
    seen = msgspec.structs.replace(facts, server_name=normalise_name(request.host))
    return any(
        rule.tools is not None
        and holds_for(rule, asker, unknown=True)
        and _reaches(rule, seen, address)
        and covers_request(rule, request)
        for rule in rules.deny
    )


def judge_query(rules: Ruleset, qname: str, qtype: str = "A", asker: Asker | None = None) -> Decision:
    """Whether a name may be asked for outside at all. Nothing has been asked when this is called."""
    name = normalise_name(qname)
    if name is None:
        return _deny("bad-name", f"{show(qname)!r} is not a host name")
    for rule in rules.deny:
        if _denies_whole(rule, asker) and rule.matches_name(name):
            return _deny(rule.id, f"{name} is denied by {rule.describe()}")
    granting = [rule for rule in (*rules.hold, *rules.allow) if rule.matches_name(name)]
    grants = [rule for rule in granting if holds_for(rule, asker, unknown=False)]
    grants = [rule for rule in grants if condition(rule, None, asker, None)[0] in {"yes", "later"}]
    if name in METADATA_NAMES and not any(rule.is_exact for rule in grants):
        return _deny(METADATA.rule, f"{name} is {METADATA.what}; grant exactly that name to allow it")
    if grants:
        return Decision(verdict="allow", rule=grants[0].id, reason=f"{name} ({qtype}) is granted")
    if rules.containment == "locked":
        return _deny("locked", f"containment is locked, so {name} is not looked up")
    if granting:
        return _deny(
            "default-deny", f"{name} is granted, but not to this asker now{_only(granting)}, so it was not looked up"
        )
    return _deny("default-deny", f"no rule grants {name}, so it was not looked up")


def judge_answer(
    rules: Ruleset, name: str, address: str, *, local: bool = False, own: bool = False, asker: Asker | None = None
) -> Decision:
    """Whether an address that a granted name resolved to may be given to the guest (a name must not be led inside)."""
    try:
        parsed = canonical(address)
    except ValueError:
        return _deny("internal-error", f"{show(address)!r} is not an address")
    pins = (Pin(name=name, local=local),)
    guards = guards_of(parsed, own=own)
    for rule in rules.deny:
        if _denies_whole(rule, asker) and rule.matches_any_form(parsed):
            return _deny(rule.id, f"{name} resolved to {parsed}, which is denied by {rule.describe()}")
    for rule in (*rules.hold, *rules.allow):
        by_name = rule.matches_name(name)
        by_range = rule.matches_address(parsed)
        if (
            (by_name or by_range)
            and holds_for(rule, asker, unknown=False)
            and all(_opens(rule, g, pins) for g in guards)
        ):
            return Decision(verdict="allow", rule=rule.id, reason=f"{name} is {parsed}")
    if guards:
        return _deny(guards[0].rule, f"{name} resolved to {parsed}, which is {guards[0].what}")
    return _deny("default-deny", f"no rule grants {name}")


def _judge(
    rules: Ruleset, facts: FlowFacts, asker: Asker | None, request: RequestFacts | None, tool: str | None = None
) -> Decision:
    try:
        address = canonical(facts.dst_ip)
    except ValueError:
        return _deny("internal-error", f"{show(facts.dst_ip)!r} is not an address")
    where = _where(facts)
    denial = find_denial(rules, facts, address, where, asker, request, tool)
    if denial is not None:
        return denial
    held, _ = _usable(rules.hold, facts, address, asker, unknown=True)
    granted, guard = _usable(rules.allow, facts, address, asker, unknown=False)
    if not held and not granted:
        if guard is not None:
            return _deny(guard.rule, f"{where} is {guard.what}; grant exactly that name or address to allow it")
        return _default(rules, facts, address, where, asker)
    if facts.refused and facts.protocol is not None:
        return _deny("malformed", f"{where}: {facts.refused}")
    if request is not None:
        held, granted = _careful_first(held), _careful_first(granted)
    failures: list[Decision] = []
    claimed = _claimed(rules, facts, asker, held) if granted else []
    known = msgspec.structs.replace(facts, names=(*facts.names, Pin(name=facts.server_name or "")))
    candidates = [
        *(("hold", rule, facts) for rule in held),
        *(("hold", rule, known) for rule in claimed),
        *(("allow", rule, facts) for rule in granted),
    ]
    for verdict, rule, seen in candidates:
        refusal = find_refusal(rule, seen, where, asker, request, tool) or _refuse_unread(rules, rule, seen, where)
        if refusal is not None:
            failures.append(refusal)
        elif verdict == "hold" and rule.id not in facts.approved:
            return Decision(verdict="hold", rule=rule.id, reason=f"{where} waits for an approval of {rule.describe()}")
        else:
            return Decision(verdict="allow", rule=rule.id, reason=f"{where} is granted by {rule.describe()}")
    # What says most to who is refused: a condition that failed, then a name or a request that does not fit.
    return min(failures, key=lambda decision: _TELLING.get(decision.rule, 1))


def find_denial(
    rules: Ruleset,
    facts: FlowFacts,
    address: Address,
    where: str,
    asker: Asker | None,
    request: RequestFacts | None,
    tool: str | None,
) -> Decision | None:
    """The first denial that holds; a condition without a value holds."""
    for rule in rules.deny:
        if not holds_for(rule, asker, unknown=True) or not _denies(rule, facts, address, request, tool):
            continue
        standing, why = condition(rule, facts, asker, request)
        if standing == "yes":
            return _deny(rule.id, f"{where} is denied by {rule.describe()}")
        if standing == "failed":
            return _deny(rule.id, f"{where} is refused (internal-error): {why}, so its denial holds")
    return None


_TELLING = {"internal-error": 0, "condition": 2, "git-mismatch": 2, "protocol-mismatch": 3}


def _claimed(rules: Ruleset, facts: FlowFacts, asker: Asker | None, held: Sequence[Rule]) -> list[Rule]:
    """Holds of the name in the first bytes, where a grant of addresses would let it be any name."""
    name = facts.server_name
    return [
        rule
        for rule in rules.hold
        if name is not None
        and rule not in held
        and rule.matches_name(name)
        and rule.matches_port(facts.dst_port)
        and holds_for(rule, asker, unknown=True)
    ]


def _careful_first(rules: Sequence[Rule]) -> list[Rule]:
    return sorted(rules, key=lambda rule: not rule.reads_requests)


def _deny(rule: str, reason: str) -> Decision:
    return Decision(verdict="deny", rule=rule, reason=reason)


def _where(facts: FlowFacts) -> str:
    ip = f"[{facts.dst_ip}]" if ":" in facts.dst_ip else facts.dst_ip
    names = ", ".join(pin.name for pin in facts.names[:3])
    return f"{names} ({ip}:{facts.dst_port})" if names else f"{ip}:{facts.dst_port}"


def _denies_whole(rule: Rule, asker: Asker | None) -> bool:
    """Whether a denial is of its hosts or addresses as such, so that not even their names are looked up."""
    whole = rule.ports is None and rule.protocols is None and not rule.narrows_requests
    if not whole or not holds_for(rule, asker, unknown=True):
        return False
    return condition(rule, None, asker, None)[0] in {"yes", "failed"}


def _reaches(rule: Rule, facts: FlowFacts, address: Address) -> bool:
    """Whether a denial is about this destination, whatever else it asks."""
    if not rule.matches_port(facts.dst_port):
        return False
    names = [pin.name for pin in facts.names]
    if facts.server_name is not None:
        names.append(facts.server_name)
    return rule.host == "*" or rule.matches_any_form(address) or any(map(rule.matches_name, names))


def _denies(rule: Rule, facts: FlowFacts, address: Address, request: RequestFacts | None, tool: str | None) -> bool:
    # HTTP/2 in clear is HTTP to who wrote the rule.
    seen = {facts.protocol, "http"} if facts.protocol == "http2" else {facts.protocol}
    if rule.protocols is not None and seen.isdisjoint(rule.protocols):
        return False
    if not _reaches(rule, facts, address):
        return False
    if rule.tools is not None and (tool is None or not denies_tool(rule, tool)):
        return False
    if not rule.narrows_requests:
        return True
    return request is not None and covers_request(rule, request)


def _usable(
    rules: Iterable[Rule], facts: FlowFacts, address: Address, asker: Asker | None, *, unknown: bool
) -> tuple[list[Rule], Guard | None]:
    """Rules that cover this destination for this asker and open every guard on it, and the first guard not opened."""
    guards = guards_of(address, own=facts.own)
    shut = guards[0] if guards else None
    usable = []
    for rule in rules:
        if not rule.matches_port(facts.dst_port) or not holds_for(rule, asker, unknown=unknown):
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


def _only(rules: Iterable[Rule]) -> str:
    phases = sorted({rule.phase for rule in rules if rule.phase is not None})
    return f" (a grant is for phase {', '.join(phases)})" if phases else ""


def _default(rules: Ruleset, facts: FlowFacts, address: Address, where: str, asker: Asker | None) -> Decision:
    if rules.containment == "locked":
        return _deny("locked", f"containment is locked, so {where} is not reached")
    covering = [
        rule
        for rule in (*rules.hold, *rules.allow)
        if rule.matches_address(address) or any(rule.matches_name(pin.name) for pin in facts.names)
    ]
    if any(rule.matches_port(facts.dst_port) for rule in covering):
        others = [rule for rule in covering if rule.matches_port(facts.dst_port)]
        return _deny("default-deny", f"{where} is granted, but not to this asker now{_only(others)}")
    ports = {port for rule in covering if holds_for(rule, asker, unknown=False) for port in rule.ports or ()}
    if ports:
        return _deny("default-deny", f"{where} is granted on port {', '.join(map(str, sorted(ports)[:8]))} only")
    if not facts.names and any(rule.host is not None for rule in (*rules.hold, *rules.allow)):
        return _deny("default-deny", f"no rule grants {where}, and no granted name was resolved to it")
    return _deny("default-deny", f"no rule grants {where}")


def find_refusal(
    rule: Rule, facts: FlowFacts, where: str, asker: Asker | None, request: RequestFacts | None, tool: str | None
) -> Decision | None:
    """Why a rule that covers the destination does not admit what goes there; None when it does."""
    refusal = None if facts.protocol is None else _refuse_content(rule, facts, where, read=request is not None)
    if refusal is None and request is not None:
        refusal = refuse_request(rule, request, show(request.host))
    if refusal is None and tool is not None:
        refusal = refuse_tool(rule, tool)
    if refusal is not None:
        return refusal
    standing, why = condition(rule, facts, asker, request)
    if standing == "failed":
        return failed_condition(why)
    return (
        None if standing != "no" else _deny("condition", f"{where} is granted by {rule.id} only when {show(rule.when)}")
    )


def _refuse_unread(rules: Ruleset, rule: Rule, facts: FlowFacts, where: str) -> Decision | None:
    """SSH that nobody reads can forward any port both ways. Only a closed world may want to watch that."""
    if facts.protocol != "ssh" or kinds_of(rule) or rules.containment == "research":
        return None
    what = f'{where}: {rule.id} does not say what SSH is for; add ssh = ["git-read"] or exec, shell, sftp, git-write'
    return _deny("ssh-unread", what)


def _refuse_content(rule: Rule, facts: FlowFacts, where: str, *, read: bool) -> Decision | None:
    protocol = facts.protocol
    admitted = rule.protocols_for(facts.dst_port)
    if protocol not in admitted:
        said = ", ".join(p for p in admitted if p != "http2") or "nothing that its terms could be read from"
        return _deny("protocol-mismatch", f"{where} is granted for {said}, but this is {protocol}")
    if rule.host is None or protocol not in {"tls", "http", "http2"} or (protocol == "http2" and not read):
        return None  # HTTP/2 names its hosts request by request
    what, name = ("SNI", "sni-mismatch") if protocol == "tls" and not read else ("Host", "host-mismatch")
    granted = {pin.name for pin in facts.names if rule.matches_name(pin.name)}
    if facts.name_hidden:
        return _deny("encrypted-sni", f"{where}: the ClientHello hides a second server name (ECH); switch ECH off")
    if facts.server_name is None:
        return _deny(name, f"{where}: no {what} was sent, so the granted name cannot be checked")
    if facts.server_name not in granted:
        return _deny(name, f"{where}: {what} is {show(facts.server_name)}, which is not the granted name of it")
    return None
