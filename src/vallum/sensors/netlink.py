"""Netlink framing, as pure functions: messages, attributes and how a request is written.

Shared by the three sensors that read netlink (proc connector, sock_diag, NFLOG). The kernel is the only
sender we listen to (readers check the sender's port id), yet lengths are never believed: every slice is
bounded by what was really received.

Source: include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 1, 2, 3, 4
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
_TYPE_MASK = 0x3FFF
"""NLA_F_NESTED and NLA_F_NET_BYTEORDER are the two high bits of an attribute's type."""


class MalformedNetlinkError(ValueError):
    """Bytes that are not what the kernel's headers describe. Readers count it and report a SensorStatus."""


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message."""

    type: int
    flags: int
    seq: int
    port: int
    payload: bytes


def _align(length: int) -> int:
    return (length + 3) & ~3


def split(data: bytes) -> Iterator[Message]:
    """Messages of one datagram, in order.

    Raises:
        MalformedNetlinkError: a length does not fit; the messages before it were already given.
    """
    offset, end = 0, len(data)
    while offset < end:
        if end - offset < HEADER.size:
            raise MalformedNetlinkError(f"{end - offset} bytes are left, a netlink header has {HEADER.size}")
        length, kind, flags, seq, port = HEADER.unpack_from(data, offset)
        if length < HEADER.size or length > end - offset:
            raise MalformedNetlinkError(f"netlink length {length} does not fit in {end - offset} bytes")
        yield Message(kind, flags, seq, port, data[offset + HEADER.size : offset + length])
        offset += _align(length)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type; the last one of a type wins.

    Raises:
        MalformedNetlinkError: a length does not fit.
    """
    found: dict[int, bytes] = {}
    offset, end = 0, len(data)
    while end - offset >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size or length > end - offset:
            raise MalformedNetlinkError(f"attribute length {length} does not fit in {end - offset} bytes")
        found[kind & _TYPE_MASK] = data[offset + ATTRIBUTE.size : offset + length]
        offset += _align(length)
    return found


def make(kind: int, flags: int, seq: int, payload: bytes) -> bytes:
    """One message, ready to be sent to the kernel."""
    return HEADER.pack(HEADER.size + len(payload), kind, flags, seq, 0) + payload


def error_of(message: Message) -> int:
    """The positive errno of an NLMSG_ERROR message, 0 for an acknowledgement.

    Raises:
        MalformedNetlinkError: too short to hold one.
    """
    if len(message.payload) < 4:
        raise MalformedNetlinkError("an NLMSG_ERROR without its error")
    return -int(struct.unpack_from("=i", message.payload)[0])
