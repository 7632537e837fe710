"""DNS messages of the guest: read, answered, written. Sans-I/O; the lookup itself is :mod:`vallum.gateway.names`.

A name that is not granted is answered NXDOMAIN at once (REFUSED makes resolvers try again elsewhere), with an
Extended DNS Error where the client speaks EDNS, and nothing is asked outside: the query itself would be the leak.

Covered: A and AAAA; every other type of a granted name is an empty answer. Malformed messages get FORMERR, or
nothing where there is no header. Not covered: DNSSEC (answers carry no signatures).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from vallum.core.verdict import Decision
from vallum.gateway.names import TTL_S

MAX_UDP = 1232
MAX_MESSAGE = 4096
"""Longest query that is read."""
_HEADER = struct.Struct("!HHHHHH")


@dataclass(frozen=True)
class Query:
    """One question."""

    message: dns.message.Message
    qname: str
    """Name as text, escaped where it is no host name, without the final dot."""
    qtype: str
    rcode: dns.rcode.Rcode
    """NOERROR, or why it is not answered whatever the rules say."""

    @property
    def wants_addresses(self) -> bool:
        """Whether it asks for something that is answered at all."""
        return self.qtype in {"A", "AAAA"}


def read_query(wire: bytes) -> Query | None:
    """The question in a message; None when it has no usable header or is not a query. Never raises."""
    if not _HEADER.size <= len(wire) <= MAX_MESSAGE:
        return None
    if _HEADER.unpack_from(wire)[1] & 0x8000:
        return None
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True)
        rcode = _check(message)
        question = message.question[0] if message.question else None
        qname = question.name.to_text(omit_final_dot=True) if question is not None else ""
        qtype = dns.rdatatype.to_text(question.rdtype) if question is not None else ""
    except (dns.exception.DNSException, ValueError, IndexError, struct.error, NotImplementedError):
        message = dns.message.Message(id=_HEADER.unpack_from(wire)[0])
        return Query(message, "", "", dns.rcode.FORMERR)
    return Query(message, qname, qtype, rcode)


def _check(message: dns.message.Message) -> dns.rcode.Rcode:
    if message.opcode() != dns.opcode.QUERY:
        return dns.rcode.NOTIMP
    if len(message.question) != 1:
        return dns.rcode.FORMERR
    if message.question[0].rdclass != dns.rdataclass.IN:
        return dns.rcode.REFUSED
    return dns.rcode.NOERROR


def _respond(query: Query, rcode: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.Message(id=query.message.id)
    response.flags = dns.flags.QR | dns.flags.RA | (query.message.flags & dns.flags.RD)
    response.set_opcode(query.message.opcode())
    response.set_rcode(rcode)
    if len(query.message.question) == 1:
        response.question = list(query.message.question)
    return response


def write_refusal(query: Query, decision: Decision) -> bytes:
    """NXDOMAIN, with the rule as an Extended DNS Error (15, blocked) for clients that can show it."""
    response = _respond(query, dns.rcode.NXDOMAIN)
    if query.message.edns >= 0:
        error = dns.edns.EDEOption(dns.edns.EDECode.BLOCKED, f"vallum: blocked by rule {decision.rule}"[:200])
        response.use_edns(0, payload=MAX_UDP, options=[error])
    return response.to_wire(max_size=65535)


def write_failure(query: Query, rcode: dns.rcode.Rcode) -> bytes:
    """An answer that only carries a code."""
    return _respond(query, rcode).to_wire(max_size=65535)


def write_answer(query: Query, addresses: list[str], *, exists: bool, udp: bool) -> bytes:
    """The addresses of the family asked for; TC is set where a datagram cannot hold them."""
    response = _respond(query, dns.rcode.NOERROR if exists else dns.rcode.NXDOMAIN)
    fitting = [ip for ip in addresses if (":" in ip) == (query.qtype == "AAAA")]
    if query.wants_addresses and fitting:
        name = query.message.question[0].name
        response.answer = [dns.rrset.from_text_list(name, TTL_S, "IN", query.qtype, fitting)]
    if query.message.edns >= 0:
        response.use_edns(0, payload=MAX_UDP)
    limit = min(max(query.message.payload, 512), MAX_UDP) if query.message.edns >= 0 else 512
    try:
        return response.to_wire(max_size=limit if udp else 65535)
    except dns.exception.TooBig:
        response.answer = []
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=65535)
