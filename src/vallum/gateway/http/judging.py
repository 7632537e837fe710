"""The verdict on one request: what is judged, and that exactly this is what is sent. Pure.

Covered: the path is judged in the one form in which it is sent on; a request has to be for the name that its
connection was granted for (no domain fronting, no coalescing of names in one TLS connection).
"""

from __future__ import annotations

import msgspec

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GATEWAY_SERVICE
from vallum.gateway.http.exchange import RequestHead
from vallum.gateway.kit import ServiceName
from vallum.gateway.names import host_of, service_at
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.paths import encode_path, normalise_path
from vallum.rules.verdicts import Asker, FlowFacts, RequestFacts, judge_request, judges_tools

_OVERRIDES = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, and the request as it may be sent."""

    decision: Decision
    head: RequestHead
    rule: Rule | None = None
    """The grant (or held grant) that decided; None for the gateway's own rules."""
    service: str = "forward"
    status: int = 403
    """Of the answer, where it is refused."""


def settle_path(head: RequestHead) -> tuple[RequestHead, str]:
    """The head with its path in normal form, and that path decoded, as rules compare it.

    A path that has no normal form stays as it is; judging denies it.
    """
    path, mark, query = head.target.partition("?")
    normal = normalise_path(path)
    if normal is None:
        return head, path
    return msgspec.structs.replace(head, target=encode_path(normal) + mark + query), normal


def read_request(head: RequestHead) -> tuple[RequestHead, RequestFacts]:
    """The head with its path in normal form, and what rules are asked about."""
    head, path = settle_path(head)
    return head, RequestFacts(
        method=head.method,
        scheme=head.scheme,
        host=head.host,
        port=head.port,
        path=path,
        query=head.target.partition("?")[2],
        length=head.length,
        upgrade=head.upgrade,
        content_type=(head.header(b"content-type") or b"").decode("latin-1"),
    )


def judge(rules: Ruleset, facts: FlowFacts, head: RequestHead, asker: Asker) -> Judgement:
    """The verdict on a request inside an admitted flow."""
    own = service_at(facts.dst_ip)
    if own is not None:
        name = host_of(own)
        if head.host not in {name, facts.dst_ip}:
            return _misdirected(head, f"this is {name}, and the request is for {show(head.host)}")
        decision = Decision(verdict="allow", rule=GATEWAY_SERVICE, reason=f"{name} is the gateway's own")
        return Judgement(decision=decision, head=head, service=own)
    if facts.protocol == "tls" and facts.server_name is not None and head.host != facts.server_name:
        reason = f"the connection is for {show(facts.server_name)}, and the request for {show(head.host)}"
        return _misdirected(head, reason)
    head, request = read_request(head)
    decision = judge_request(rules, facts, request, asker)
    rule = rules.find(decision.rule)
    service: ServiceName = rule.service if rule is not None else "forward"
    if decision.verdict != "deny" and judges_tools(rules, facts, request, decision, asker):
        service = "mcp"
        if decision.verdict == "hold" and rule is not None and rule.tools is not None:
            # What waits for a person is each call, when it is known which.
            decision = Decision(verdict="allow", rule=decision.rule, reason=f"{decision.reason}, call by call")
    if decision.verdict == "allow" and any(map(_is_of_methods, (*rules.deny, *rules.hold, *rules.allow))):
        # A server that obeys them would do what another method is denied, or held, for.
        kept = tuple(pair for pair in head.headers if pair[0] not in _OVERRIDES)
        head = msgspec.structs.replace(head, headers=kept)
    return Judgement(decision=decision, head=head, rule=rule, service=service)


def _is_of_methods(rule: Rule) -> bool:
    """Whether it tells methods apart: in words, or as calls of tools (POST) and git do."""
    return rule.methods is not None or rule.tools is not None or bool(rule.git)


def _misdirected(head: RequestHead, reason: str) -> Judgement:
    decision = Decision(verdict="deny", rule="host-mismatch", reason=reason)
    return Judgement(decision=decision, head=head, status=421)
