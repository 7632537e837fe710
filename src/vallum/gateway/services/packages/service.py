"""Answers requests to package indexes and for package files; everything else is forwarded as it is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import zlib
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import unquote, urljoin
from weakref import WeakKeyDictionary

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.events import PackageFetched
from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import GatewayCell
from vallum.gateway.http.client1 import ResponseHead, Upstream, UpstreamError, Upstreams
from vallum.gateway.http.exchange import Carrier, DeniedError, Exchange, Headers, RequestHead
from vallum.gateway.http.redaction import Masker
from vallum.gateway.services.forward import Forward, prepare_request, spend
from vallum.gateway.services.packages.base import Digests, Ecosystem, Reading, UnreadableError, Vouch, locate
from vallum.gateway.services.packages.book import AGE_RULE, book_of, judge_age, judge_digest, show_age
from vallum.gateway.services.packages.debian import Debian
from vallum.gateway.services.packages.npm import Npm
from vallum.gateway.services.packages.pypi import Pypi
from vallum.gateway.services.packages.store import Store
from vallum.rules.budgets import Usage

ECOSYSTEMS: tuple[Ecosystem, ...] = (Debian(), Pypi(), Npm())
MAX_INDEX_BYTES = 64 * 1024 * 1024
SPOOL_BYTES = 256 * 1024
"""A file up to this size is checked before its answer begins, so that a refusal can be read."""
INDEXES_AT_ONCE = 8
"""Indexes in memory at once, of one cell."""
_PIECE = 256 * 1024
_CONDITIONS = frozenset({
    *(b"range", b"if-range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"),
    *(b"accept-encoding", b"te"),
})  # fmt: skip
_PRIVATE = frozenset({b"authorization", b"cookie", b"proxy-authorization"})
_CHANGED = frozenset({b"etag", b"last-modified", b"content-encoding", b"content-md5", b"digest", b"content-digest"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_NOT_PLAIN = Decision(
    verdict="deny",
    rule="package-request",
    reason="packages and their indexes are asked for by GET or HEAD, without a body or an upgrade",
)

log = logging.getLogger(__name__)


_indexes: WeakKeyDictionary[GatewayCell, asyncio.Semaphore] = WeakKeyDictionary()


class _Shared:
    """What all flows of this process share."""

    store: Store | None = None
    salt = secrets.token_bytes(32)
    """New with each process: what a credential was for is not told by names on the disk."""


def use_cache(directory: int) -> None:
    """Keep files in this directory (a descriptor, ours from now on). Raises OSError: it cannot be read."""
    _Shared.store = Store(directory)


def make_service(carrier: Carrier) -> Packages:
    """The service for one flow."""
    return Packages(carrier)


class Packages:
    """See :class:`~vallum.gateway.http.exchange.Service`."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._upstreams = Upstreams(carrier)
        self._forward = Forward(carrier)

    def close(self) -> None:
        """As :meth:`Service.close`."""
        self._upstreams.close()
        self._forward.close()

    async def serve(self, exchange: Exchange) -> None:
        """As :meth:`Service.serve`."""
        head, cell = exchange.head, self._carrier.cell
        url = url_of(head)
        known = book_of(cell).find(url)
        path = unquote(head.path)
        vouch = known or next((guess for one in ECOSYSTEMS if (guess := one.guess(path)) is not None), None)
        index = next((one for one in ECOSYSTEMS if one.is_index(head)), None)
        if not is_plain(head):
            # An answer to it would be a package all the same, and nobody would have looked at it.
            if vouch is not None or (index is not None and head.method == "GET"):
                raise DeniedError(_NOT_PLAIN)
            await self._forward.serve(exchange)
            return
        if known is not None and known.kind == "index":
            index = next(one for one in ECOSYSTEMS if one.name == known.ecosystem)
        elif vouch is not None:
            self._judge_age(vouch, is_known=known is not None)
            index = None
        if head.method == "HEAD" or (index is None and vouch is None):
            await self._forward.serve(exchange)
        elif index is not None:
            await self._serve_index(exchange, index, known)
        elif vouch is not None:
            await self._serve_file(exchange, vouch)

    def _judge_age(self, vouch: Vouch, *, is_known: bool) -> None:
        min_age_s = self._carrier.cell.kit.package_min_age_s
        if min_age_s <= 0 or not any(one.has_ages for one in ECOSYSTEMS if one.name == vouch.ecosystem):
            return
        denial = judge_age(vouch, is_known=is_known, min_age_s=min_age_s, now_ns=wall_ns())
        if denial is not None:
            raise DeniedError(denial)

    # Indexes

    async def _serve_index(self, exchange: Exchange, index: Ecosystem, vouch: Vouch | None) -> None:
        """Read all of an index's answer, learn what it vouches for, and give it on without what is too young."""
        free = _indexes.setdefault(self._carrier.cell, asyncio.Semaphore(INDEXES_AT_ONCE))
        head, min_age_s = exchange.head, self._carrier.cell.kit.package_min_age_s
        needs_ages = min_age_s > 0 and index.has_ages
        headers = index.prepare(unconditional(head.headers), needs_ages=needs_ages)
        async with free, self._ask(exchange, headers) as (upstream, answer, masker):
            if answer.status != 200:
                await self._pass_back(exchange, upstream, answer, masker)
                return
            body = await self._read_index(exchange, upstream, answer, masker)
            if vouch is not None:
                denial = judge_digest(vouch, compute(body, vouch.digests))
                if denial is not None:
                    raise DeniedError(denial)
            content_type = header_of(answer, b"content-type")
            accept = (head.header(b"accept") or b"").decode("latin-1")
            newest_ns = wall_ns() - int(min_age_s * 1e9) if needs_ages else None
            url = url_of(head)
            try:
                reading = await asyncio.to_thread(
                    index.read, url, content_type, body, accept=accept, newest_ns=newest_ns
                )
            except UnreadableError as error:
                log.info("cell %s: %s: %s", self._carrier.cell.id, show(url), error)
                reading = Reading(vouches={})
            if reading.hidden and not reading.kept:
                reason = f"every version in {show(url)} is younger than {show_age(min_age_s)}"
                raise DeniedError(Decision(verdict="deny", rule=AGE_RULE, reason=reason))
            book_of(self._carrier.cell).learn(head.host, reading)
            await self._give_index(exchange, answer, body, reading)

    async def _read_index(self, exchange: Exchange, upstream: Upstream, answer: ResponseHead, masker: Masker) -> bytes:
        coding = header_of(answer, b"content-encoding")
        inflater = zlib.decompressobj(31) if coding in {"gzip", "x-gzip"} else None
        if coding not in {"", "identity"} and inflater is None:
            raise UpstreamError(f"the index answered in {show(coding)}, which was not asked for")
        body = bytearray()
        async for piece in upstream.read_body():
            spend(self._carrier.cell, exchange, Usage(bytes_in=len(piece)))
            try:
                body += inflater.decompress(piece, MAX_INDEX_BYTES) if inflater is not None else piece
            except zlib.error as error:
                raise UpstreamError(f"the index's answer cannot be decompressed ({error})") from error
            if len(body) > MAX_INDEX_BYTES or (inflater is not None and inflater.unconsumed_tail):
                raise UpstreamError(f"the index's answer has more than {MAX_INDEX_BYTES} bytes")
        self._upstreams.keep(exchange.head.scheme, exchange.head.host, upstream)
        return masker.feed(bytes(body)) + masker.finish()

    async def _give_index(self, exchange: Exchange, answer: ResponseHead, body: bytes, reading: Reading) -> None:
        headers = tuple(pair for pair in given(answer.headers) if pair[0] not in _CHANGED)
        if reading.body is not None:
            body = reading.body
            headers = tuple(pair for pair in headers if pair[0] != b"content-type")
            headers = (*headers, (b"content-type", reading.content_type))
        await exchange.start(200, headers, length=len(body))
        for at in range(0, len(body), _PIECE):
            await exchange.send(body[at : at + _PIECE])
        await exchange.end()

    # Files

    async def _serve_file(self, exchange: Exchange, vouch: Vouch) -> None:
        name = self._name_in_store(exchange, vouch)
        store = _Shared.store
        if store is not None and name:
            found = await store.open(name, vouch.digests)
            if found is not None:
                await self._give_kept(exchange, vouch, *found)
                return
        async with self._ask(exchange, unconditional(exchange.head.headers)) as (upstream, answer, masker):
            if answer.status != 200:
                self._follow(exchange.head, answer, vouch)
                await self._pass_back(exchange, upstream, answer, masker)
                return
            if header_of(answer, b"content-encoding") not in {"", "identity"}:
                raise UpstreamError("the server compressed a file although it was asked not to")
            caching = header_of(answer, b"cache-control").lower()
            is_kept = store is not None and name and not ("no-store" in caching or "private" in caching)
            await self._give_fetched(exchange, vouch, upstream, answer, masker, name if is_kept else "")

    async def _give_fetched(
        self,
        exchange: Exchange,
        vouch: Vouch,
        upstream: Upstream,
        answer: ResponseHead,
        masker: Masker,
        name: str,
    ) -> None:
        """Give a file on while its digests are computed; its last piece only when they are right and it is recorded."""
        head = exchange.head
        hashes = {one: hashlib.new(one, usedforsecurity=False) for one in {"sha256", *dict(vouch.digests)}}
        part = _Shared.store.begin() if name and _Shared.store is not None else None
        held, total, has_started = bytearray(), 0, False
        headers = given(answer.headers)
        try:
            async for raw in upstream.read_body():
                spend(self._carrier.cell, exchange, Usage(bytes_in=len(raw)))
                if len(held) > SPOOL_BYTES:
                    if not has_started:
                        await exchange.start(200, headers, length=answer.length)
                        has_started = True
                    await exchange.send(bytes(held))
                    held.clear()
                piece = masker.feed(raw)
                for one in hashes.values():
                    one.update(piece)
                if part is not None:
                    await part.write(piece)
                held += piece
                total += len(piece)
            last = masker.finish()
            for one in hashes.values():
                one.update(last)
            held += last
            total += len(last)
            denial = judge_digest(vouch, {algorithm: one.hexdigest() for algorithm, one in hashes.items()})
            if denial is not None:
                raise DeniedError(denial)
            self._upstreams.keep(head.scheme, head.host, upstream)
            if part is not None:
                await part.write(last)
                await part.commit(name)
            await self._record(vouch, f"sha256:{hashes['sha256'].hexdigest()}", total, "index")
        finally:
            if part is not None:
                part.discard()
        if not has_started:
            await exchange.start(200, headers, length=answer.length)
        await exchange.send(bytes(held))
        await exchange.end()

    async def _give_kept(self, exchange: Exchange, vouch: Vouch, fd: int, size: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as file:
            known = dict(vouch.digests)
            digits = known.get("sha256") or await asyncio.to_thread(_compute_file, fd)
            await self._record(vouch, f"sha256:{digits}", size, "cache")
            headers = ((b"content-type", b"application/octet-stream"),)
            await exchange.start(200, headers, length=size)
            while piece := await asyncio.to_thread(file.read, _PIECE):
                spend(self._carrier.cell, exchange, Usage(bytes_in=len(piece)))
                await exchange.send(piece)
            await exchange.end()

    def _name_in_store(self, exchange: Exchange, vouch: Vouch) -> str:
        """Under which name a file is kept; empty where it must not be: forgeable, or the guest's own credential is asked with."""
        head, kit = exchange.head, self._carrier.cell.kit
        if not vouch.strong or any(name in _PRIVATE for name, _ in head.headers):
            return ""
        rule = self._carrier.cell.rules.find(exchange.decision.rule)
        whose = b""
        if rule is not None and rule.credential:
            secret = next((one.secret for one in kit.credentials if one.name == rule.credential), None)
            if secret is None:
                return ""
            whose = hmac.digest(_Shared.salt, rule.credential.encode() + b"\0" + secret, "sha256")
        if kit.upstream_roots:
            # Who trusts other authorities is given what these vouch for; others are not.
            whose += hashlib.sha256(kit.upstream_roots).digest()
        url = f"{head.scheme}://{head.host}:{head.port}{head.target}"
        return hashlib.sha256(b"\0".join((whose, url.encode(), vouch.strong.encode()))).hexdigest()

    def _follow(self, head: RequestHead, answer: ResponseHead, vouch: Vouch) -> None:
        """What is vouched for at one URL is vouched for where its server sends the guest to."""
        location = header_of(answer, b"location")
        if answer.status in _REDIRECTS and location:
            with contextlib.suppress(ValueError):
                target = locate(urljoin(url_of(head), location))
                if book_of(self._carrier.cell).find(url_of(head)) is not None:
                    book_of(self._carrier.cell).vouch(head.host, target, vouch)

    async def _record(self, vouch: Vouch, digest: str, size: int, source: Literal["index", "cache"]) -> None:
        """Write who was given what. Raises NodeGoneError: it was not written; nothing more may be given."""
        if vouch.kind != "package":
            return
        owner = await self._carrier.owner()
        cell = self._carrier.cell
        event = PackageFetched(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=owner.scope,
            attribution=owner.attribution,
            ecosystem=vouch.ecosystem,
            name=show(vouch.name),
            version=show(vouch.version),
            digest=digest,
            bytes=size,
            source=source,
            flow=self._carrier.id,
            published_ns=vouch.published_ns,
        )
        await cell.node.append(cell.id, event)

    # The server

    @contextlib.asynccontextmanager
    async def _ask(self, exchange: Exchange, headers: Headers) -> AsyncIterator[tuple[Upstream, ResponseHead, Masker]]:
        """Send the request (which has no body); its answer, and what masks the credential that was sent with it."""
        head = exchange.head
        complete, masker = prepare_request(self._carrier.cell, exchange, (*headers, (b"accept-encoding", b"identity")))
        upstream, was_used = await self._upstreams.open(head.scheme, head.host)
        try:
            try:
                answer = await self._send(upstream, head, complete)
            except OSError as error:
                if not was_used or isinstance(error, TimeoutError):
                    raise
                self._upstreams.release(upstream)
                upstream, _ = await self._upstreams.open(head.scheme, head.host, fresh=True)
                answer = await self._send(upstream, head, complete)
            yield upstream, answer, masker
        finally:
            self._upstreams.release(upstream)

    async def _send(self, upstream: Upstream, head: RequestHead, headers: Headers) -> ResponseHead:
        await upstream.send_head(head.method, head.target, headers)
        await upstream.end_body()
        answer = await upstream.read_head()
        if answer.status in {101, 206, 304} or 200 < answer.status < 300:
            raise UpstreamError(f"the server answered {answer.status} to a plain request")
        return answer

    async def _pass_back(self, exchange: Exchange, upstream: Upstream, answer: ResponseHead, masker: Masker) -> None:
        headers = tuple((name, masker.mask(value)) for name, value in given(answer.headers))
        await exchange.start(answer.status, headers, length=answer.length)
        async for piece in upstream.read_body():
            spend(self._carrier.cell, exchange, Usage(bytes_in=len(piece)))
            await exchange.send(masker.feed(piece))
        await exchange.send(masker.finish())
        self._upstreams.keep(exchange.head.scheme, exchange.head.host, upstream)
        await exchange.end()


def url_of(head: RequestHead) -> str:
    """The URL of a request, as :func:`~vallum.gateway.services.packages.base.locate` writes it."""
    host = f"[{head.host}]" if ":" in head.host else head.host
    return locate(f"{head.scheme}://{host}:{head.port}{head.target}")


def is_plain(head: RequestHead) -> bool:
    """Whether a request asks for something and sends nothing."""
    return head.method in {"GET", "HEAD"} and not head.upgrade and not head.length and not head.streamed


def unconditional(headers: Headers) -> Headers:
    """Headers that ask for the whole of it: a part has no digest, and what is not changed would not be seen here."""
    return tuple(pair for pair in headers if pair[0] not in _CONDITIONS)


def given(headers: Headers) -> Headers:
    """An answer's headers as they are given on: what says that a rule refused something is for us to say."""
    return tuple(pair for pair in headers if pair[0] not in {b"x-vallum-rule", b"accept-ranges"})


def header_of(answer: ResponseHead, name: bytes) -> str:
    """The first header of that name; empty when there is none."""
    return next((value.decode("latin-1").strip() for key, value in answer.headers if key == name), "")


def compute(body: bytes, digests: Digests) -> dict[str, str]:
    """The digests of ``body`` by these algorithms."""
    return {algorithm: hashlib.new(algorithm, body, usedforsecurity=False).hexdigest() for algorithm, _ in digests}


def _compute_file(fd: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(fd, _PIECE, offset):
        offset += len(data)
        digest.update(data)
    return digest.hexdigest()
