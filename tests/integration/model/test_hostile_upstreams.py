"""Upstreams that break off, hang, lie and talk nonsense: the agent gets a readable error or nothing, never half a call."""

import json

import httpx
import pytest

from vallum.gateway.kit import Credential, Kit, ModelDoor
from vallum.gateway.model import fetch
from vallum.testing.certificates import PrivateAuthority
from vallum.testing.fakes.models import FakeModels, Said
from vallum.testing.model_door import CAPABILITY, ModelDoorServer

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"


def chunk(delta, finish=None):
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"
    )


def part(index, call_id, name="bash", arguments="{}"):
    return {"tool_calls": [{"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}]}


CALL = chunk(part(0, "secret-call"))
END = chunk({}, "tool_calls") + b"data: [DONE]\n\n"
GOOD = HEAD + chunk({"content": "words"}) + CALL + END

BROKEN = {
    "cut in an event": HEAD + chunk({"content": "words"}) + CALL[:-9],
    "cut before the end": HEAD + chunk({"content": "words"}) + CALL,
    "not json": HEAD + CALL + b"data: {nonsense\n\n" + END,
    "not utf-8": HEAD + CALL + b"data: \xff\xfe\n\n" + END,
    "no object": HEAD + CALL + b"data: []\n\n" + END,
    "deep": HEAD + CALL + b"data: " + b'{"a":' * 20000 + b"\n\n",
    "two ids for one call": HEAD + CALL + chunk(part(0, "other")) + END,
    "one id for two calls": HEAD + CALL + chunk(part(1, "secret-call")) + END,
    "two choices": HEAD + CALL + b'data: {"choices":[{"delta":{}},{"delta":{}}]}\n\n' + END,
    "nameless call": HEAD + chunk(part(0, "secret-call", name="")) + END,
    "more after the end": GOOD + chunk(part(1, "late-call")),
    "error inside": HEAD + CALL + b'data: {"error":{"message":"overloaded"}}\n\n',
    "wrong types": HEAD + CALL + b'data: {"choices":[{"delta":{"content":5}}]}\n\n' + END,
}


@pytest.mark.parametrize("name", BROKEN)
async def test_no_call_of_a_broken_stream_reaches_the_agent(agent, name):
    async with agent([Said(raw=BROKEN[name])]) as it:
        body = b""
        with pytest.raises(httpx.TransportError):
            auth = {"authorization": f"Bearer {it.door._door.capability}"}
            asked = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
            async with it.client.stream(
                "POST", it.door.url + "/v1/chat/completions", json=asked, headers=auth
            ) as reply:
                async for piece in reply.aiter_bytes():
                    body += piece
        assert b"-call" not in body
        assert not [entry for entry in it.node.log if "steps" in entry]
        closed = it.node.calls[-1]
        assert (closed.state, closed.finish, closed.status) == ("closed", "error", 502)


async def test_the_same_stream_whole_goes_through(agent):
    async with agent([Said(raw=GOOD)]) as it:
        reply = await it.chat("x", stream=True)
        assert "secret-call" in reply.text
        assert "open_steps b1 secret-call" in it.node.log


WHOLE = {
    "empty": PLAIN,
    "html": PLAIN + b"<html>",
    "no choices": PLAIN + b'{"choices":[]}',
    "a list": PLAIN + b"[]",
    "too little": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{}",
    "compressed": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}",
    "no http": b"SSH-2.0-OpenSSH\r\n",
    "silence": b"",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 40000,
    "unasked stream": GOOD,
    "number as call": PLAIN + b'{"choices":[{"message":{"tool_calls":[5]}}]}',
}


@pytest.mark.parametrize("name", WHOLE)
async def test_nonsense_is_a_readable_502(agent, name):
    async with agent([Said(raw=WHOLE[name])]) as it:
        reply = await it.chat("x")
        assert reply.status_code == 502
        assert reply.json()["error"]["message"]
        assert it.node.calls[-1].finish == "error"


async def test_errors_of_the_upstream_are_passed_on_without_its_key(agent):
    async with agent([Said(status=429, text="slow down"), Said(status=401, text="bad key sk-123")]) as it:
        busy = await it.chat("1")
        assert (busy.status_code, "slow down" in busy.text) == (429, True)
        refused = await it.chat("2")
        assert refused.status_code == 502
        assert "sk-123" not in refused.text
        assert len(it.server.requests) == 2, "nothing is tried again by the door"


async def test_an_answer_without_end_is_cut(agent, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_REPLY_BYTES", 1024 * 1024)
    endless = [Said(raw=PLAIN + b'{"a": "' + b"x" * 8_000_000), Said(raw=HEAD + b"data: " + b"x" * 9_000_000)]
    async with agent(endless) as it:
        assert (await it.chat("1")).status_code == 502
        with pytest.raises(httpx.TransportError):
            await it.chat("2", stream=True)
        assert it.node.calls[-1].finish == "error"


REQUESTS = [
    b"",
    b"[]",
    b"{",
    b'{"model": "m"}',
    b'{"model": 5, "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "m", "messages": [{"role": "boss", "content": "x"}]}',
    b'{"model": "m", "messages": "x"}',
    b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}]}',
    b'{"model": "m", "n": 3, "messages": [{"role": "user", "content": "x"}]}',
    b'{"a":' * 5000,
    b"\xff\xfe",
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1beta/models/m:generateContent"]
)
async def test_nonsense_of_the_agent_is_a_readable_400(agent, path):
    async with agent([Said(text="x")]) as it:
        auth = {"authorization": f"Bearer {it.door._door.capability}"}
        for body in REQUESTS:
            if (b'"n": 3' in body or b"image_url" in body) and "chat" not in path:
                continue  # of that dialect only
            reply = await it.client.post(it.door.url + path, content=body, headers=auth)
            assert reply.status_code == 400, (path, body, reply.text)
            assert reply.json()["error"]["message"]
        assert "stop_agent" not in it.node.log


@pytest.mark.parametrize(
    ("names", "trusted", "status"),
    [(("localhost",), True, 200), (("localhost",), False, 502), (("other.test",), True, 502)],
    ids=["trusted", "unknown authority", "another's name"],
)
async def test_the_upstreams_certificate_is_verified_before_the_key_is_sent(names, trusted, status):
    authority = PrivateAuthority()
    server = FakeModels([Said(text="x")])
    server.tls = authority.serve(*names)
    async with server:
        kit = Kit(
            upstream_roots=authority.certificate_pem if trusted else b"",
            credentials=(Credential(name="k", hosts=("localhost",), secret=b"sk-secret"),),
        )
        url = f"https://localhost:{server.endpoints[0].port}"
        door = ModelDoor(upstream=url, capability=CAPABILITY, credential="k")
        async with ModelDoorServer(door, kit) as gateway, httpx.AsyncClient() as client:
            asked = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            reply = await client.post(
                f"{gateway.url}/v1/chat/completions", json=asked, headers={"authorization": f"Bearer {CAPABILITY}"}
            )
        assert reply.status_code == status
        if status == 200:
            assert server.requests[0].headers["authorization"] == "Bearer sk-secret"
        else:
            assert server.requests == []
            assert "certificate" in reply.json()["error"]["message"]
