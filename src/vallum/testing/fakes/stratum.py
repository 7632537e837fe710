"""A mining pool that speaks stratum (the Bitcoin dialect and Monero's) over a toy proof of work.

A share is a nonce for which ``sha256(job + nonce)`` starts with ``difficulty_bits`` zero bits: a few
thousand hashes, so that a Python miner finds one in milliseconds. It is worth nothing anywhere.
Shares are verified and counted once each, so the count is work that was really done and delivered.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from vallum.testing.fakes.base import CountedReader, Endpoint, TcpFake

DIFFICULTY_BITS = 12


def is_share(job: bytes, nonce: bytes, difficulty_bits: int = DIFFICULTY_BITS) -> bool:
    """Whether ``sha256(job + nonce)`` starts with that many zero bits."""
    digest = hashlib.sha256(job + nonce).digest()
    return int.from_bytes(digest, "big") >> (256 - difficulty_bits) == 0


class StratumPool(TcpFake):
    """Units: ``subscribes``, ``logins`` (also ``mining.authorize``), ``submits``, ``shares``."""

    def __init__(
        self, endpoints: Iterable[Endpoint | tuple[str, int]], *, difficulty_bits: int = DIFFICULTY_BITS
    ) -> None:
        super().__init__(endpoints)
        self._difficulty_bits = difficulty_bits

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Answer JSON-RPC lines until the miner leaves or stops speaking JSON."""
        job = secrets.token_bytes(32)
        seen: set[bytes] = set()
        while line := await reader.readline():
            try:
                message = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                return
            for reply in self._answer(message, job, seen, reader):
                writer.write(msgspec.json.encode(reply) + b"\n")
            await writer.drain()

    def _answer(
        self, message: dict[str, Any], job: bytes, seen: set[bytes], reader: CountedReader
    ) -> list[dict[str, Any]]:
        number, method, params = message.get("id"), message.get("method"), message.get("params")
        if method == "mining.subscribe":
            reader.count.count("subscribes")
            return [{"id": number, "result": [[["mining.notify", "1"]], "00", 4], "error": None}]
        if method in ("mining.authorize", "login"):
            reader.count.count("logins")
            work = {"job_id": "1", "blob": job.hex(), "target_bits": self._difficulty_bits}
            if method == "login":
                return [
                    {"id": number, "jsonrpc": "2.0", "result": {"id": "1", "job": work, "status": "OK"}, "error": None}
                ]
            return [
                {"id": number, "result": True, "error": None},
                {"id": None, "method": "mining.notify", "params": work},
            ]
        if method in ("mining.submit", "submit"):
            reader.count.count("submits")
            accepted = self._accept(params, job, seen)
            reader.count.count("shares", int(accepted))
            return [{"id": number, "result": accepted, "error": None if accepted else [23, "not a share", None]}]
        return [{"id": number, "result": None, "error": [20, "unknown method", None]}]

    def _accept(self, params: Any, job: bytes, seen: set[bytes]) -> bool:
        nonce_hex = (
            params.get("nonce")
            if isinstance(params, dict)
            else params[-1]
            if isinstance(params, list) and params
            else None
        )
        try:
            nonce = bytes.fromhex(nonce_hex) if isinstance(nonce_hex, str) else b""
        except ValueError:
            return False
        if not nonce or len(nonce) > 32 or nonce in seen or not is_share(job, nonce, self._difficulty_bits):
            return False
        seen.add(nonce)
        return True
