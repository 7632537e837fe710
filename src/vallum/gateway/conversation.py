"""What the gateway itself says on a guest's connection: answers of DNS over TCP, and a refusal in words."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.dns import MAX_MESSAGE

_MAX_DNS_MESSAGES = 256
_MAX_DRAINED = 1 << 20


def is_address(text: str) -> bool:
    """Whether a server name is an address written out, as in ``Host: 10.0.0.7`` or ``Host: [fd00::1]``."""
    try:
        ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


async def serve_dns(
    conn: socket.socket, answer_query: Callable[[bytes], Awaitable[bytes | None]], within_s: float
) -> bytes:
    """Answer DNS queries (RFC 1035 section 4.2.2) until the guest has no more, or is slower than ``within_s`` with one.

    Returns what is no query, which ends it: empty when all of them were.

    Raises:
        OSError: the guest broke off while it was answered.
    """
    for number in range(_MAX_DNS_MESSAGES):
        head = bytearray()
        try:
            wire = await asyncio.wait_for(_read_message(conn, head), within_s)
        except (TimeoutError, OSError, EOFError):
            return b"" if number else bytes(head)
        answer = await answer_query(wire)
        if answer is None:
            return bytes(head)
        await asyncio.get_running_loop().sock_sendall(conn, struct.pack("!H", len(answer)) + answer)
    return b""


async def _read_message(conn: socket.socket, head: bytearray) -> bytes:
    """One message; ``head`` gets every byte as it comes. Raises EOFError when it is cut off or too long."""
    loop = asyncio.get_running_loop()
    wanted = 2
    while len(head) < wanted:
        data = await loop.sock_recv(conn, wanted - len(head))
        if not data:
            raise EOFError
        head += data
        if len(head) == 2:
            wanted = 2 + struct.unpack("!H", head)[0]
            if wanted > 2 + MAX_MESSAGE:
                raise EOFError
    return bytes(head[2:])


async def answer_403(conn: socket.socket, decision: Decision) -> None:
    """Tell an HTTP/1 client why it was refused, and wait until it has gone.

    Raises:
        OSError: it went before.
    """
    loop = asyncio.get_running_loop()
    body = f"vallum: blocked by rule {decision.rule}: {show(decision.reason, 400)}\n".encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"X-Vallum-Rule: {show(decision.rule)}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    await loop.sock_sendall(conn, head.encode("ascii", "replace") + body)
    conn.shutdown(socket.SHUT_WR)
    # Bytes left unread would turn the close into a reset, and the guest might never see the answer.
    drained = 0
    while drained < _MAX_DRAINED and (data := await loop.sock_recv(conn, 65536)):
        drained += len(data)
