"""The door of real cells, through the public face."""

import json
import os

import pytest

import vallum
from vallum.testing.fakes.models import FakeModels, Said

pytestmark = pytest.mark.root

ASK = """
import json, os, sys, urllib.error, urllib.request
body = {"model": "m", "messages": [{"role": "user", "content": sys.argv[2]}],
        "tools": [{"type": "function", "function": {"name": "bash"}}]}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
    {"authorization": "Bearer " + (sys.argv[1] or os.environ["OPENAI_API_KEY"]), "content-type": "application/json"})
try:
    print(urllib.request.urlopen(request, timeout=20).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
SAID = Said(calls=(("c1", "bash", {"command": "ls"}),))


@pytest.fixture
async def node():
    if os.geteuid() != 0:
        pytest.skip("needs root, as cells with a gateway do")
    async with vallum.Node() as node:
        yield node


async def ask(cell, words, key=""):
    done = await cell.exec(["python3", "-c", ASK, key, words], timeout_s=30)
    assert done.exit_code == 0, done.stderr
    return done.step, done.stdout.decode()


async def key_of(cell):
    return (await cell.exec(["sh", "-c", "printf %s $OPENAI_API_KEY"], timeout_s=10)).stdout.decode()


async def events_of(node, cell, **wanted):
    events = await node.events(run=cell.run, episode=cell.episode)
    return [e for e in events if all(e.get(key) == value for key, value in wanted.items())]


async def test_a_key_opens_the_door_of_its_own_cell_only(node):
    async with FakeModels([SAID]) as server:
        model = vallum.Model(upstream=server.url)
        async with node.sandbox(model=model) as one, node.sandbox(model=model) as other:
            stolen = await key_of(one)
            assert stolen != await key_of(other)
            step, said = await ask(other, "with a stolen key", stolen)
            assert said.startswith("401 ")
            assert server.requests == []
            (denied,) = await events_of(node, other, kind="model.call")
            assert (denied["state"], denied["rule"], denied["scope"]["step"]) == ("denied", "model-capability", step)
            assert await events_of(node, one, kind="model.call") == []
            _, said = await ask(other, "with its own")  # the twin
            assert json.loads(said)["choices"][0]["message"]["tool_calls"][0]["id"] == "c1"


async def test_a_tool_call_has_its_step_in_the_record_before_the_agent_has_it(node):
    async with FakeModels([SAID]) as server, node.sandbox(model=vallum.Model(upstream=server.url)) as cell:
        asked_in, _ = await ask(cell, "go")
        events = await events_of(node, cell)
        kinds = [(e["kind"], e.get("state", "")) for e in events]
        order = [
            kinds.index(("http.request", "opened")),
            kinds.index(("model.call", "opened")),
            next(i for i, e in enumerate(events) if e["kind"] == "tool.call" and e["source"] == "model"),
            kinds.index(("model.call", "closed")),
            kinds.index(("http.request", "closed")),
        ]
        assert order == sorted(order)
        (closed,) = await events_of(node, cell, kind="model.call", state="closed")
        (called,) = await events_of(node, cell, kind="tool.call", source="model")
        assert closed["scope"]["step"] == asked_in
        assert closed["steps"] == [called["scope"]["step"]]
        assert called["model_call"] == closed["call"]


async def test_the_budget_of_an_episode_is_kept_over_connections_and_hosts(node):
    async with FakeModels([Said(text="x")]) as server:
        model = vallum.Model(upstream=server.url, budget=vallum.ModelBudget(calls=2))
        async with node.sandbox(model=model) as cell:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "from the host"}]}).encode()
            assert (await cell.model_request("/v1/chat/completions", body)).status == 200
            assert not (await ask(cell, "one"))[1].startswith("403 ")
            _, said = await ask(cell, "two")
            assert said.startswith("403 ")
            assert "model-budget" in said
            assert len(server.requests) == 2


async def test_a_cell_without_a_model_has_no_such_name(node):
    async with node.sandbox() as cell:
        done = await cell.exec(
            ["sh", "-c", "getent hosts model.vallum.internal; echo ${OPENAI_API_KEY:-none}"], timeout_s=10
        )
        assert done.stdout == b"none\n"


async def test_the_upstream_key_is_nowhere_near_the_guest(node, tmp_path):
    async with FakeModels([Said(text="x")]) as server, node.sandbox(model=vallum.Model(upstream=server.url)) as cell:
        await ask(cell, "hello")
        (sent,) = server.requests
        assert "authorization" not in sent.headers, "without a credential none is sent, the agent's least of all"
        assert await key_of(cell) not in json.dumps([sent.headers, sent.body])
