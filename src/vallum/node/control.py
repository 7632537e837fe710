"""What holds at the door of each cell (rules and kit), and how it is changed while the cell runs.

Covered: rules that cannot be used change nothing; a cell goes from set-up to run once and never back; a rule gets a credential only
for hosts that its owner gave it for. Not covered: every process of the node's owner may change rules (the node's socket is
the owner's); run an agent harness that is not trusted in a cell or as another user.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from vallum.client import wire
from vallum.client.model import Model
from vallum.core import clock
from vallum.core.errors import CellGone, GuestFileError, InvalidInput, RuleError
from vallum.core.events import FileWrite, RulesChanged
from vallum.core.scope import BY_NODE
from vallum.core.text import show
from vallum.gateway.kit import Authority, Canary, Credential, HostTool, Kit, ModelDoor
from vallum.node.authority import is_fresh, make_authority
from vallum.node.canaries import PLANTED_FILE, check_canaries, guard_secrets, make_planted, secrets_of
from vallum.node.credentials import CredentialStore, covers
from vallum.node.door import Door
from vallum.node.live import LiveCell
from vallum.node.redaction import Redactor
from vallum.node.trust import check_roots
from vallum.rules.files import compose, parse_ruleset
from vallum.rules.grants import Rule, Ruleset, parse_host

MAX_TOOLS = 256
MAX_APPROVAL_TIMEOUT_S = 24 * 3600.0

Cause = Literal["sdk", "cli", "phase", "approval"]
"""What changed the rules: ``RulesChanged.by``."""


@dataclass(frozen=True)
class Terms:
    """What holds for one cell. Replaced as a whole, never changed."""

    control: wire.Control
    """As asked for; canaries are kept for the run."""
    rules: Ruleset
    kit: Kit
    planted: bytes = b""
    """Content of the file of false keys, where one was asked for."""


@dataclass
class RunTerms:
    """What holds for every cell of a run."""

    canaries: dict[str, bytes] = field(default_factory=dict)
    answered: list[Rule] = field(default_factory=list)
    """Rules of ``[[hold]]`` that need no asking any more."""
    authority: Authority | None = None


def digest_rules(rules: Ruleset) -> str:
    """``sha256:...`` of the rules. Pure."""
    return "sha256:" + sha256(msgspec.json.encode(rules, order="deterministic")).hexdigest()


def needs_authority(rules: Ruleset) -> bool:
    """Whether TLS or SSH of a cell may have to be ended by the gateway. Pure."""
    return any(
        (rule.reads_requests and (rule.ports is None or any("tls" in rule.protocols_for(port) for port in rule.ports)))
        or bool(rule.ssh or rule.git)
        for rule in (*rules.allow, *rules.hold, *rules.deny)
    )


def stop_asking(rules: Ruleset, answered: Iterable[Rule]) -> Ruleset:
    """The rules with some that hold turned into grants. Pure."""
    settled = [rule for rule in answered if rule in rules.hold]
    if not settled:
        return rules
    return msgspec.structs.replace(
        rules,
        hold=tuple(rule for rule in rules.hold if rule not in settled),
        allow=(*rules.allow, *settled),
    )


def pick_credentials(
    rules: Ruleset, model: Model | None, stored: Mapping[str, Credential], permitted: Sequence[str] | None
) -> tuple[Credential, ...]:
    """The credentials that the rules and the model door use, and no others. Pure.

    Raises:
        RuleError, InvalidInput: one is not stored, not permitted, or would go to a host that it is not for.
    """
    for name in permitted or ():
        if name not in stored:
            raise InvalidInput(f"there is no credential {show(name)!r}: add it with `vallum credentials add`")
    used: dict[str, Credential] = {}
    for rule in (*rules.allow, *rules.hold):
        if not rule.credential:
            continue
        target = rule.host or rule.cidr or ""
        used[rule.credential] = _find_credential(
            rule.credential, f"rule {rule.id}", target, stored, permitted, RuleError
        )
    if model is not None and model.credential:
        host = _host_of(model.upstream)
        used[model.credential] = _find_credential(
            model.credential, "the model door", host, stored, permitted, InvalidInput
        )
    return tuple(used.values())


def _find_credential(
    name: str,
    user: str,
    target: str,
    stored: Mapping[str, Credential],
    permitted: Sequence[str] | None,
    error: type[InvalidInput],
) -> Credential:
    found = stored.get(name)
    if found is None:
        raise error(
            f"{user} uses the credential {show(name)!r}, which is not stored: `vallum credentials add` it first"
        )
    if permitted is not None and name not in permitted:
        raise error(f"{user} uses the credential {name}, which this cell may not use: add it to credentials=")
    if not covers(found.hosts, target):
        raise error(
            f"{user} would send the credential {name} to {show(target)}, but it is for {', '.join(found.hosts)} only: "
            "narrow the rule, or add the credential for that host"
        )
    return found


def _host_of(upstream: str) -> str:
    try:
        host = urlsplit(upstream).hostname
    except ValueError:
        host = None
    return (parse_host(host) or host) if host else upstream


def refuse_secrets(environ: Mapping[str, str], clean: Callable[[str], str]) -> None:
    """Return when no stored secret is in a guest's environment to be.

    Raises:
        InvalidInput: names the variable and the credential, never the value.
    """
    for name, value in environ.items():
        found = clean(value)
        if found:
            raise InvalidInput(
                f"the variable {show(name)} has the secret of {found} in it: leave it out; a rule with credential= sends it "
                "without the guest having it"
            )


class Control:
    """The terms of every live cell. On one event loop."""

    def __init__(self, store: CredentialStore, redactor: Redactor, door: Door) -> None:
        self._store = store
        self._redactor = redactor
        self._guest_secrets = Redactor()
        """Stored secrets only: a canary may well be in a guest, that is what it is for."""
        self._door = door
        self._cells: dict[str, Terms] = {}
        self._runs: dict[str, RunTerms] = {}
        self._changing = asyncio.Lock()

    async def prepare(self, request: wire.CreateSandbox, run: str) -> Terms:
        """The terms of a cell that is to be made. Nothing is changed when it raises.

        Raises:
            RuleError, InvalidInput: the rules, the credentials they name or something of the kit cannot be used.
            NodeError: a credential cannot be read.
        """
        own = parse_ruleset(request.rules, request.rules_name) if request.rules is not None else None
        rules = compose(request.containment, own=own, allow=request.allow)
        control = request.control
        if not 0 < control.approval_timeout_s <= MAX_APPROVAL_TIMEOUT_S:
            raise InvalidInput(f"approval_timeout_s={control.approval_timeout_s:g} is not usable: give up to a day")
        if not control.package_min_age_s >= 0:
            raise InvalidInput(f"package_min_age_s={control.package_min_age_s:g} is not usable: give 0 or more seconds")
        canaries = check_canaries(control.canaries)
        of_run = self._runs.get(run, RunTerms())
        check_canaries({**of_run.canaries, **canaries})
        stored = await self._load()
        rules = stop_asking(rules, of_run.answered)
        used = pick_credentials(rules, control.model, stored, control.credentials)
        refuse_secrets(request.environ, self._guest_secrets.find)
        planted, baits = make_planted() if control.plant_canaries else (b"", ())
        of_run = self._runs.setdefault(run, of_run)
        of_run.canaries.update(canaries)
        registered = tuple(Canary(name=name, value=value) for name, value in of_run.canaries.items())
        self._redactor.learn(secrets_of((), (*registered, *baits)))
        if needs_authority(rules) and (of_run.authority is None or not is_fresh(of_run.authority)):
            of_run.authority = await asyncio.to_thread(make_authority, run)
        kit = Kit(
            phase=control.phase,
            agent=control.agent,
            credentials=used,
            canaries=(*registered, *baits, *guard_secrets(stored.values())),
            authority=of_run.authority if needs_authority(rules) else None,
            upstream_roots=check_roots(control.upstream_roots),
            verify_upstream=control.verify_upstream,
            model=make_model_door(control.model),
            package_min_age_s=control.package_min_age_s,
            approval_timeout_s=control.approval_timeout_s,
        )
        return Terms(msgspec.structs.replace(control, canaries={}), rules, kit, planted)

    def check_environ(self, environ: Mapping[str, str]) -> None:
        """Return when it may be given to a guest.

        Raises:
            InvalidInput: a stored secret is in it.
        """
        refuse_secrets(environ, self._guest_secrets.find)

    async def open(self, live: LiveCell, terms: Terms, home: str) -> None:
        """Have the gateway serve a cell's doors by its terms, and plant what is to be planted in the guest's ``home``.

        Raises:
            GatewayError: nobody serves them; the cell must not be used.
            GuestFileError: the false keys could not be written.
        """
        if terms.kit.phase == "setup":
            self._tell(live, terms, "sdk", 0)
        await self._door.add(live, terms.rules, terms.kit)
        self._cells[live.id] = terms
        if terms.planted:
            await self._plant(live, f"{home}/{PLANTED_FILE}", terms.planted)

    def leave(self, live: LiveCell) -> None:
        """The cell has ended."""
        self._cells.pop(live.id, None)

    def forget_run(self, run: str) -> None:
        """Nobody holds the run any more."""
        self._runs.pop(run, None)

    def terms_of(self, live: LiveCell) -> Terms:
        """What holds for a cell now.

        Raises:
            CellGone: it has ended, or has not begun.
        """
        terms = self._cells.get(live.id)
        if terms is None or live.is_closing:
            raise CellGone(f"cell {live.id} has ended")
        return terms

    async def set_phase(self, live: LiveCell, phase: wire.Phase) -> int:
        """Go from ``setup`` to ``run``; how many open flows were cut. To the phase that it is in: 0.

        Raises:
            InvalidInput: back to ``setup``.
            CellGone, GatewayError: as of :meth:`update`.
        """
        async with self._changing:
            terms = self.terms_of(live)
            if terms.kit.phase == phase:
                return 0
            if phase == "setup":
                raise InvalidInput(
                    f"cell {live.id} is in phase run: there is no way back to setup; make a new cell for it"
                )
            kit = msgspec.structs.replace(terms.kit, phase=phase)
            return await self._apply(live, replace(terms, kit=kit), "phase")

    async def update(self, cells: Sequence[LiveCell], request: wire.UpdateRules) -> wire.RulesUpdated:
        """Other rules for cells, all or none.

        Raises:
            RuleError, InvalidInput, NodeError: as :meth:`prepare`; nothing has changed.
            CellGone: one of them has ended.
            GatewayError: the gateway has gone, and the cells with it.
        """
        own = parse_ruleset(request.rules, request.rules_name) if request.rules is not None else None
        wanted = compose(request.containment, own=own, allow=request.allow)
        async with self._changing:
            stored = await self._load()
            fresh = [(live, self._revise(live, wanted, stored)) for live in cells]
            cut = 0
            for live, terms in fresh:
                cut += await self._apply(live, terms, request.by)
        return wire.RulesUpdated(cells=[live.id for live in cells], digest=digest_rules(wanted), flows_cut=cut)

    async def add_tool(self, live: LiveCell, tool: HostTool) -> None:
        """Offer a tool of the host to a cell, instead of one of the same name.

        Raises:
            InvalidInput: there are too many.
            CellGone, GatewayError: as of :meth:`update`.
        """
        async with self._changing:
            terms = self.terms_of(live)
            tools = (*(one for one in terms.kit.tools if one.name != tool.name), tool)
            if len(tools) > MAX_TOOLS:
                raise InvalidInput(f"a cell is offered {MAX_TOOLS} tools of the host at most")
            terms = replace(terms, kit=msgspec.structs.replace(terms.kit, tools=tools))
            await self._door.update(live, terms.rules, terms.kit)
            self._cells[live.id] = terms

    def find_hold(self, live: LiveCell, rule: str) -> Rule | None:
        """The rule of that id that holds actions of the cell."""
        terms = self._cells.get(live.id)
        return next((one for one in terms.rules.hold if one.id == rule), None) if terms is not None else None

    async def stop_asking(self, run: str, rule: Rule, cells: Iterable[LiveCell]) -> None:
        """What ``rule`` holds is granted in the run from now on, in its live cells and in those to come."""
        async with self._changing:
            of_run = self._runs.setdefault(run, RunTerms())
            if rule not in of_run.answered:
                of_run.answered.append(rule)
            for live in cells:
                terms = self._cells.get(live.id)
                if terms is None or live.is_closing or rule not in terms.rules.hold:
                    continue
                await self._apply(live, replace(terms, rules=stop_asking(terms.rules, [rule])), "approval")

    def _revise(self, live: LiveCell, wanted: Ruleset, stored: Mapping[str, Credential]) -> Terms:
        terms = self.terms_of(live)
        of_run = self._runs.setdefault(live.book.run, RunTerms())
        rules = stop_asking(wanted, of_run.answered)
        if needs_authority(rules) and terms.kit.authority is None:
            raise InvalidInput(
                f"the rules have the gateway read requests inside TLS, which cell {live.id} was not started for (its guest trusts "
                "no authority of ours): start a cell with rules that do, or leave methods, paths and credentials of TLS hosts out"
            )
        used = pick_credentials(rules, terms.control.model, stored, terms.control.credentials)
        kept = tuple(one for one in terms.kit.canaries if not one.name.startswith("credential."))
        kit = msgspec.structs.replace(terms.kit, credentials=used, canaries=(*kept, *guard_secrets(stored.values())))
        return replace(terms, rules=rules, kit=kit)

    async def _apply(self, live: LiveCell, terms: Terms, by: Cause) -> int:
        cut = await self._door.update(live, terms.rules, terms.kit)
        self._cells[live.id] = terms
        self._tell(live, terms, by, cut)
        return cut

    def _tell(self, live: LiveCell, terms: Terms, by: Cause, cut: int) -> None:
        live.emit(
            RulesChanged(
                t_ns=clock.wall_ns(), mono_ns=clock.mono_ns(), scope=live.scope(), attribution=BY_NODE,
                phase=terms.kit.phase, rules=terms.rules.describe(), digest=digest_rules(terms.rules), by=by, flows_cut=cut,
            )
        )  # fmt: skip

    async def _load(self) -> dict[str, Credential]:
        if not self._store.names():
            return {}
        stored = await asyncio.to_thread(self._store.load)
        found = secrets_of(stored, ())
        self._redactor.learn(found)
        self._guest_secrets.learn(found)
        return {one.name: one for one in stored}

    async def _plant(self, live: LiveCell, path: str, content: bytes) -> None:
        try:
            await live.cell.write_file(path, content, mode=0o600)
        except GuestFileError as error:
            raise GuestFileError(f"the canaries could not be planted at {path}: {error}", error.errno_name) from error
        live.emit(
            FileWrite(
                t_ns=clock.wall_ns(), mono_ns=clock.mono_ns(), scope=live.scope(), attribution=BY_NODE,
                path=path, bytes=len(content), sha256=sha256(content).hexdigest(), source="canary",
            )
        )  # fmt: skip


def make_model_door(model: Model | None) -> ModelDoor | None:
    """The model gateway of a cell, with a capability that no other cell has."""
    if model is None:
        return None
    return ModelDoor(
        upstream=model.upstream, dialect=model.dialect, capability=secrets.token_urlsafe(32), credential=model.credential,
        model=model.model, temperature=model.temperature, want_token_ids=model.want_token_ids, price=model.price,
        budget=model.budget, hosted=model.hosted, script=model.script, hold_tools=model.hold_tools,
    )  # fmt: skip
