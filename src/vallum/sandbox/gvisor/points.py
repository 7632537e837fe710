"""What runsc's kernel reports, from bytes to typed points. Pure.

A datagram is a header (its size, a message type, a count of lost points: 16, 16 and 32 bits) and a protobuf message. The
sender may be broken by its guest, so nothing is trusted: lengths are checked, text is decoded leniently and kept short,
and what makes no sense raises.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vallum.core.errors import SandboxError

HEADER = struct.Struct("<HHI")
HANDSHAKE = b"\x08\x01"
"""Protobuf: version 1; said by the runtime first, answered with ours."""
MAX_DATAGRAM = 1 << 20

_CLONE, _EXEC, _EXIT, _CONNECT = 2, 3, 4, 10
_COMMON, _TGID, _CREDENTIALS = 1, 4, 7
_MAX_ARGUMENTS = 4096
MAX_PID = 1 << 22


class MalformedPoint(SandboxError):
    """The runtime's kernel sent what no such kernel sends."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A thread of process ``pid`` made another; a new process when ``child`` differs."""

    pid: int
    child: int


@dataclass(frozen=True, slots=True)
class Exec:
    """A process runs another program."""

    pid: int
    uid: int | None
    path: str
    argv: list[str]


@dataclass(frozen=True, slots=True)
class Exited:
    """A whole process has ended; ``status`` as of wait(2)."""

    pid: int
    status: int


@dataclass(frozen=True, slots=True)
class Connect:
    """A process is about to connect a socket to an address."""

    pid: int
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int


Point = Clone | Exec | Exited | Connect


@dataclass(frozen=True, slots=True)
class Datagram:
    """One message: the point, None where it is of a kind that says nothing to us."""

    point: Point | None
    lost: int
    """Points that could not be delivered so far (wraps at 2**32)."""


def parse(raw: bytes) -> Datagram:
    """One datagram.

    Raises:
        MalformedPoint: it is not one.
    """
    if len(raw) < HEADER.size:
        raise MalformedPoint(f"{len(raw)} bytes are too few for a point")
    size, kind, lost = HEADER.unpack_from(raw)
    if not HEADER.size <= size <= len(raw):
        raise MalformedPoint(f"a point's header of {size} bytes does not fit its datagram of {len(raw)}")
    try:
        return Datagram(_decode(kind, raw[size:]), lost)
    except (ValueError, IndexError, TypeError) as error:
        raise MalformedPoint(f"a point of type {kind} cannot be understood: {error}") from error


def _decode(kind: int, body: bytes) -> Point | None:
    if kind not in (_CLONE, _EXEC, _EXIT, _CONNECT):
        return None
    fields = _collect(body)
    common = _collect(_one_bytes(fields, _COMMON))
    pid = _pid(_one_int(common, _TGID))
    if kind == _CLONE:
        return Clone(pid, _pid(_one_int(fields, 4)))
    if kind == _EXIT:
        return Exited(pid, _one_int(fields, 2) & 0xFFFF)
    if kind == _CONNECT:
        return _parse_address(pid, _one_bytes(fields, 6))
    credentials = _collect(_one_bytes(common, _CREDENTIALS))
    uid = _one_int(credentials, 2) if credentials else None
    argv = [_text(value) for value in fields.get(3, [])[:_MAX_ARGUMENTS]]
    return Exec(pid, uid, _text(_one_bytes(fields, 2)), argv)


def _parse_address(pid: int, raw: bytes) -> Connect | None:
    """None for what is no IP address (a Unix socket, a disconnect)."""
    if len(raw) < 2:
        return None
    (family,) = struct.unpack_from("=H", raw)
    if family == 2 and len(raw) >= 8:
        return Connect(pid, ipaddress.IPv4Address(raw[4:8]), struct.unpack_from(">H", raw, 2)[0])
    if family == 10 and len(raw) >= 24:
        return Connect(pid, ipaddress.IPv6Address(raw[8:24]), struct.unpack_from(">H", raw, 2)[0])
    return None


def _pid(value: int) -> int:
    if not 0 < value <= MAX_PID:
        raise ValueError(f"{value} is no process id")
    return value


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise TypeError("a number where text belongs")
    return value.decode("utf-8", "backslashreplace")


Fields = dict[int, list[int | bytes]]


def _one_int(fields: Fields, number: int) -> int:
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise TypeError(f"field {number} is no number")
    return value


def _one_bytes(fields: Fields, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if isinstance(value, int):
        raise TypeError(f"field {number} is a number")
    return value


def _collect(raw: bytes) -> Fields:
    found: Fields = {}
    for number, value in _walk(raw):
        found.setdefault(number, []).append(value)
    return found


def _walk(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, number or bytes) of a protobuf message."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            if at + size > len(raw):
                raise ValueError("cut short")
            yield number, raw[at : at + size]
            at += size
        elif wire == 2:
            size, at = _varint(raw, at)
            if size > len(raw) - at:
                raise ValueError("cut short")
            yield number, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
