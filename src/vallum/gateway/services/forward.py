"""Forwards requests to the granted server, over HTTP/1.1, with the grant's credential if it has one.

Covered: canaries in head and body are looked for before they leave; a credential goes only to hosts that it is for,
replaces what the guest sent in its place, and is masked where the server sends it back in plain sight; memory is
bounded in both directions. Not covered: a credential that a server sends back encoded in another way or compressed
although it was asked not to compress.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell
from vallum.gateway.http.canaries import BodyScanner, FoundError, scan_head
from vallum.gateway.http.client1 import ResponseHead, Upstream, UpstreamError, Upstreams
from vallum.gateway.http.exchange import Carrier, DeniedError, Exchange, Headers, RequestHead
from vallum.gateway.http.redaction import Masker
from vallum.gateway.http.websocket import FrameError, accept_of, check_key, relay_frames, without_extensions
from vallum.gateway.kit import Credential, Kit
from vallum.gateway.spending import purse_of
from vallum.rules.budgets import Usage
from vallum.rules.grants import Rule

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""RFC 9110, section 9.2.2."""


def make_service(carrier: Carrier) -> Forward:
    """The service for one flow."""
    return Forward(carrier)


def find_credential(kit: Kit, rule: Rule | None, host: str) -> Credential | None:
    """The credential that the grant puts into requests to ``host``; None when it has none.

    Raises:
        DeniedError: it names one that there is not, or that is not for this host.
    """
    if rule is None or not rule.credential:
        return None
    for credential in kit.credentials:
        if credential.name == rule.credential:
            if any(Rule(id="", host=pattern).matches_name(host) or pattern == host for pattern in credential.hosts):
                return credential
            reason = f"the credential {show(credential.name)} is not for {show(host)}, so the request was not sent"
            raise DeniedError(Decision(verdict="deny", rule="credential", reason=reason))
    reason = f"the credential {show(rule.credential)} of the grant is not known, so the request was not sent"
    raise DeniedError(Decision(verdict="deny", rule="credential", reason=reason))


def inject(headers: Headers, credential: Credential) -> tuple[Headers, tuple[bytes, ...]]:
    """Headers with the credential in place of what the guest sent there, and what must not come back."""
    if credential.header == "basic":
        name, value = b"authorization", b"Basic " + base64.b64encode(credential.secret)
    else:
        name, value = credential.header.lower().encode(), credential.prefix.encode() + credential.secret
    # An answer that is not compressed can be searched for the secret.
    kept = [pair for pair in headers if pair[0] not in {name, b"accept-encoding"}]
    secrets = (credential.secret, *(part for part in credential.secret.split(b":", 1) if credential.header == "basic"))
    return (*kept, (b"accept-encoding", b"identity"), (name, value)), secrets


def write_headers(head: RequestHead, headers: Headers, *, default_port: int) -> Headers:
    """All headers of the request as it is sent: Host first, then the guest's, then the framing of its body."""
    host = f"[{head.host}]" if ":" in head.host else head.host
    if head.port != default_port:
        host = f"{host}:{head.port}"
    framing: Headers = ()
    if head.length is not None:
        framing = ((b"content-length", b"%d" % head.length),)
    elif head.streamed:
        framing = ((b"transfer-encoding", b"chunked"),)
    return ((b"host", host.encode()), *headers, *framing)


def prepare_request(cell: GatewayCell, exchange: Exchange, headers: Headers) -> tuple[Headers, Masker]:
    """All headers of a request that may leave, made of ``headers``, and what masks its credential in the answer.

    Raises:
        DeniedError: a canary is in the request's head, or the grant's credential may not go there.
    """
    head = exchange.head
    try:
        line = [head.method.encode(), head.host.encode(), head.target.encode()]
        scan_head(cell.kit.canaries, [*line, *(name + b": " + value for name, value in head.headers)])
    except FoundError as error:
        raise DeniedError(error.decision) from error
    credential = find_credential(cell.kit, cell.rules.find(exchange.decision.rule), head.host)
    masker = Masker(())
    if credential is not None:
        headers, secrets = inject(headers, credential)
        masker = Masker(secrets)
        exchange.tally.credential = credential.name
    return write_headers(head, headers, default_port=443 if head.scheme == "https" else 80), masker


def spend(cell: GatewayCell, exchange: Exchange, usage: Usage) -> None:
    """Count what is used against the budget of the request's grant. Raises DeniedError when that is used up."""
    denial = purse_of(cell).spend(cell.rules.find(exchange.decision.rule), usage)
    if denial is not None:
        raise DeniedError(denial)


