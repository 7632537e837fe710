"""A stream of what was put in, for the servers under test."""

from __future__ import annotations

import asyncio


class Memory:
    """Gives its pieces, then the end; keeps what it is sent, and breaks when that is more than ``room`` bytes."""

    def __init__(self, pieces: list[bytes], room: int = 1 << 30) -> None:
        self.pieces = pieces
        self.room = room
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
        if len(self.sent) > self.room:
            raise BrokenPipeError("the other side has gone")
        await asyncio.sleep(0)

    async def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
