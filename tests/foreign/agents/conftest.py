"""Agents of others, as the set-up installed them; a test of one that is not there is skipped with the reason."""

import json
import os

import pytest

import vallum
from vallum.agent.harness.catalog import find_harness
from vallum.agent.harness.install import cache_directory, is_installed, place_of
from vallum.agent.harness.work import work
from vallum.testing.target import Target, make_address


@pytest.fixture(scope="session")
def address():
    if os.geteuid() != 0:
        pytest.skip("needs root, for an address of its own")
    with make_address("192.0.2.78") as address:
        yield address


@pytest.fixture
def target(address):
    target = Target(address)
    yield target
    target.close()


class Worked:
    """What came of an agent's work."""

    def __init__(self, result, events):
        self.result, self.events = result, events
        self.steps = {}
        for event in self.of("tool.call", source="model"):
            values = json.loads(event["arguments"])
            self.steps[values.get("command") or values.get("cmd") or values.get("prompt")] = event["scope"]["step"]

    def of(self, kind, **wanted):
        return [e for e in self.events if e["kind"] == kind and all(e.get(k) == v for k, v in wanted.items())]

    def index(self, event):
        return self.events.index(event)

    def denied(self, port):
        """Last word of the process's command line -> the denied flow."""
        flows = self.of("net.flow", state="denied", dst_port=port)
        return {e["process"]["argv"][-1].rpartition("/")[2]: e for e in flows}

    def of_step(self, kind, step):
        return [e for e in self.of(kind) if e["scope"]["step"] == step]


@pytest.fixture
def run_agent(tmp_path):
    """Let an agent work by a script through the real gateway."""

    async def run(name, script, *, task="go", allow=(), timeout_s=80):
        harness = find_harness(name)
        cache = cache_directory(os.environ)
        if not is_installed(harness, cache):
            pytest.skip(f"{name} is not installed here: python -m vallum.agent.harness.install {name}")
        place = f"/opt/agents/{name}"
        model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
        async with vallum.Node(home=tmp_path) as node:
            mounts = [f"{place_of(harness, cache)}:{place}:ro"]
            async with node.sandbox(mounts=mounts, allow=allow, model=model, agent=name) as sb:
                result = await work(sb, harness, task, place=place, model="mock-1", timeout_s=timeout_s)
            events = await node.events(run=sb.run)
        assert result.exit_code == 0, (result.stdout[-2000:], result.stderr[-2000:])
        return Worked(result, events)

    return run
