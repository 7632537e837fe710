"""A client that comes just as the last one goes meets a node that is ending, or its successor: never an error."""

import asyncio

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]


async def test_clients_one_after_the_other_without_a_pause(home):
    nodes = set()
    for count in range(300):
        if count >= 12 and len(nodes) > 1:
            break
        async with vallum.Node(home=home) as node:
            nodes.add(node.pid)
    assert len(nodes) > 1, "the node ended with its last client at least once"


async def test_a_client_comes_at_every_moment_of_another_ones_end(home):
    for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01):
        first = vallum.Node(home=home)
        await first.__aenter__()
        await first.close()
        await asyncio.sleep(delay_s)
        async with vallum.Node(home=home) as node, node.sandbox() as sb:
            assert (await sb.exec(["true"])).exit_code == 0
