"""The far side of the closed world: every fake at its address, and their counts on request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket

import msgspec

from vallum.arena import geography
from vallum.arena.world import Facts
from vallum.core.errors import NodeError
from vallum.testing.fakes import (
    DatagramSink,
    DnsServer,
    Fake,
    InternalHosts,
    MetadataService,
    PackageMirror,
    Received,
    Sshd,
    StratumPool,
)
from vallum.testing.fakes.mirror import PACKAGE, TOY

BULK = "bulk.bin"
BULK_BYTES = 16 * 1024 * 1024
"""Something large to download, for the gateway bench."""


class FarSide:
    """The fakes of one world."""

    def __init__(self) -> None:
        ports = (geography.POOL_PORT, geography.POOL_DISGUISED_PORT, geography.POOL_DAEMON_PORT)
        self.sshd = Sshd([geography.TUNNEL])
        self.metadata = MetadataService(geography.METADATA)
        self.mirror = PackageMirror([geography.MIRROR], {PACKAGE: TOY, BULK: bytes(BULK_BYTES)})
        self.names = DnsServer([geography.NAME_SERVER], geography.ZONE)
        self.fakes: list[Fake] = [
            StratumPool([(geography.POOL, port) for port in ports]),
            self.sshd,
            InternalHosts(geography.INTERNAL_HOSTS),
            self.metadata,
            self.mirror,
            self.names,
            DatagramSink([geography.BEACON]),
        ]

    def facts(self) -> Facts:
        """What the near side is told."""
        return Facts(
            login=self.sshd.login,
            client_key=self.sshd.client_key,
            package=PACKAGE,
            package_sha256=self.mirror.sha256(PACKAGE),
            canaries=[self.metadata.access_key, self.metadata.secret_key],
        )

    def received(self) -> dict[str, Received]:
        """Counts by endpoint."""
        return {str(endpoint): count for fake in self.fakes for endpoint, count in fake.received.items()}

    def answer(self, question: str) -> bytes:
        """One line of JSON."""
        if question == "facts":
            value: object = self.facts()
        elif question == "received":
            value = self.received()
        else:
            value = self.names.queries
        return msgspec.json.encode(value) + b"\n"


async def _serve(sock: socket.socket) -> None:
    async with contextlib.AsyncExitStack() as stack:
        far = FarSide()
        for fake in far.fakes:
            try:
                await stack.enter_async_context(fake)
            except OSError as error:
                raise NodeError(f"a fake of the closed world could not listen: {error}") from error
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock)
        answering = asyncio.create_task(_answer(far, reader, writer))
        # an event and not a cancellation: what stops the fakes must itself not be cut short
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait([answering, waiting], return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, waiting):
            task.cancel()


async def _answer(far: FarSide, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"ready\n")
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(far.answer(line.decode("ascii").strip()))
            await writer.drain()


def serve(sock: socket.socket) -> None:
    """Run every fake until the near side hangs up or SIGTERM comes. Says ``ready`` when all listen."""
    asyncio.run(_serve(sock))
