"""Messages of the kernel's proc connector, as a pure function.

Source: include/uapi/linux/{connector,cn_proc}.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vallum.sensors import netlink

CN_IDX_PROC = 1
_CN_MSG = struct.Struct("=IIIIHH")
_EVENT = struct.Struct("=IIQ4I")
_ONE = struct.Struct("=IHHIIIIIIHHIIQ4I")
"""A datagram of one event, which is what the kernel sends: the three headers above in one."""
_FORK, _EXEC, _EXIT = 1, 2, 0x80000000


@dataclass(frozen=True, slots=True)
class Fork:
    """A process was made."""

    parent: int
    child: int


@dataclass(frozen=True, slots=True)
class Exec:
    """A process became another program."""

    pid: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The leader of a process ended; ``code`` and ``signal`` as wait(2) tells them."""

    pid: int
    code: int | None
    signal: int | None


ProcEvent = Fork | Exec | Exit


def parse(data: bytes) -> list[ProcEvent]:
    """Process events of one datagram; threads, acknowledgements and other kinds are left out.

    Raises:
        MalformedNetlinkError: lengths do not fit.
    """
    if len(data) >= _ONE.size:
        length, _, _, _, _, index, _, _, _, size, _, what, _, _, *words = _ONE.unpack_from(data)
        if length == len(data) and index == CN_IDX_PROC and _EVENT.size <= size <= length - _ONE.size + _EVENT.size:
            event = _read_event(what, *words)
            return [event] if event is not None else []
    found: list[ProcEvent] = []
    for message in netlink.split(data):
        raw = message.payload
        if len(raw) < _CN_MSG.size:
            raise netlink.MalformedNetlinkError(f"{len(raw)} bytes are too few for a process event")
        index, _, _, _, length, _ = _CN_MSG.unpack_from(raw)
        if index != CN_IDX_PROC or length > len(raw) - _CN_MSG.size:
            raise netlink.MalformedNetlinkError("not a message of the proc connector")
        event = _parse_event(raw[_CN_MSG.size : _CN_MSG.size + length])
        if event is not None:
            found.append(event)
    return found


def _parse_event(raw: bytes) -> ProcEvent | None:
    if len(raw) < _EVENT.size:
        raise netlink.MalformedNetlinkError(f"{len(raw)} bytes are too few for a process event")
    what, _, _, *words = _EVENT.unpack_from(raw)
    return _read_event(what, *words)


def _read_event(what: int, first: int, second: int, third: int, fourth: int) -> ProcEvent | None:
    if what == _FORK:
        return Fork(parent=second, child=fourth) if third == fourth else None
    if what == _EXEC:
        return Exec(pid=second)
    if what == _EXIT:
        if first != second:
            return None
        signal = third & 0x7F
        return Exit(pid=second, code=None if signal else (third >> 8) & 0xFF, signal=signal or None)
    return None
