"""A stream of what was put in, for the servers under test."""

from __future__ import annotations

import asyncio


class Memory:
    """Gives its pieces, then the end; keeps what it is sent."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.sent = bytearray()

    async def recv(self, limit: int = 65536) -> bytes:
        await asyncio.sleep(0)
        if not self.pieces:
            return b""
        data = self.pieces.pop(0)
        if len(data) > limit:
            self.pieces.insert(0, data[limit:])
        return data[:limit] or await self.recv(limit)

    async def send(self, data: bytes) -> None:
        self.sent += data
        await asyncio.sleep(0)

    async def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
