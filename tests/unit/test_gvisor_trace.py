"""Whom a flow of a gvisor cell is charged to: the rule of vallum.sensors.gvisor_trace, by its own words."""

import pytest

from vallum.core.errors import RecordError
from vallum.core.events import ProcessExited, ProcessStarted, SensorStatus
from vallum.core.scope import Attribution, Scope
from vallum.sensors.gvisor_trace import GvisorTrace
from vallum.sensors.procfs import ARGV_ARGS

CELL = Scope(run="r", episode="e")


class House:
    """The node as the sensor sees it: steps by pid, and a list for a ledger."""

    def __init__(self):
        self.steps = {}
        self.events = []
        self.failed = []
        self.is_full = False

    def emit(self, event):
        if self.is_full:
            raise RecordError("no space")
        self.events.append(event)
        return len(self.events)

    def scope_of_pid(self, cell, pid):
        step = self.steps.get(pid)
        if step is None:
            return CELL, Attribution(method="netns", confidence=0.5)
        return Scope(run="r", episode="e", step=step), Attribution(method="lineage", confidence=0.9)

    def record_failed(self, cell, error):
        self.failed.append(cell)


@pytest.fixture
def house():
    return House()


@pytest.fixture
def lost():
    return [0]


@pytest.fixture
def sensor(house):
    return GvisorTrace(house)


@pytest.fixture
def told(sensor, lost):
    return sensor.watch("c", CELL, lambda: lost[0])


def ask(sensor, host="10.0.0.1", port=443, protocol="tcp"):
    scope, attribution, process, _ = sensor.attribute("c", protocol=protocol, dst=(host, port))
    return scope.step, attribution.method, attribution.confidence, process.pid if process else None


def test_processes_become_events(house, told):
    house.steps[7] = 2
    told.started(7, 1, "/bin/sh", ["sh"], 1000)
    told.exited(7, 9)
    told.exited(8, 0)
    status, started, ended = house.events
    assert isinstance(status, SensorStatus)
    assert isinstance(started, ProcessStarted)
    assert (started.scope.step, started.process.argv, started.sensor) == (2, ["sh"], "gvisor_trace")
    assert isinstance(ended, ProcessExited)
    assert (ended.exit_code, ended.signal) == (None, 9)


def test_one_step(house, sensor, told):
    house.steps = {7: 2, 8: 2}
    told.started(7, 1, "/bin/a", ["a"], 0)
    told.connected(7, "10.0.0.1", 443)
    told.connected(8, "10.0.0.1", 443)
    assert ask(sensor) == (2, "lineage", 0.9, 7)
    assert ask(sensor)[:3] == (2, "lineage", 0.9)
    assert ask(sensor) == (None, "netns", 0.5, None), "every report is claimed once"
    assert ask(sensor, port=80)[0] is None


def test_the_step_is_that_of_the_moment(house, sensor, told):
    house.steps[7] = 2
    told.connected(7, "::ffff:10.0.0.1", 443)
    house.steps[7] = 3
    assert ask(sensor)[0] == 2


def test_several_steps_are_a_guess_and_say_so(house, sensor, told):
    house.steps = {7: 2, 8: 5}
    told.connected(7, "10.0.0.1", 443)
    told.connected(8, "10.0.0.1", 443)
    assert ask(sensor)[::2] == (2, 0.3)
    assert ask(sensor)[:3] == (5, "lineage", 0.9)


def test_a_resolver_asks_more_than_once(house, sensor, told):
    house.steps[7] = 2
    told.connected(7, "127.0.0.53", 53)
    for _ in range(3):
        assert ask(sensor, "127.0.0.53", 53, "udp")[0] == 2


def test_lost_reports_lower_what_is_said(house, sensor, told, lost):
    house.steps[7] = 2
    told.connected(7, "10.0.0.1", 443)
    lost[0] = 3
    assert ask(sensor)[::2] == (2, 0.3)
    told.started(7, 1, "/bin/a", ["a"], 0)
    assert [e.state for e in house.events if isinstance(e, SensorStatus)] == ["watching", "degraded"]


def test_endless_arguments_are_cut(house, told):
    told.started(7, 1, "/bin/a", ["x"] * 4000, 0)
    argv = house.events[-1].process.argv
    assert len(argv) == ARGV_ARGS + 1
    assert "not kept" in argv[-1]


def test_what_cannot_be_recorded_ends_the_cell(house, sensor, told):
    house.is_full = True
    told.started(7, 1, "/bin/a", ["a"], 0)
    assert house.failed == ["c"]
    told.connected(7, "10.0.0.1", 443)
    assert not sensor.has("c")
