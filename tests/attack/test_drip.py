"""The sniffer's work must grow with the bytes, not with their square. Unit tests: nothing runs in a cell."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vallum.gateway.minerpc import Nesting
from vallum.gateway.sniff import Sniffer

BEGINNINGS = {
    "TLS in records of one byte": b"".join(
        b"\x16\x03\x01\x00\x01" + bytes([c]) for c in b"\1\0\x30\0\3\3" + b"A" * 2700
    ),
    "JSON of line ends": b"[" + b"\n" * 16000,
    "JSON of brackets": b"[" + b"[]," * 5300,
    "JSON of braces in a string": b'{"a":"' + b"}" * 16000,
    "JSON of escapes": b'{"a":"' + b"\\u0061}" * 2000,
    "HTTP of blank lines": b"\n" * 16000,
    "HTTP of headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2600,
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_drip_costs_what_its_bytes_cost(name):
    data = BEGINNINGS[name]
    sniffer = Sniffer()
    began = time.process_time()
    for at in range(len(data)):
        assert sniffer.feed(data[at : at + 1]) is None
    assert time.process_time() - began < 2.5, "it was 3 s for brackets and 20 s for records, a flow"
    assert sniffer.finish().refused


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(max_examples=200, deadline=None)
def test_the_end_of_a_value_is_noticed(value):
    raw = json.dumps([value], ensure_ascii=False).encode("utf-8", "replace")
    whole, pieces = Nesting(), Nesting()
    assert whole.feed(raw)
    ends = [at for at in range(len(raw)) if pieces.feed(raw[at : at + 1])]
    assert ends == [len(raw) - 1]
