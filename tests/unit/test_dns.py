"""DNS messages: read without trusting them, answered so that clients fail fast."""

from __future__ import annotations

import asyncio
import os
import random

import dns.flags
import dns.message
import dns.rcode
import pytest

from vallum.core.verdict import Decision
from vallum.gateway.dns import read_query, write_answer, write_failure, write_refusal
from vallum.gateway.names import CellNames, HostResolver, parse_hosts
from vallum.rules.grants import Ruleset, parse_grant

DENY = Decision(verdict="deny", rule="default-deny", reason="no rule grants it")


def make(name: str, kind: str = "A", edns: int = -1) -> bytes:
    return dns.message.make_query(name, kind, use_edns=edns).to_wire()


def test_a_refusal_is_nxdomain_and_says_why_where_the_client_can_hear_it() -> None:
    query = read_query(make("Evil.Example", "A", 0))
    assert query is not None
    assert (query.qname, query.qtype) == ("Evil.Example", "A")
    answer = dns.message.from_wire(write_refusal(query, DENY))
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert "blocked by rule default-deny" in str(answer.options[0])
    plain = read_query(make("evil.example"))
    assert plain is not None
    assert dns.message.from_wire(write_refusal(plain, DENY)).edns == -1


def test_answers_are_of_the_family_asked_and_cut_to_size() -> None:
    for kind, expected in (("A", ["203.0.113.1"]), ("AAAA", ["2001:db8::1"]), ("TXT", [])):
        query = read_query(make("a.example", kind))
        assert query is not None
        wire = write_answer(query, ["203.0.113.1", "2001:db8::1"], exists=True, udp=True)
        answer = dns.message.from_wire(wire)
        assert answer.rcode() == dns.rcode.NOERROR
        assert [item.address for rrset in answer.answer for item in rrset] == expected
    query = read_query(make("a.example", "AAAA"))
    assert query is not None
    many = [f"2001:db8::{n:x}" for n in range(1, 60)]
    assert dns.message.from_wire(write_answer(query, many, exists=True, udp=True)).flags & dns.flags.TC
    assert len(dns.message.from_wire(write_answer(query, many, exists=True, udp=False)).answer[0]) == 59


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (make("a.example")[:-3], dns.rcode.FORMERR),
        (bytes.fromhex("abcd01000001000000000000") + b"\xc0\x0c\x00\x01\x00\x01", dns.rcode.FORMERR),
        (bytes.fromhex("abcd01000000000000000000"), dns.rcode.FORMERR),
        (bytes.fromhex("abcd10000001000000000000") + b"\x01a\x00\x00\x01\x00\x01", dns.rcode.NOTIMP),
        (bytes.fromhex("abcd01000001000000000000") + b"\x01a\x00\x00\x01\x00\x03", dns.rcode.REFUSED),
    ],
)
def test_malformed_queries_get_a_code(wire: bytes, rcode: dns.rcode.Rcode) -> None:
    query = read_query(wire)
    assert query is not None
    assert query.rcode == rcode
    assert dns.message.from_wire(write_failure(query, rcode)).rcode() == rcode


@pytest.mark.parametrize("wire", [b"", b"short", os.urandom(5000), bytes.fromhex("abcd81000001000000000000")])
def test_what_is_no_query_gets_nothing(wire: bytes) -> None:
    assert read_query(wire) is None


def test_mutations_never_raise() -> None:
    rng = random.Random(3)
    for _ in range(4000):
        wire = bytearray(make("some.name.example", rng.choice(["A", "TXT", "ANY", "SVCB"]), rng.choice([-1, 0])))
        for _ in range(rng.randrange(6)):
            wire[rng.randrange(len(wire))] = rng.randrange(256)
        query = read_query(bytes(wire))
        if query is not None:
            write_refusal(query, DENY)
            write_answer(query, ["203.0.113.1"], exists=True, udp=True)


def test_a_dot_inside_a_label_is_no_dot() -> None:
    wire = bytes.fromhex("abcd01000001000000000000") + b"\x09a.example\x04evil\x00\x00\x01\x00\x01"
    query = read_query(wire)
    assert query is not None
    assert query.qname == "a\\.example.evil"


def test_parse_hosts() -> None:
    text = "127.0.0.1 localhost Local.Test # x\n# y\n\nbad a.example\n::1 localhost\n192.0.2.1\ta.example b.example\n"
    assert parse_hosts(text) == {
        "localhost": {"127.0.0.1", "::1"},
        "local.test": {"127.0.0.1"},
        "a.example": {"192.0.2.1"},
        "b.example": {"192.0.2.1"},
    }


def test_pins_and_stand_ins() -> None:
    hosts = {"local.example": {"127.0.0.1"}, "meta.example": {"169.254.169.254"}, "in.example": {"10.9.9.9"}}
    rules = Ruleset(allow=tuple(map(parse_grant, ["local.example", "meta.example", "*.example"])))

    async def scenario() -> None:
        resolver = HostResolver(threads=1)
        names = CellNames(resolver, lambda: hosts)
        local = await names.resolve("local.example", rules)
        (shown,) = local.addresses
        assert shown == "198.18.0.1"
        assert names.pinned(shown).upstream == "127.0.0.1"
        assert names.pinned(shown).names["local.example"].local
        assert (await names.resolve("local.example", rules)).addresses == [shown]
        for name, rule in (("meta.example", "metadata"), ("in.example", "private-range")):
            found = await names.resolve(name, rules)
            assert (found.addresses, found.dropped[0].rule) == ([], rule)
        assert names.pinned("203.0.113.1").names == {}
        assert resolver.count == 0
        resolver.close()

    asyncio.run(scenario())
