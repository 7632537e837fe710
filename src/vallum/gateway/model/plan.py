"""A request of an agent, judged and made ready for the upstream. Pure but for the budget it takes from."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from vallum.core.messages import Message, ModelRequest, Usage, estimate_tokens
from vallum.gateway.http.canaries import BodyScanner, FoundError
from vallum.gateway.http.exchange import Headers
from vallum.gateway.kit import Canary, Credential, Kit, ModelDoor
from vallum.gateway.model.budget import OverBudgetError, Reservation, Spend
from vallum.gateway.model.client import forwarded_headers
from vallum.gateway.model.dialects import DIALECTS
from vallum.gateway.model.dialects.contract import Dialect, DialectError, Json, Route
from vallum.gateway.model.dialects.fields import parse_object, string
from vallum.gateway.model.dialects.hosted import name_hosted
from vallum.gateway.model.dialects.responses import join_input
from vallum.gateway.model.upstreams.http import HttpServer
from vallum.gateway.model.upstreams.told import Teller
from vallum.rules.grants import Rule

BYTES_PER_TOKEN = 64
"""Of an answer as it is sent, at least, where nobody has counted."""
_ENCODE = msgspec.json.Encoder().encode


class RefusedError(Exception):
    """A call is not made, or its answer is not passed on."""

    def __init__(self, status: int, rule: str, reason: str, stripped: list[str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.rule = rule
        self.reason = reason
        self.stripped = stripped or []


class Plan:
    """One call."""

    def __init__(
        self,
        *,
        door: ModelDoor,
        upstream: Teller | HttpServer,
        dialect: Dialect,
        spoken: Dialect,
        request: ModelRequest,
        raw: Json,
        sent: Json,
        stripped: list[str],
        headers: Headers,
        credential: Credential | None,
        reserved: Reservation,
        call: str,
        wants_usage: bool,
        may_be_named: bool,
        wants_events: bool,
    ) -> None:
        """``raw`` is the cleaned request in the agent's dialect, ``sent`` what the upstream gets in ``spoken``."""
        self.door = door
        self.upstream = upstream
        self.origin = upstream.origin
        self.dialect = dialect
        self.spoken = spoken
        self.request = request
        self.raw = raw
        self.sent = sent
        self.stripped = stripped
        self.headers = headers
        self.credential = credential
        self.reserved = reserved
        self.call = call
        self.model = door.model or request.model
        self.wants_usage = wants_usage
        self.may_be_named = may_be_named
        self.wants_events = wants_events
        self.outside_ns = 0
        """Time spent waiting for others: the upstream, a person."""
        self.used = Usage()
        """What the answers that came whole have used."""
        self.is_answering = False
        """An answer has begun and is not whole."""
        self.received_bytes = 0
        """Of that answer."""
        self._is_settled = False
        self._cost = 0

    @property
    def holds_all(self) -> bool:
        """Nothing may go before the whole reply was reviewed."""
        return bool(self.door.hold_tools)

    def body(self) -> bytes:
        """What the upstream is sent."""
        adjusted = self.spoken.adjust(
            self.sent,
            model=self.model,
            stream=self.request.stream,
            temperature=self.door.temperature,
            max_tokens=self.reserved.max_completion,
            token_ids=self.door.want_token_ids,
        )
        return _ENCODE(adjusted)

    def target(self) -> str:
        """Path and query at the upstream. Raises RefusedError when the model's name cannot be put there."""
        try:
            return self.spoken.target(self.model, stream=self.request.stream)
        except DialectError as error:
            raise RefusedError(400, "malformed", str(error)) from error

    def all_headers(self) -> Headers:
        """The headers that the upstream gets: the key, and what its provider demands."""
        keys = self.spoken.key_headers(self.credential.secret) if self.credential is not None else ()
        return (*keys, *(self.headers if self.spoken.name == "messages" else ()))

    def extend(self, messages: tuple[Message, ...]) -> None:
        """Go on from a reply that was not passed on."""
        self.sent = self.spoken.extend(self.sent, messages)
        self.request = msgspec.structs.replace(self.request, messages=self.request.messages + messages)

    def settle(self, spend: Spend) -> int:
        """Count what was used, once; what it cost. An answer that broke off is not free, whoever hung up."""
        if not self._is_settled:
            self._is_settled = True
            if self.is_answering:
                self.used = Usage(
                    prompt_tokens=(self.used.prompt_tokens or 0) + estimate_tokens(self.request),
                    completion_tokens=(self.used.completion_tokens or 0) + -(-self.received_bytes // BYTES_PER_TOKEN),
                    cached_tokens=self.used.cached_tokens,
                )
            self._cost = spend.settle(self.reserved, self.used, self.door.price)
        return self._cost

    def give_back(self, spend: Spend) -> None:
        """Nothing came of it."""
        if not self._is_settled:
            self._is_settled = True
            spend.give_back(self.reserved)

    def redact(self, words: str) -> str:
        """The words without the upstream's key."""
        secret = self.credential.secret.decode("latin-1") if self.credential is not None else ""
        return words.replace(secret, "***") if secret else words


def make_plan(
    kit: Kit,
    door: ModelDoor,
    upstream: Teller | HttpServer,
    route: Route,
    body: bytes,
    headers: Headers,
    call: str,
    spend: Spend,
    said: Mapping[str, tuple[list[Json], int]],
    wants_events: bool,
) -> Plan:
    """Judge a request and make its call ready; takes from ``spend``.

    Args:
        said: items of earlier responses (and their size) by id, which ``previous_response_id`` may name.

    Raises:
        RefusedError: it cannot be read, would exceed the budget, has a canary in it, or the door's credential is missing.
    """
    dialect = DIALECTS[route.dialect]
    spoken = dialect if door.dialect == "same" else DIALECTS[door.dialect]
    granted = frozenset(name_hosted(name) for name in door.hosted)
    stripped: list[str] = []
    try:
        given = parse_object(body, "the request")
        if route.dialect == "responses" and given.get("previous_response_id"):
            given = _join(given, said)
        wants_usage = _wants_usage(given)
        may_be_named = given.get("store") is not False
        raw, stripped = dialect.clean(given, granted)
        stripped = sorted(set(stripped))
        request = dialect.parse_request(raw, route)
        sent = raw if spoken is dialect else spoken.write_request(request)
    except (DialectError, RecursionError) as error:
        raise RefusedError(400, "malformed", str(error) or "the request is nested too deeply", stripped) from error
    if request.stream and not wants_events:
        request = msgspec.structs.replace(request, stream=False)
    credential = find_credential(kit, door)
    # Before anything is reserved: what is not sent costs nothing.
    passed_on = forwarded_headers(headers, granted) if spoken is dialect else forwarded_headers((), granted)
    check_canaries(kit, b"\n".join((_ENCODE(sent), request.model.encode(), *(value for _, value in passed_on))))
    try:
        reserved = spend.reserve(door.budget, door.price, estimate_tokens(request), request.max_tokens)
    except OverBudgetError as error:
        raise RefusedError(
            403, "model-budget", f"the model budget of this episode does not allow the call: {error}", stripped
        ) from error
    return Plan(
        door=door,
        upstream=upstream,
        dialect=dialect,
        spoken=spoken,
        request=request,
        raw=raw,
        sent=sent,
        stripped=stripped,
        headers=passed_on,
        credential=credential,
        reserved=reserved,
        call=call,
        wants_usage=wants_usage,
        may_be_named=may_be_named,
        wants_events=wants_events,
    )


def find_credential(kit: Kit, door: ModelDoor) -> Credential | None:
    """The door's credential; None when it needs none. Raises RefusedError when it is missing, or not for the upstream."""
    if not door.credential:
        return None
    credential = next((c for c in kit.credentials if c.name == door.credential), None)
    if credential is None:
        raise RefusedError(500, "credential", f"the credential {door.credential} of the model door is not known")
    host = urlsplit(door.upstream).hostname or ""
    if not any(pattern == host or Rule(id="", host=pattern).matches_name(host) for pattern in credential.hosts):
        raise RefusedError(
            500, "credential", f"the credential {door.credential} is not for {host}, so nothing was sent"
        )
    return credential


def check_canaries(kit: Kit, body: bytes) -> bytes:
    """The body, if no canary is in it as JSON writes it. Raises RefusedError."""
    if not kit.canaries:
        return body
    # In JSON a value of several lines, or with quotes, is written otherwise.
    escaped = tuple(
        Canary(name=canary.name, value=written)
        for canary in kit.canaries
        if (written := _ENCODE(canary.value.decode("utf-8", "replace"))[1:-1]) != canary.value
    )
    scanner = BodyScanner((*kit.canaries, *escaped))
    try:
        scanner.feed(body)
        scanner.finish()
    except FoundError as error:
        raise RefusedError(403, error.decision.rule, error.decision.reason) from error
    return body


def _join(given: Json, said: Mapping[str, tuple[list[Json], int]]) -> Json:
    previous = string(given["previous_response_id"], "previous_response_id")
    earlier = said.get(previous)
    if earlier is None:
        raise DialectError("previous_response_id names no response that this gateway kept: send the whole input")
    return join_input(given, earlier[0])


def _wants_usage(given: Json) -> bool:
    options = given.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True
