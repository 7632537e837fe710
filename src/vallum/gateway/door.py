"""Facts that only the kernel can give about a connection or datagram that came through a door."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from functools import lru_cache

from vallum.rules.addresses import canonical

_SO_ORIGINAL_DST = 80  # netfilter_ipv4.h, ip6_tables.h: the same number for both
_IP_PKTINFO = 8
_IPV6_PKTINFO = 50
_IPV6_RECVPKTINFO = 49
_IPV6_FREEBIND = 78
_ESTABLISHED, _CLOSED = 1, 7  # include/net/tcp_states.h
_RST = struct.pack("ii", 1, 0)

Endpoint = tuple[str, int]


@lru_cache(maxsize=4096)
def _canonical_text(text: str) -> str:
    return str(canonical(text))


def endpoint(address: tuple[object, ...]) -> Endpoint:
    """(canonical address, port) of a socket address of either family."""
    return _canonical_text(str(address[0])), int(str(address[1]))


def original_destination(conn: socket.socket) -> Endpoint | None:
    """Where the guest wanted to go. None: to the listener itself, so it was not led here by the cell's redirect."""
    try:
        if conn.family == socket.AF_INET6:
            raw = conn.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            port, host = struct.unpack_from("!2xH4x16s", raw)
            wanted = endpoint((socket.inet_ntop(socket.AF_INET6, host), port))
        else:
            raw = conn.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
            port, host = struct.unpack_from("!2xH4s", raw)
            wanted = endpoint((socket.inet_ntop(socket.AF_INET, host), port))
    except OSError:
        return None
    return None if wanted == endpoint(conn.getsockname()) else wanted


def reset(conn: socket.socket) -> None:
    """Close with RST, so that the guest fails at once."""
    try:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    except OSError:
        pass  # the guest was faster
    finally:
        conn.close()


async def wait_readable(conn: socket.socket, within_s: float) -> None:
    """Wait until there is something to read (or an end, or an error).

    Raises:
        TimeoutError: there is not.
    """
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    timer = loop.call_later(within_s, _fail, ready)
    loop.add_reader(conn.fileno(), _finish, ready)
    try:
        await ready
    finally:
        loop.remove_reader(conn.fileno())
        timer.cancel()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


async def receive(conn: socket.socket, limit: int, within_s: float) -> bytes:
    """Some bytes of a non-blocking socket; empty at the end.

    Raises:
        TimeoutError: nothing came in time.
        OSError: the connection broke.
    """
    while True:
        try:
            return conn.recv(limit)
        except BlockingIOError:
            await wait_readable(conn, within_s)


async def connect_within(ip: str, port: int, within_s: float) -> socket.socket:
    """A non-blocking connection; the caller's to close.

    Raises:
        OSError: it cannot be had (TimeoutError: not in time).
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    conn = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    loop = asyncio.get_running_loop()
    try:
        # What is near has often answered by the time that connect(2) returns.
        if conn.connect_ex((ip, port)) == errno.EINPROGRESS and not _is_connected(conn):
            ready = loop.create_future()
            timer = loop.call_later(within_s, _fail, ready)
            loop.add_writer(conn.fileno(), _finish, ready)
            try:
                await ready
            finally:
                loop.remove_writer(conn.fileno())
                timer.cancel()
        if code := conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        conn.getpeername()  # an error that connect(2) gave at once leaves no SO_ERROR
    except BaseException:
        conn.close()
        raise
    return conn


def _is_connected(conn: socket.socket) -> bool:
    try:
        conn.getpeername()
    except OSError:
        return False
    return True


def has_left(conn: socket.socket) -> bool:
    """Whether the guest sends no more on a connection (closed, half closed or reset), whatever is still unread."""
    return _tcp_state(conn) != _ESTABLISHED


def is_reset(conn: socket.socket) -> bool:
    """Whether a connection is over both ways."""
    return _tcp_state(conn) == _CLOSED


def _tcp_state(conn: socket.socket) -> int:
    try:
        return conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return _CLOSED


def keep_alive(conn: socket.socket) -> None:
    """Notice a dead peer in about two minutes."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def prepare_datagrams(door: socket.socket) -> None:
    """Have the kernel say which address each datagram was sent to: the answer must come from there."""
    door.setblocking(False)
    if door.family == socket.AF_INET6:
        door.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        # A local route makes every IPv4 address usable as a source; IPv6 wants this as well.
        door.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        door.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


Datagram = tuple[bytes, tuple[object, ...], bytes]
"""Payload, the guest's address, the address that it was sent to (packed)."""


def receive_datagram(door: socket.socket, limit: int) -> Datagram | None:
    """The next datagram; None when its destination is unknown.

    Raises:
        BlockingIOError: there is none.
    """
    data, ancillary, _, peer = door.recvmsg(limit, socket.CMSG_SPACE(20))
    for level, kind, value in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO and len(value) >= 12:
            return data, peer, value[8:12]
        if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO and len(value) >= 20:
            return data, peer, value[:16]
    return None


def send_datagram(door: socket.socket, data: bytes, peer: tuple[object, ...], source: bytes) -> None:
    """Answer from the address that was asked. What cannot be sent is lost, as datagrams are."""
    if len(source) == 4:
        info = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, source, bytes(4)))
    else:
        info = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, source + struct.pack("=i", 0))
    try:
        door.sendmsg([data], [info], 0, peer)
    except OSError:
        return


def unpack_address(raw: bytes) -> str:
    """Text of a packed address."""
    return str(canonical(socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)))
