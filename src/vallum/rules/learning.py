"""From what a run was denied, or did, to the smallest set of grants that would have let it. A pure fold over events.

What the events say was chosen by the guest. Covered: nothing is proposed for what only an attacker wants (metadata,
private and own addresses, mining, names that look like data, what a rule of the owner denied), hosts and paths stay
exact, and text of the guest reaches the proposal only in characters that mean nothing to TOML or a terminal.
Not covered: whether a plain public host is a good idea. A person reads the proposal; nothing applies it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import msgspec

from vallum.core.events import DnsQuery, Event, Flow, HttpRequest, Record
from vallum.core.text import show
from vallum.rules.addresses import canonical, guards_of
from vallum.rules.facts import RequestFacts
from vallum.rules.names import METADATA_NAMES, normalise_name
from vallum.rules.paths import normalise_path
from vallum.rules.queries import looks_random
from vallum.rules.requests import git_action

Source = Literal["denied", "used"]
LEARNABLE = frozenset(
    {"default-deny", "locked", "protocol-mismatch", "method-mismatch", "path-mismatch", "git-mismatch"}
)
"""Denials that mean no more than that nothing grants it."""
GUARDED = {
    "git-read-only": "it pushes to a repository",
    "private-range": "it is in a private range",
    "link-local": "it is a link-local address",
    "own-address": "it is an address of the host itself",
    "loopback": "it is on the host's loopback",
    "metadata": "it is a metadata service",
}
_NEVER = frozenset({"metadata", "own-address", "loopback"})
_WEB = frozenset({"http", "http2", "tls"})
_INSIDE = ("localhost", "local", "internal", "lan", "home", "corp", "intranet", "arpa")
MAX_SIBLINGS = 20
"""More names than this under one parent, each asked for once or twice, are taken for data."""
MAX_WANTS = 500


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was wanted: what a rule can say of it."""

    method: str
    path: str
    git: str = ""