class Forward:
    """See :class:`~vallum.gateway.http.exchange.Service`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._upstreams = Upstreams(carrier)

    def close(self) -> None:
        """As :meth:`Service.close`."""
        self._upstreams.close()

    async def serve(self, exchange: Exchange) -> None:
        """As :meth:`Service.serve`."""
        head = exchange.head
        rule = self._carrier.cell.rules.find(exchange.decision.rule)
        headers, masker = prepare_request(self._carrier.cell, exchange, head.headers)
        has_body = head.streamed or bool(head.length)
        if head.upgrade == "websocket" and rule is not None and rule.websocket:
            await self._open_websocket(exchange, headers, masker)
            return
        try:
            await self._attempt(exchange, headers, masker, fresh=False)
        except _StaleError:
            if has_body or head.method not in IDEMPOTENT:
                raise
            await self._attempt(exchange, headers, masker, fresh=True)

    async def _attempt(self, exchange: Exchange, headers: Headers, masker: Masker, *, fresh: bool) -> None:
        head = exchange.head
        upstream, was_used = await self._upstreams.open(head.scheme, head.host, fresh=fresh)
        sending: asyncio.Task[None] | None = None
        try:
            try:
                await upstream.send_head(head.method, head.target, headers)
                sending = asyncio.create_task(self._send_body(exchange, upstream))
                answer = await self._await_head(upstream, sending)
            except OSError as error:
                if was_used and not isinstance(error, TimeoutError):
                    raise _StaleError(str(error)) from error
                raise
            await self._pass_back(exchange, upstream, answer, masker)
            # An answer may come before the end of the body; then nobody wants the rest of it.
            if sending.done():
                sending.result()
                self._upstreams.keep(head.scheme, head.host, upstream)
        finally:
            if sending is not None and not sending.done():
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sending
            self._upstreams.release(upstream)

    async def _open_websocket(self, exchange: Exchange, headers: Headers, masker: Masker) -> None:
        head, kit = exchange.head, self._carrier.cell.kit
        key = check_key(head)
        if key is None:
            reason = "the opening handshake of the WebSocket is malformed"
            raise DeniedError(Decision(verdict="deny", rule="malformed", reason=reason))
        asked = (*without_extensions(headers), (b"connection", b"upgrade"), (b"upgrade", b"websocket"))
        upstream, _ = await self._upstreams.open(head.scheme, head.host, fresh=True)
        try:
            await upstream.send_head(head.method, head.target, asked)
            await upstream.end_body()
            answer = await upstream.read_head()
            if answer.status != 101:
                await self._pass_back(exchange, upstream, answer, masker)
                return
            accepts = [value for name, value in answer.headers if name == b"sec-websocket-accept"]
            names = {name for name, _ in answer.headers}
            if accepts != [accept_of(key)] or b"sec-websocket-extensions" in names:
                raise UpstreamError("the server did not finish the handshake of a WebSocket")
            guest = await exchange.switch(tuple((name, masker.mask(value)) for name, value in answer.headers))
            server = upstream.switch()
            try:
                await relay_frames(
                    *(guest, server, kit.canaries, exchange.tally),
                    lambda out, into: self._spend(exchange, Usage(bytes_out=out, bytes_in=into)),
                )
            except FoundError as error:
                raise DeniedError(error.decision) from error
            except FrameError as error:
                reason = f"the WebSocket ended: {error}"
                raise DeniedError(Decision(verdict="deny", rule="malformed", reason=reason)) from error
        finally:
            self._upstreams.release(upstream)

    async def _await_head(self, upstream: Upstream, sending: asyncio.Task[None]) -> ResponseHead:
        """The answer's head, unless sending the body fails first of what the guest did."""
        reading = asyncio.create_task(upstream.read_head())
        try:
            await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
            # Looked at first: a server that answers at once does not make up for a body that must not be sent.
            error = sending.exception() if sending.done() else None
            if error is not None and not isinstance(error, OSError):
                raise error
            if not reading.done():
                # The server may have closed its ear and answered nevertheless.
                await asyncio.wait({reading})
            return reading.result()
        finally:
            if not reading.done():
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading

    async def _send_body(self, exchange: Exchange, upstream: Upstream) -> None:
        scanner = BodyScanner(self._carrier.cell.kit.canaries)
        try:
            async for piece in exchange.body():
                await self._send_piece(exchange, upstream, scanner.feed(piece))
            await self._send_piece(exchange, upstream, scanner.finish())
        except FoundError as error:
            raise DeniedError(error.decision) from error
        await upstream.end_body()

    async def _send_piece(self, exchange: Exchange, upstream: Upstream, data: bytes) -> None:
        if not data:
            return
        self._spend(exchange, Usage(bytes_out=len(data), request_bytes=exchange.tally.bytes_out + len(data)))
        await upstream.send_body(data)
        exchange.tally.bytes_out += len(data)

    def _spend(self, exchange: Exchange, usage: Usage) -> None:
        spend(self._carrier.cell, exchange, usage)

    async def _pass_back(self, exchange: Exchange, upstream: Upstream, answer: ResponseHead, masker: Masker) -> None:
        if answer.status == 101:
            raise UpstreamError("the server switched to another protocol, which nobody asked for")
        # What says that a rule refused something is for us to say.
        kept = [pair for pair in answer.headers if pair[0] != b"x-vallum-rule"]
        headers = tuple((name, masker.mask(value)) for name, value in kept)
        await exchange.start(answer.status, headers, length=answer.length)
        async for piece in upstream.read_body():
            self._spend(exchange, Usage(bytes_in=len(piece)))
            await exchange.send(masker.feed(piece))
        await exchange.send(masker.finish())
        await exchange.end()


class _StaleError(OSError):
    """A connection that was kept had ended meanwhile."""
