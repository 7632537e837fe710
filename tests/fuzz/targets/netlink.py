"""What the kernel says: packets of NFLOG, events of the process connector, sockets of sock_diag. First byte: which."""

from __future__ import annotations

import contextlib
import struct

from vallum.sensors import netlink, nflog, proc_events, socket_owner

_IP4 = bytes.fromhex("4500001c000100004011000001020304050607080035003500080000")
_IP6 = bytes.fromhex("6000000000083a40") + bytes(32) + b"\x80\x00\x00\x00\x00\x00\x00\x00"


def _logged(packet: bytes) -> bytes:
    attribute = struct.pack("=HH", 4 + len(packet), 9) + packet
    return netlink.make(nflog.NFULNL_PACKET, 0, 0, b"\x02\x00\x00\x00" + attribute)


SEEDS = (
    b"\x00" + _logged(_IP4),
    b"\x00" + _logged(_IP6),
    b"\x01"
    + netlink.make(3, 0, 0, struct.pack("=IIIIHH", 1, 1, 0, 0, 40, 0) + struct.pack("=IIQIIII", 2, 0, 0, 7, 7, 0, 0)),
    b"\x02" + b"\x02" + bytes(71),
    b"\x03" + _IP4,
    b"\x03" + _IP6,
)


def fuzz(data: bytes) -> None:
    if not data:
        return
    parse = (nflog.parse, proc_events.parse, socket_owner.parse_socket, nflog.parse_packet)[data[0] % 4]
    with contextlib.suppress(netlink.MalformedNetlinkError):
        parse(data[1:])
