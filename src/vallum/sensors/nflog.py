"""Packets that died inside a cell: what is neither TCP nor DNS, told by the packet filter's log (NFLOG).

The socket is made inside the cell's network namespace and handed in. The first packet of a kind becomes an event at once;
more of the same within a second are added up in one event with their bytes.

Covered: IPv4 and IPv6 with extension headers, fragments, truncated and hostile headers; floods (bounded memory, bounded
time per turn; what was not kept is counted in a SensorStatus).
Not covered: payload; packets that the filter's rule does not log.
Source: include/uapi/linux/netfilter/nfnetlink_log.h; RFC 791, RFC 8200.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass

from vallum.core.clock import mono_ns, wall_ns
from vallum.core.errors import RecordError
from vallum.core.events import AnyEvent, PacketDropped
from vallum.core.ports import Attributor
from vallum.core.scope import Attribution, Scope
from vallum.sensors import netlink
from vallum.sensors.base import Hooks, State, make_status

SENSOR = "nflog"
NFULNL_PACKET = 4 << 8
_PAYLOAD, _UID = 9, 11
_BATCH = 256
_WINDOW_S = 1.0
_REST = 4
"""Rest after a full batch, in lengths of the time that it took: a flood is the flooding cell's, not the node's, to bear."""
MAX_KINDS = 256
"""Different (protocol, destination, port) per second that are kept apart."""
MAX_ASKED = 32
"""Kinds per second whose socket is looked for (a millisecond each); the rest is charged to the cell."""
_NAMES = {1: "icmp", 17: "udp", 58: "icmpv6", 132: "sctp", 6: "tcp", 136: "udplite", 33: "dccp"}
_WITH_PORTS = {17, 132, 6, 136, 33}
_EXTENSIONS = {0, 43, 60, 135, 139, 140}
_FRAGMENT, _AUTH = 44, 51
_MAX_EXTENSIONS = 16


@dataclass(frozen=True, slots=True)
class Packet:
    """Headers of one packet."""

    protocol: str
    src_ip: str
    src_port: int | None
    dst_ip: str
    dst_port: int | None
    bytes: int
    """Length of the packet as its header says, headers included."""
    icmp_type: int | None = None


def parse_packet(raw: bytes) -> Packet:
    """Headers of an IP packet that may be cut off anywhere after its first header.

    Raises:
        MalformedNetlinkError: no IP header.
    """
    version = raw[0] >> 4 if raw else 0
    if version == 4 and len(raw) >= 20:
        header = max(20, (raw[0] & 0xF) * 4)
        fragment = struct.unpack_from(">H", raw, 6)[0] & 0x1FFF
        source, target = (str(ipaddress.IPv4Address(raw[at : at + 4])) for at in (12, 16))
        rest = raw[header:] if fragment == 0 else b""
        return _packet(raw[9], rest, source, target, struct.unpack_from(">H", raw, 2)[0])
    if version == 6 and len(raw) >= 40:
        source, target = (str(ipaddress.IPv6Address(raw[at : at + 16])) for at in (8, 24))
        number, rest = _skip_extensions(raw[6], raw[40:])
        return _packet(number, rest, source, target, 40 + int(struct.unpack_from(">H", raw, 4)[0]))
    raise netlink.MalformedNetlinkError("a logged packet without an IP header")


def _skip_extensions(number: int, rest: bytes) -> tuple[int, bytes]:
    """(upper protocol, its bytes) behind IPv6 extension headers; no bytes where they cannot be told."""
    for _ in range(_MAX_EXTENSIONS):
        if number in _EXTENSIONS or number == _AUTH:
            if len(rest) < 2:
                return number, b""
            size = (rest[1] + 2) * 4 if number == _AUTH else (rest[1] + 1) * 8
        elif number == _FRAGMENT:
            if len(rest) < 8:
                return number, b""
            if struct.unpack_from(">H", rest, 2)[0] & 0xFFF8:
                return rest[0], b""
            size = 8
        else:
            return number, rest
        number, rest = rest[0], rest[size:]
    return number, b""


def _packet(number: int, rest: bytes, source: str, target: str, length: int) -> Packet:
    ports: tuple[int | None, int | None] = (None, None)
    if number in _WITH_PORTS and len(rest) >= 4:
        ports = struct.unpack_from(">HH", rest)
    return Packet(
        protocol=_NAMES.get(number, f"ip-{number}"),
        src_ip=source,
        src_port=ports[0],
        dst_ip=target,
        dst_port=ports[1],
        bytes=length,
        icmp_type=rest[0] if number in (1, 58) and rest else None,
    )


def parse(data: bytes) -> list[tuple[Packet, int | None]]:
    """(packet, uid of the sending socket where it has one) of one datagram.

    The uid is as seen in the user namespace of whoever bound the log.

    Raises:
        MalformedNetlinkError: lengths do not fit.
    """
    found = []
    for message in netlink.split(data):
        if message.type != NFULNL_PACKET:
            continue
        if len(message.payload) < 4:
            raise netlink.MalformedNetlinkError("an NFLOG message without its header")
        attributes = netlink.attributes(message.payload[4:])
        raw_uid = attributes.get(_UID, b"")
        uid = struct.unpack(">I", raw_uid)[0] if len(raw_uid) == 4 else None
        found.append((parse_packet(attributes.get(_PAYLOAD, b"")), uid))
    return found


@dataclass(slots=True)
class _Kind:
    """Packets alike within a window: the first was told, these were not yet."""

    event: PacketDropped
    more_bytes: int = 0


class NflogReader:
    """The sensor of one cell. On the event loop; a flood costs at most a batch per turn."""

    def __init__(
        self, hooks: Hooks, cell: str, packets: socket.socket, scope: Scope, attributor: Attributor | None = None
    ) -> None:
        """``packets`` is the cell's door of that name (it stays the cell's to close, and may be closed at any time); ``scope`` is the cell's."""
        self._hooks = hooks
        self._cell = cell
        # A copy: the cell closes its door as soon as its last process is gone, and what that one sent is still to be read.
        self._socket = packets.dup()
        self._scope = scope
        self._attributor = attributor
        self._kinds: dict[tuple[str, str, int | None, int | None, int | None], _Kind] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._told_dropped = 0
        self._asked = 0
        self.dropped = 0
        """Packets that were not kept (the kernel's overflows count as one)."""
        self.malformed = 0

    def start(self) -> None:
        """Begin to read on the running loop."""
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read_some)
        self._status("watching", "packets that are neither TCP nor DNS")

    def stop(self) -> None:
        """Tell what was added up, and stop."""
        if self._loop is None:
            self._socket.close()
            return
        self._read()
        self._let_go()
        self._flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_go(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop = None
            self._socket.close()

    def settle(self) -> None:
        """Take what has been logged so far and end the window: called when a step closes, so that what it sent is told
        while it is still known to be running."""
        if self._loop is not None:
            self._read()
            if self._timer is not None:
                self._timer.cancel()
            self._flush()

    def _read_some(self) -> None:
        began_ns = mono_ns()
        if self._read() and self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(_REST * (mono_ns() - began_ns) / 1e9, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        if self._loop is not None:
            self._loop.add_reader(self._socket, self._read_some)

    def _read(self) -> bool:
        """Take at most a batch; whether there may be more."""
        for _ in range(_BATCH):
            if self._loop is None:
                return False
            try:
                data, (port, _) = self._socket.recvfrom(65536)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self.dropped += 1
                    self._flush_later()
                    continue
                self._let_go()
                self._status("blind", f"the packet log ended: {error.strerror}")
                return False
            if port != 0:
                continue  # not the kernel
            try:
                for packet, uid in parse(data):
                    self._take(packet, uid)
            except netlink.MalformedNetlinkError:
                self.malformed += 1
        return True

    def _take(self, packet: Packet, uid: int | None) -> None:
        scope, attribution = self._charge(packet)
        key = (packet.protocol, packet.dst_ip, packet.dst_port, uid, scope.step)
        kind = self._kinds.get(key)
        if kind is not None:
            kind.more_bytes += packet.bytes
            return
        if len(self._kinds) >= MAX_KINDS:
            self.dropped += 1
            return
        event = PacketDropped(
            t_ns=wall_ns(),
            mono_ns=mono_ns(),
            scope=scope,
            attribution=attribution,
            protocol=packet.protocol,
            dst_ip=packet.dst_ip,
            dst_port=packet.dst_port,
            bytes=packet.bytes,
            uid=uid,
        )
        self._kinds[key] = _Kind(event)
        self._flush_later()
        self._emit(event)

    def _charge(self, packet: Packet) -> tuple[Scope, Attribution]:
        is_askable = packet.protocol == "udp" and packet.src_port and packet.dst_port and self._asked < MAX_ASKED
        if self._attributor is not None and is_askable:
            self._asked += 1
            source, target = (packet.src_ip, packet.src_port or 0), (packet.dst_ip, packet.dst_port or 0)
            try:
                return self._attributor.attribute(self._cell, protocol="udp", src=source, dst=target)[:2]
            except KeyError:
                pass  # the attributor has let go of the cell: its last packets are the cell's
        return self._scope, Attribution(method="netns", confidence=0.5)

    def _flush_later(self) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(_WINDOW_S, self._flush)

    def _flush(self) -> None:
        """End of a window: tell what was added up and what was lost."""
        self._timer = None
        self._asked = 0
        kinds, self._kinds = self._kinds, {}
        for kind in kinds.values():
            if kind.more_bytes:
                first = kind.event
                self._emit(
                    PacketDropped(
                        t_ns=wall_ns(),
                        mono_ns=mono_ns(),
                        scope=first.scope,
                        attribution=first.attribution,
                        protocol=first.protocol,
                        dst_ip=first.dst_ip,
                        dst_port=first.dst_port,
                        bytes=kind.more_bytes,
                        uid=first.uid,
                    )
                )
        if self.dropped != self._told_dropped:
            self._told_dropped = self.dropped
            self._status(
                "degraded", "packets came faster than they could be told apart; they were dropped all the same"
            )

    def _status(self, state: State, detail: str) -> None:
        self._emit(make_status(SENSOR, self._scope, state, detail, self.dropped))

    def _emit(self, event: AnyEvent) -> None:
        try:
            self._hooks.emit(event)
        except RecordError as error:
            self._let_go()
            self._kinds.clear()
            self._hooks.record_failed(self._cell, error)
