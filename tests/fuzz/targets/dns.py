"""Queries of the guest: read or turned away without an error, and every answer is a message of DNS with the same id."""

from __future__ import annotations

import dns.message
import dns.rcode

from vallum.core.verdict import Decision
from vallum.gateway.dns import read_query, write_answer, write_failure, write_refusal

DENIED = Decision(verdict="deny", rule="no-grant", reason="not granted")
ADDRESSES = ["192.0.2.1", "2001:db8::1", *(f"198.51.100.{n}" for n in range(60))]
_HEAD = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
SEEDS = (
    _HEAD + b"\x07example\x03com\x00\x00\x01\x00\x01",
    (b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x00\x00\x1c\x00\x01\0\0\x29\x04\xd0\0\0\0\0\0\0"),
    _HEAD + b"\xc0\x0c\x00\x01\x00\x01",
)


def fuzz(data: bytes) -> None:
    query = read_query(data)
    if query is None:
        return
    answers = [write_failure(query, query.rcode or dns.rcode.SERVFAIL)]
    if query.rcode == dns.rcode.NOERROR:
        answers.append(write_refusal(query, DENIED))
        for udp in (True, False):
            answer = write_answer(query, ADDRESSES, exists=True, udp=udp)
            assert not udp or len(answer) <= 1232
            answers.append(answer)
    for answer in answers:
        assert dns.message.from_wire(answer).id == int.from_bytes(data[:2], "big")
