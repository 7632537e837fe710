"""A server that speaks one of the dialects, over HTTP/1.1.

Covered: TLS is verified; nothing of the agent's own headers goes out; no retry is made; connections are kept for one
cell only. Not covered: proxies between gateway and server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from vallum.core.errors import InvalidInput
from vallum.gateway.http.client1 import Upstream, UpstreamError
from vallum.gateway.http.exchange import Headers
from vallum.gateway.relay import Counters
from vallum.gateway.stream import SocketStream, Stream
from vallum.gateway.tls.upstream import connect_tls

CONNECT_S = 10.0
KEPT_S = 4.0
"""How long a connection is kept idle: many servers close theirs after five seconds."""
MAX_KEPT = 32


class HttpAnswer:
    """An answer whose body is still to be read. Close it."""

    def __init__(self, status: int, headers: Headers, upstream: Upstream, server: HttpServer) -> None:
        self.status = status
        self.headers = headers
        self._upstream: Upstream | None = upstream
        self._server = server

    def header(self, name: bytes) -> bytes:
        """The first header of that name (lower case), or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes. Raises OSError when it breaks off."""
        assert self._upstream is not None
        async for piece in self._upstream.read_body():
            yield piece
        self._server.keep(self._upstream)
        self._upstream = None

    async def read(self, limit: int) -> bytes:
        """All of the body. Raises UpstreamError when it has more than ``limit`` bytes, OSError when it breaks off."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise UpstreamError(f"the upstream's answer has more than {limit} bytes")
        return bytes(body)

    def close(self) -> None:
        """Let go of the connection, if the body was not read to its end."""
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None


class HttpServer:
    """One server, for one cell."""

    def __init__(self, base: str, roots_pem: bytes) -> None:
        """Take the base URL apart.

        Raises:
            InvalidInput: it is none.
        """
        try:
            parts = urlsplit(base)
            port = parts.port
        except ValueError as error:
            raise InvalidInput(f"the model's upstream {base!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise InvalidInput(f"the model's upstream {base!r} is no URL as https://host[:port][/prefix]")
        self._tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._roots = roots_pem
        self._kept: list[tuple[float, Upstream]] = []
        self._is_closed = False
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._authority = host if port is None else f"{host}:{port}"
        self.origin = f"{parts.scheme}://{self._authority}"

    async def ask(self, method: str, target: str, headers: Headers, body: bytes) -> HttpAnswer:
        """Send a request; its answer's head.

        Raises:
            OSError: it cannot be reached, its certificate cannot be accepted, or it answered nothing that can be read.
        """
        upstream = await self._open()
        try:
            framing: Headers = ((b"content-length", b"%d" % len(body)),) if method == "POST" else ()
            kind: Headers = ((b"content-type", b"application/json"),) if method == "POST" else ()
            fixed: Headers = ((b"host", self._authority.encode()), (b"accept-encoding", b"identity"))
            every = (*fixed, *kind, *headers, *framing)
            await upstream.send_whole(method, self._target(target), every, body)
            head = await upstream.read_head()
        except BaseException:
            upstream.close()
            raise
        answer = HttpAnswer(head.status, head.headers, upstream, self)
        if answer.header(b"content-encoding") not in (b"", b"identity"):
            answer.close()
            raise UpstreamError("the upstream compressed its answer although it was asked not to")
        return answer

    def keep(self, upstream: Upstream) -> None:
        """An exchange is over: keep the connection if it can be."""
        upstream.settle()
        if upstream.is_fresh and len(self._kept) < MAX_KEPT and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._kept.append((loop.time(), upstream))
            loop.call_later(KEPT_S + 0.1, self._expire)
        else:
            upstream.close()

    def close(self) -> None:
        """Close what is kept, and keep nothing more."""
        self._is_closed = True
        for _, upstream in self._kept:
            upstream.close()
        self._kept.clear()

    def _expire(self) -> None:
        oldest = asyncio.get_running_loop().time() - KEPT_S
        for kept in [kept for kept in self._kept if kept[0] < oldest]:
            self._kept.remove(kept)
            kept[1].close()

    def _target(self, target: str) -> str:
        # Bases are written with the version and without.
        for version in ("/v1", "/v1beta"):
            if self._prefix.endswith(version) and target.startswith(f"{version}/"):
                return self._prefix + target.removeprefix(version)
        return self._prefix + target

    async def _open(self) -> Upstream:
        now = asyncio.get_running_loop().time()
        while self._kept:
            since, upstream = self._kept.pop()
            if now - since < KEPT_S and upstream.is_fresh:
                return upstream
            upstream.close()
        sock = await self._connect()
        try:
            stream: Stream = SocketStream(sock)
            if self._tls:
                stream = await connect_tls(sock, server_name=self._host, roots_pem=self._roots)
        except BaseException:
            sock.close()
            raise
        return Upstream(sock, stream, Counters())

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        failure: OSError = UpstreamError(f"{self._host} has no address")
        async with asyncio.timeout(CONNECT_S):
            for family, kind, proto, _, address in await loop.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            ):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, proto)
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    await loop.sock_connect(sock, address)
                except OSError as error:
                    sock.close()
                    failure = error
                except BaseException:
                    sock.close()
                    raise
                else:
                    return sock
        raise failure
