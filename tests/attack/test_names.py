"""Who answers for a granted name wants to choose where another name, or a service of the gateway, leads."""

from __future__ import annotations

import pytest

from vallum.gateway.names import CellNames, HostResolver, service_at, stand_ins_of
from vallum.rules.grants import Rule, Ruleset

RULES = Ruleset(allow=(Rule(id="evil", host="evil.test"), Rule(id="local", host="local.test")))


class Answers(HostResolver):
    """A resolver whose answers are the attacker's."""

    def __init__(self, *addresses: str) -> None:
        super().__init__(threads=1)
        self.addresses = list(addresses)

    async def lookup(self, name: str) -> list[str]:
        return self.addresses


@pytest.mark.parametrize("ip", ["198.18.0.1", *stand_ins_of("model"), *stand_ins_of("tools"), "100::1"])
async def test_an_answer_inside_the_stand_ins_is_given_to_nobody(ip: str) -> None:
    names = CellNames(Answers(ip), hosts=lambda: {"local.test": {"127.0.0.1"}})
    found = await names.resolve("evil.test", RULES)
    assert found.addresses == [] and [d.rule for d in found.dropped] == ["reserved"]
    assert not names.pinned(ip).names
    # The twin: a name of the host's own hosts file is told its stand-in, and that leads to where it always led.
    (told,) = (await names.resolve("local.test", RULES)).addresses
    assert service_at(told) is None
    assert names.pinned(told).upstream == "127.0.0.1" and list(names.pinned(told).names) == ["local.test"]
