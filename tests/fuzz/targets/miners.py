"""Miner JSON-RPC: what is a miner's message at once is one in pieces, too; nothing takes long or raises."""

from __future__ import annotations

from vallum.gateway.minerpc import Nesting, is_miner_text, read_messages
from vallum.gateway.sniff import MinerWatch

SEEDS = (
    b'\x40{"id":1,"method":"mining.subscribe","params":["m/1"]}\n',
    b'\x40{"method":"login","params":{"login":"w","pass":"x","agent":"xmrig"}}',
    b'\x80{"method":"\\u006dining.submit"}',
    b'\x20[{"a":[1,2,{"b":"]"}]},{"method":"eth_submitLogin"}]',
)


def fuzz(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    whole, parts = Nesting(), Nesting()
    closed = whole.feed(rest)
    assert closed == (parts.feed(rest[:cut]) | parts.feed(rest[cut:]))
    read_messages(rest)
    if is_miner_text(rest) and len(rest) <= 2048:
        watch = MinerWatch()
        assert any([watch.feed(rest[:cut]), watch.feed(rest[cut:])])
