"""What was learnt, as grants and as text: a rule file, or a unified diff against one, for a person to read. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from vallum.core.errors import RuleError
from vallum.core.text import show
from vallum.rules.explanation import PLACEHOLDER
from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.files import list_bundles, parse_ruleset, read_bundle
from vallum.rules.grants import DEFAULT_PORTS, Ruleset
from vallum.rules.learning import LeftOut, Lesson, Request, Want
from vallum.rules.verdicts import judge_flow, judge_request

SHARE_FROM = 4
"""So many different paths below one folder become ``FOLDER/**``."""
MAX_PATHS = 40
MAX_STEPS_NAMED = 8


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """One proposed ``[[allow]]``."""

    host: str = ""
    cidr: str = ""
    ports: list[int]
    protocols: list[str] = []
    phase: str = ""
    methods: list[str] = []
    paths: list[str] = []
    git: str = ""
    count: int
    steps: list[str]
    note: str = ""


class BundleUse(msgspec.Struct, frozen=True, kw_only=True):
    """One proposed bundle."""

    name: str
    phase: str = ""
    hosts: list[str]
    """Of its hosts, those that were asked for."""
    count: int
    steps: list[str]


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is proposed, and what is not."""

    bundles: list[BundleUse]
    grants: list[Grant]
    left_out: list[LeftOut]


def propose(lesson: Lesson) -> Proposal:
    """The smallest grants for what was learnt: bundles where they are what was meant, exact hosts otherwise."""
    rest = list(lesson.wants)
    bundles = []
    for name in list_bundles():
        rules = read_bundle(name)
        hosts = {rule.host for rule in rules}
        covered = [want for want in rest if want.host in hosts and _covers(Ruleset(allow=rules), want)]
        found = {want.host for want in covered}
        # A bundle opens all its hosts, so at least half of them have to have been asked for.
        if not found or len(found) * 2 < len(hosts):
            continue
        rest = [want for want in rest if want not in covered]
        bundles.append(
            BundleUse(
                name=name,
                phase=_phase(covered),
                hosts=sorted(found),
                count=sum(want.count for want in covered),
                steps=_steps(covered),
            )
        )
    grants = [grant for want in rest for grant in _grants(want)]
    return Proposal(bundles=bundles, grants=grants, left_out=lesson.left_out)


def generalise(paths: Iterable[str]) -> list[str]:
    """Patterns that cover the paths: as they are, or the deepest folder that :data:`SHARE_FROM` or more of them share.

    The root is never such a folder.
    """
    left, patterns = set(paths), set[str]()
    depth = max((path.count("/") for path in left), default=0)
    for level in range(depth, 1, -1):
        folders: dict[str, set[str]] = defaultdict(set)
        for path in left:
            parts = path.split("/")
            if len(parts) > level:
                folders["/".join(parts[:level])].add(path)
        for folder, members in folders.items():
            if len(members) >= SHARE_FROM:
                patterns.add(f"{folder}/**")
                left -= members
    tops = [pattern for pattern in patterns if not any(pattern != p and pattern.startswith(p[:-2]) for p in patterns)]
    return sorted([*tops, *(path for path in left if not any(path.startswith(top[:-2]) for top in tops))])


def render(proposal: Proposal, old: str = "") -> str:
    """The text of the rule file with the proposal in it.

    Raises:
        RuleError: the file is not usable, or not with the proposal.
    """
    text = old
    for phase in ("", "setup", "run"):
        uses = [use for use in proposal.bundles if use.phase == phase]
        if uses:
            text = _with_bundles(text, uses, phase)
    if proposal.grants:
        blocks = "\n".join(_write(grant) for grant in proposal.grants)
        text = f"{text.rstrip()}\n\n{blocks}" if text.strip() else blocks
    parse_ruleset(text, "the proposal")
    return text


def render_diff(proposal: Proposal, old: str, name: str) -> str:
    """A unified diff from the file ``name`` with text ``old`` (empty: it is new) to one with the proposal.

    What is left out comes before it, in lines that ``patch`` passes over.

    Raises:
        RuleError: as :func:`render`.
    """
    head = [
        f"# left out: {_plain(left.target)}: {_plain(left.why)} ({_asked(left.count, left.steps)})"
        for left in proposal.left_out
    ]
    before = old.splitlines(keepends=True)
    if before and not before[-1].endswith("\n"):
        before[-1] += "\n"
    after = render(proposal, "".join(before)).splitlines(keepends=True)
    lines = difflib.unified_diff(before, after, name if old else "/dev/null", name)
    return "".join([*(f"{line}\n" for line in head), *lines])


def _covers(rules: Ruleset, want: Want) -> bool:
    phase = _phase([want]) or "run"
    ports = (want.port,) if want.port is not None else (443,)
    for port in ports:
        tls = port != 80 if not want.protocols else "tls" in want.protocols
        facts = FlowFacts(
            dst_ip=PLACEHOLDER,
            dst_port=port,
            names=(Pin(name=want.host),),
            protocol="tls" if tls else "http",
            server_name=want.host,
        )
        asker = Asker(phase=phase)
        if want.protocols - {"tls", "http", "http2"} or judge_flow(rules, facts, asker).verdict != "allow":
            return False
        if not all(
            judge_request(rules, facts, _facts(want, request, port), asker).verdict == "allow"
            for request in want.requests
        ):
            return False
    return True


def _facts(want: Want, request: Request, port: int) -> RequestFacts:
    method, path, query = request.method, request.path, ""
    if request.git and method == "GET":
        query = f"service=git-{'upload' if request.git == 'read' else 'receive'}-pack"
    return RequestFacts(method=method, scheme="https", host=want.host, port=port, path=path, query=query)


def _grants(want: Want) -> list[Grant]:
    note = ""
    ports = [want.port] if want.port is not None else [443]
    if want.port is None:
        note = "only its name was asked for, so port 443 is a guess"
    elif want.claims:
        note = f"dialled without asking for a name, and called {', '.join(sorted(want.claims)[:3])} by the guest"
    usual = _usual(ports[0])
    seen = sorted(protocol for protocol in want.protocols if protocol not in {usual, "http2"})
    base = Grant(
        host=want.host,
        cidr=want.ip,
        ports=ports,
        protocols=sorted(want.protocols - {"http2"}) if seen else [],
        phase=_phase([want]),
        count=want.count,
        steps=want.steps,
        note=note,
    )
    if not want.requests:
        return [base]
    grants = [msgspec.structs.replace(base, git=git) for git in _git_grants(want.requests)]
    by_path: dict[str, set[str]] = defaultdict(set)
    for request in want.requests:
        if not request.git:
            by_path[request.path].add(request.method)
    by_methods: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, found in by_path.items():
        by_methods[tuple(sorted(found))].append(path)
    for methods, paths in sorted(by_methods.items()):
        patterns = generalise(paths)
        more = f"{len(patterns) - MAX_PATHS} more paths were left out" if len(patterns) > MAX_PATHS else ""
        named = [*(["GET", "HEAD"] if "GET" in methods else []), *(method for method in methods if method != "GET")]
        grants.append(msgspec.structs.replace(base, methods=named, paths=patterns[:MAX_PATHS], note=more or note))
    return grants


def _git_grants(requests: Iterable[Request]) -> list[str]:
    actions = {request.git for request in requests if request.git}
    return ["write"] if "write" in actions else ["read"] if actions else []


def _usual(port: int) -> str:
    return {80: "http", 22: "ssh"}.get(port, "tls") if port in {*DEFAULT_PORTS, 22} else ""


def _phase(wants: Sequence[Want]) -> str:
    phases = {phase for want in wants for phase in want.phases}
    return "setup" if phases == {"setup"} else ""


def _steps(wants: Sequence[Want]) -> list[str]:
    return list(dict.fromkeys(step for want in wants for step in want.steps))


def _asked(count: int, steps: Sequence[str]) -> str:
    named = ", ".join(_plain(step) for step in steps[:MAX_STEPS_NAMED])
    more = f" and {len(steps) - MAX_STEPS_NAMED} more" if len(steps) > MAX_STEPS_NAMED else ""
    return f"asked {count} time{'' if count == 1 else 's'} by step{'' if len(steps) == 1 else 's'} {named}{more}"


def _plain(text: str) -> str:
    """Text of the guest for a comment: one line of ASCII."""
    return show(text, 160).encode("ascii", "backslashreplace").decode()


def _write(grant: Grant) -> str:
    lines = [f"# {_asked(grant.count, grant.steps)}" + (f"; {grant.note}" if grant.note else ""), "[[allow]]"]
    for key in ("host", "cidr", "ports", "protocols", "phase", "methods", "paths", "git"):
        value = getattr(grant, key)
        if value:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _with_bundles(text: str, uses: Sequence[BundleUse], phase: str) -> str:
    """The text with bundles added to the list of a phase, which is made where there is none."""
    comments = [f"# {use.name}: {', '.join(use.hosts)}; {_asked(use.count, use.steps)}" for use in uses]
    lines = text.splitlines()
    start = 0
    if phase:
        start = next((n for n, line in enumerate(lines, 1) if re.match(rf"\s*\[\s*{phase}\s*\]", line)), 0)
        if not start:
            listed = json.dumps([use.name for use in uses])
            return "\n".join([*lines, *([""] if lines else []), *comments, f"[{phase}]", f"bundles = {listed}"]) + "\n"
    end = next((n for n, line in enumerate(lines) if n >= start and line.lstrip().startswith("[")), len(lines))
    for number in range(start, end):
        if re.match(r"\s*bundles\s*=", lines[number]):
            written = re.fullmatch(r"\s*bundles\s*=\s*(\[[^\]]*\])\s*", lines[number])
            if written is None:
                wanted = ", ".join(use.name for use in uses)
                raise RuleError(
                    f"line {number + 1} holds a list of bundles that cannot be edited: add {wanted} to it by hand"
                )
            listed = json.loads(written[1].replace("'", '"').replace(",]", "]"))
            names = json.dumps(list(dict.fromkeys([*listed, *(use.name for use in uses)])))
            return "\n".join([*lines[:number], *comments, f"bundles = {names}", *lines[number + 1 :]]) + "\n"
    listed = json.dumps([use.name for use in uses])
    blank = [""] if end < len(lines) else []
    # Keys of the top have to come before the first table.
    at = start if phase else _end_of_top(lines, end)
    return "\n".join([*lines[:at], *comments, f"bundles = {listed}", *blank, *lines[at:]]) + "\n"


def _end_of_top(lines: Sequence[str], end: int) -> int:
    """Where the keys at the top end: before the comments that belong to the first table."""
    while end and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return end
