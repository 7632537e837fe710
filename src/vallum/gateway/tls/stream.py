"""TLS over any stream, by the TLS library on memory buffers: it reads and writes no socket itself.

Covered: one piece is held per direction, however fast one side sends. A stream that is cut off without close_notify has
ended, or broke, as the context's ``OP_IGNORE_UNEXPECTED_EOF`` says. Not covered: half-closed TLS (after :meth:`TlsStream.finish` what still comes may be lost).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from vallum.gateway.stream import PIECE, Stream


class TlsStream:
    """A :class:`~vallum.gateway.stream.Stream` inside TLS. Call :meth:`shake_hands` first, once."""

    def __init__(self, below: Stream, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """``server_name`` None is the server's side."""
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._flushing = asyncio.Lock()

    @property
    def alpn(self) -> str:
        """The protocol that both sides chose; empty when they did not."""
        return self._tls.selected_alpn_protocol() or ""

    @property
    def version(self) -> str:
        """As ``TLSv1.3``; empty before the handshake."""
        return self._tls.version() or ""

    @property
    def peer_certificate(self) -> bytes:
        """DER of the other side's certificate; empty when it showed none."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def shake_hands(self) -> None:
        """Finish the handshake. What the TLS library has to say about a failure is sent to the other side.

        Raises:
            OSError: it failed (``ssl.SSLError`` is one) or the connection broke.
        """
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._fill()
                else:
                    await self._flush()
                    return
        except ssl.SSLError:
            with contextlib.suppress(OSError):
                await self._flush()
            raise

    async def recv(self, limit: int = PIECE) -> bytes:
        """As :meth:`Stream.recv`."""
        while True:
            try:
                data = self._tls.read(limit)
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            else:
                if self._outgoing.pending:
                    await self._flush()
                return data

    async def send(self, data: bytes) -> None:
        """As :meth:`Stream.send`."""
        view = memoryview(data)
        for at in range(0, len(view), PIECE):
            self._tls.write(view[at : at + PIECE])
            await self._flush()

    async def finish(self) -> None:
        """As :meth:`Stream.finish`."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLError):  # it would wait for the other side's; ours is written
                self._tls.unwrap()
            await self._flush()
            await self._below.finish()

    def close(self) -> None:
        """As :meth:`Stream.close`."""
        self._below.close()

    def abort(self) -> None:
        """As :meth:`Stream.abort`."""
        self._below.abort()

    async def _fill(self) -> None:
        data = await self._below.recv()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        """Send what the TLS library has to say. Records leave in the order in which they were made."""
        if not self._outgoing.pending:
            return
        async with self._flushing:
            data = self._outgoing.read()
            if data:
                await self._below.send(data)
