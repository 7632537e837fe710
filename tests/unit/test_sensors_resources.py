"""When to look, and what is worth saying."""

import asyncio
from dataclasses import dataclass

import pytest

from vallum.core.errors import CellGone, RecordError
from vallum.core.events import ResourceSample
from vallum.core.scope import Scope
from vallum.sensors import resources
from vallum.sensors.resources import ResourceSampler, is_news, next_wait_s

MIB = 1024 * 1024


@dataclass
class Usage:
    cpu_ns: int | None = 0
    memory_bytes: int | None = 0
    memory_peak_bytes: int | None = 0
    pids: int | None = 1
    oom_kills: int | None = None


class Node:
    def __init__(self, *, fails: bool = False):
        self.events, self.failed, self.fails = [], [], fails

    def emit(self, event):
        if self.fails:
            raise RecordError("the disk is full")
        self.events.append(event)
        return len(self.events)

    def scope_of_pid(self, cell, pid):
        raise AssertionError("not asked")

    def record_failed(self, cell, error):
        self.failed.append(cell)


def scope(step):
    return Scope(run="r", episode="c", step=step)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ((0, 0, 0, 1, None), False),
        ((9_999_999, 0, 0, 1, None), False),
        ((10_000_000, 0, 0, 1, None), True),
        ((0, MIB - 1, 0, 1, None), False),
        ((0, MIB, 0, 1, None), True),
        ((0, 0, 0, 2, None), True),
        ((0, 0, 0, 1, 1), True),
        ((None, 0, 0, 1, None), True),
    ],
)
def test_news(new, expected):
    assert is_news((0, 0, 0, 1, None), new) is expected
    assert is_news(None, new)


def test_waits_longer_and_longer_while_nothing_happens():
    waits = [1.0]
    for _ in range(10):
        waits.append(next_wait_s(waits[-1], has_news=False))
    assert waits[1] == 1.5 and waits[-1] == resources.IDLE_S and waits == sorted(waits)
    assert next_wait_s(10.0, has_news=True) == resources.BUSY_S


async def test_samples_the_cell_at_once_and_a_step_when_it_closes():
    node, usage = Node(), Usage(cpu_ns=5)
    sampler = ResourceSampler(node)
    sampler.watch("c", lambda step: usage, scope)
    sampler.open_step("c", 3)
    last = sampler.close_step("c", 3, usage)
    assert [(type(e), e.scope.step, e.cpu_ns) for e in [*node.events, last]] == [
        (ResourceSample, None, 5),
        (ResourceSample, 3, 5),
    ]
    sampler.unwatch("c")
    assert sampler.close_step("c", 4, usage) is None
    assert len(node.events) == 1


async def test_looks_again_within_a_second_of_work():
    node, usage = Node(), Usage()
    sampler = ResourceSampler(node)
    sampler.watch("c", lambda step: usage, scope)
    usage.cpu_ns = 10**9
    await asyncio.sleep(resources.BUSY_S + 0.6)
    assert [e.cpu_ns for e in node.events] == [0, 10**9]
    sampler.stop()


async def test_a_cell_that_is_gone_and_a_ledger_that_fails():
    def gone(step):
        raise CellGone("ended")

    sampler = ResourceSampler(node := Node())
    sampler.watch("c", gone, scope)
    assert node.events == []
    sampler.stop()
    failing = Node(fails=True)
    sampler = ResourceSampler(failing)
    sampler.watch("c", lambda step: Usage(), scope)
    assert failing.failed == ["c"]
    sampler.stop()
