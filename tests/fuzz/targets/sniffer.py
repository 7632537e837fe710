"""The beginning of a flow. Whatever it is, it is named; in pieces a protocol that rules can grant is not another one."""

from __future__ import annotations

from vallum.gateway.sniff import Sniffed, Sniffer

SEEDS = (
    b"\x40GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    b"\x10SSH-2.0-x\r\n",
    b"\x80\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\1\0\x50",
    b"\x80\x04\x01\x00\x50\x7f\0\0\1root\0",
    b'\x80{"id":1,"method":"mining.subscribe","params":[]}\n',
    b'\x80[{"method":"login","params":{"login":"w","pass":"x","agent":"m"}}]',
    b"\x80PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x80\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03",
    b"\x20CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n",
)
_EARLY = frozenset({"socks", "unknown"})
"""Told by what has come so far: a later byte may make them unknown."""


def read(pieces: list[bytes]) -> Sniffed:
    sniffer = Sniffer()
    for piece in pieces:
        found = sniffer.feed(piece)
        if found is not None:
            return found
    return sniffer.finish()


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole, parts = read([rest]), read([rest[:cut], rest[cut:]])
    if not {whole.protocol, parts.protocol} & _EARLY:
        assert whole.protocol == parts.protocol
        if not whole.refused and not parts.refused:
            assert whole.server_name == parts.server_name
