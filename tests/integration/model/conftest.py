"""Plain requests to the door, as an agent without a client library would make them."""

import json
from contextlib import asynccontextmanager

import httpx
import pytest

from vallum.gateway.kit import ModelDoor
from vallum.testing.fakes.models import FakeModels
from vallum.testing.model_door import CAPABILITY, ModelDoorServer

TOOL = {"type": "function", "function": {"name": "bash", "description": "", "parameters": {"type": "object"}}}


class Agent:
    """Speaks chat completions."""

    def __init__(self, client, door, server):
        self.client, self.door, self.server = client, door, server
        self.node = door.node

    async def post(self, body, path="/v1/chat/completions", headers=()):
        return await self.client.post(
            self.door.url + path, json=body, headers={"authorization": f"Bearer {CAPABILITY}", **dict(headers)}
        )

    async def chat(self, *messages, headers=(), tools=(TOOL,), **more):
        said = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        return await self.post({"model": "m", "messages": said, "tools": list(tools), **more}, headers=headers)


@pytest.fixture
def agent():
    """Opens a door: ``async with agent(said, kit=..., **door) as it``."""

    @asynccontextmanager
    async def open_door(said, *, kit=None, choose=None, **door):
        async with FakeModels(said, choose=choose) as server:
            fields = {"upstream": server.url, "capability": CAPABILITY, **door}
            async with ModelDoorServer(ModelDoor(**fields), kit) as gateway, httpx.AsyncClient(timeout=20) as client:
                yield Agent(client, gateway, server)

    return open_door


@pytest.fixture
def script():
    return lambda *entries: json.dumps(entries).encode()