class Want(msgspec.Struct, kw_only=True):
    """One destination, with who wanted it and how often."""

    host: str = ""
    ip: str = ""
    port: int | None = None
    """None: only its name was asked for."""
    claims: set[str] = msgspec.field(default_factory=set)
    """Names that the guest sent to an address without having asked for them: not evidence of whose it is."""
    protocols: set[str] = msgspec.field(default_factory=set)
    requests: set[Request] = msgspec.field(default_factory=set)
    count: int = 0
    steps: list[str] = []
    """``EPISODE/STEP``, in the order of their first asking."""
    phases: set[str] = msgspec.field(default_factory=set)
    rules: set[str] = msgspec.field(default_factory=set)

    @property
    def target(self) -> str:
        """Readable."""
        place = self.host or self.ip
        return place if self.port is None else f"[{place}]:{self.port}" if ":" in place else f"{place}:{self.port}"

    def add(self, event: Event, phase: str, rule: str) -> None:
        """Count one asking."""
        step = f"{event.scope.episode or '-'}/{event.scope.step if event.scope.step is not None else '-'}"
        if step not in self.steps and len(self.steps) < 1000:
            self.steps.append(step)
        self.count += 1
        self.phases.add(phase)
        self.rules.add(rule)


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """What is not proposed, and why."""

    target: str
    why: str
    count: int
    steps: list[str]


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What a run wanted, sorted into what may be proposed and what may not."""

    wants: list[Want]
    left_out: list[LeftOut]


def learn(records: Iterable[Record], source: Source = "denied", *, include_guarded: bool = False) -> Lesson:
    """What a run was denied (or used), by destination.

    Args:
        records: of one run, in order.
        source: ``denied``, or ``used``: what was let through.
        include_guarded: also private addresses, ssh, mining, unknown protocols and pushes. Never metadata, the host's
            own addresses and names that look like data.
    """
    fold = _Fold(source, include_guarded)
    for record in records:
        fold.take(record.event)
    return fold.finish()


class _Fold:
    def __init__(self, source: Source, include_guarded: bool) -> None:
        self.source = source
        self.include_guarded = include_guarded
        self.wants: dict[tuple[str, int | None], Want] = {}
        self.refused: dict[tuple[str, str], Want] = {}
        self.asked: set[str] = set()

    def take(self, event: Event) -> None:
        if isinstance(event, DnsQuery):
            self.take_query(event)
        elif isinstance(event, HttpRequest):
            self.take_request(event)
        elif isinstance(event, Flow):
            self.take_flow(event)

    def wanted(self, state: str) -> bool:
        return state == ("denied" if self.source == "denied" else "opened")

    def take_query(self, event: DnsQuery) -> None:
        self.asked.add(normalise_name(event.qname) or "")
        if self.source == "used" or event.verdict != "deny" or event.qtype not in {"A", "AAAA", "HTTPS"}:
            return
        name = normalise_name(event.qname)
        if name is None:
            self.leave(show(event.qname, 80), "it is no host name", event, "run", event.rule)
        elif (why := self.why_not(event.rule, name, "")) is not None:
            self.leave(name, why, event, "run", event.rule)
        else:
            self.want(name, "", None, event, "run", event.rule)

    def take_flow(self, event: Flow) -> None:
        if not self.wanted(event.state):
            return
        said = normalise_name(event.dst_host) if event.dst_host else None
        name = said if said in self.asked else None
        rule = event.rule if event.state == "denied" else "default-deny"
        why = self.why_not(rule, name, event.dst_ip) or self.why_not_protocol(event)
        if why is not None:
            self.leave(f"{name or event.dst_ip}:{event.dst_port}", why, event, event.phase, event.rule)
            return
        want = self.want(name or "", "" if name else event.dst_ip, event.dst_port, event, event.phase, event.rule)
        if said is not None and name is None:
            want.claims.add(said)
        if event.protocol != "unknown":
            want.protocols.add(event.protocol)

    def take_request(self, event: HttpRequest) -> None:
        if not self.wanted(event.state) or event.service in {"model", "tools"}:
            return
        name = normalise_name(event.host)
        rule = event.rule if event.state == "denied" else "default-deny"
        way, _, query = event.path.partition("?")
        path = normalise_path(way)
        usable = path is not None and path.isascii() and not set("*\"'`") & set(path) and len(path) <= 300
        why = self.why_not(rule, name, "" if name else event.host)
        if why is None and not usable:
            why = "its path is long, or holds characters that a rule could not say plainly"
        if why is not None:
            self.leave(
                f"{show(event.method, 20)} {name or show(event.host, 80)}:{event.port}",
                why,
                event,
                event.phase,
                event.rule,
            )
            return
        method = "GET" if event.method == "HEAD" else event.method
        facts = RequestFacts(
            method=method, scheme=event.scheme, host=event.host, port=event.port, path=path or "/", query=query
        )
        want = self.want(name or "", "" if name else event.host, event.port, event, event.phase, event.rule)
        want.protocols.add("tls" if event.scheme == "https" else "http")
        want.requests.add(Request(method=method, path=facts.path, git=git_action(facts)))

    def why_not(self, rule: str, name: str | None, ip: str) -> str | None:
        """Why nothing is proposed for it; None when something may be."""
        if rule in GUARDED and (rule in _NEVER or not self.include_guarded):
            return GUARDED[rule]
        if rule not in LEARNABLE and rule not in GUARDED:
            return f"it was refused by rule {show(rule, 80)}, which is no missing grant"
        if name is not None:
            if name in METADATA_NAMES:
                return GUARDED["metadata"]
            if "." not in name or name.rpartition(".")[2] in _INSIDE:
                return None if self.include_guarded else "it is a name of the inside network"
            if any(looks_random(label) for label in name.split(".")[:-1]):
                return "its name looks like data that is carried out"
            return None
        return self.why_not_address(ip)

    def why_not_address(self, ip: str) -> str | None:
        try:
            guards = guards_of(canonical(ip))
        except ValueError:
            return "its host is neither a name nor an address"
        for guard in guards:
            if guard.rule in _NEVER or not self.include_guarded:
                return f"it is {guard.what}"
        return None

    def why_not_protocol(self, event: Flow) -> str | None:
        if event.protocol in _WEB or self.include_guarded:
            return None
        if event.protocol == "unknown" and (event.dst_port in {80, 443} and not event.first_bytes):
            return None  # it was refused before it said anything
        return f"its protocol is {event.protocol}"

    def want(self, host: str, ip: str, port: int | None, event: Event, phase: str, rule: str) -> Want:
        key = (host or ip, port)
        if key not in self.wants and len(self.wants) >= MAX_WANTS:
            self.leave("other destinations", f"there are more than {MAX_WANTS}", event, phase, rule)
            return Want()
        found = self.wants.setdefault(key, Want(host=host, ip=ip, port=port))
        found.add(event, phase, rule)
        return found

    def leave(self, target: str, why: str, event: Event, phase: str, rule: str) -> None:
        key = (target, why)
        if key not in self.refused and len(self.refused) >= MAX_WANTS:
            key = ("other destinations", "there are too many to list")
        self.refused.setdefault(key, Want()).add(event, phase, rule)

    def finish(self) -> Lesson:
        self.drop_names_that_were_dialled()
        crowded = self.crowded_parents()
        kept = []
        for want in self.wants.values():
            parent = want.host.partition(".")[2]
            if parent in crowded:
                why = f"{crowded[parent]} names under {parent} were asked for, as if to carry data out"
                self.refused[want.target, why] = want
            else:
                kept.append(want)
        left_out = [
            LeftOut(target=target, why=why, count=want.count, steps=want.steps)
            for (target, why), want in self.refused.items()
        ]
        kept.sort(key=lambda want: (want.host or want.ip, want.port or 0))
        return Lesson(wants=kept, left_out=sorted(left_out, key=lambda left: (left.why, left.target)))

    def drop_names_that_were_dialled(self) -> None:
        """A query says nothing that a connection to the same name does not say better."""
        dialled = {want.host for want in self.wants.values() if want.port is not None}
        for want in [want for want in self.wants.values() if want.port is None and want.host in dialled]:
            del self.wants[want.host, None]

    def crowded_parents(self) -> dict[str, int]:
        hosts = {want.host for want in self.wants.values() if want.host.count(".") >= 2}
        parents = Counter(host.partition(".")[2] for host in hosts)
        return {parent: count for parent, count in parents.items() if count > MAX_SIBLINGS}
