"""The providers' own client libraries, in every dialect, against the door, whatever the upstream speaks."""

import json

import anthropic
import openai
import pytest
from google import genai
from google.genai import types

from vallum.gateway.kit import ModelDoor
from vallum.testing.fakes.models import FakeModels, Said
from vallum.testing.model_door import CAPABILITY, ModelDoorServer

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
SAID = Said(
    text="I look at the files.",
    thinking="Which files?",
    calls=(("call_a", "bash", {"command": "ls -l"}), ("call_b", "bash", {"command": "pwd"})),
    prompt_tokens=20,
    completion_tokens=9,
    cached_tokens=5,
)
UPSTREAMS = ("same", "chat", "responses", "messages", "gemini", "scripted")
SCRIPT = json.dumps(
    [
        {
            "text": SAID.text,
            "reasoning": SAID.thinking,
            "tool_calls": [{"name": n, "arguments": a, "id": i} for i, n, a in SAID.calls],
        }
    ]
).encode()


async def ask_chat(url, *, stream):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=CAPABILITY, max_retries=0) as client:
        asked = {
            "model": "gpt-x",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which files?"}],
            "tools": [{"type": "function", "function": {"name": "bash", "description": "runs", "parameters": SCHEMA}}],
        }
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                async for _ in events:
                    pass
                reply = await events.get_final_completion()
        else:
            reply = await client.chat.completions.create(**asked)
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        return message.content, [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls]


async def ask_responses(url, *, stream):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=CAPABILITY, max_retries=0) as client:
        asked = {
            "model": "gpt-x",
            "instructions": "Be brief.",
            "input": "Which files?",
            "tools": [{"type": "function", "name": "bash", "parameters": SCHEMA, "strict": False}],
        }
        if stream:
            async with client.responses.stream(**asked) as events:
                kinds = [event.type async for event in events]
                reply = await events.get_final_response()
            assert kinds[0] == "response.created"
            assert kinds[-1] == "response.completed"
        else:
            reply = await client.responses.create(**asked)
        assert reply.status == "completed"
        calls = [item for item in reply.output if item.type == "function_call"]
        return reply.output_text, [(c.name, json.loads(c.arguments)) for c in calls]


async def ask_messages(url, *, stream):
    async with anthropic.AsyncAnthropic(base_url=url, api_key=CAPABILITY, max_retries=0) as client:
        asked = {
            "model": "claude-x",
            "max_tokens": 500,
            "system": "Be brief.",
            "messages": [{"role": "user", "content": "Which files?"}],
            "tools": [{"name": "bash", "description": "runs", "input_schema": SCHEMA}],
        }
        if stream:
            async with client.messages.stream(**asked) as events:
                reply = await events.get_final_message()
        else:
            reply = await client.messages.create(**asked)
        assert reply.stop_reason == "tool_use"
        text = "".join(block.text for block in reply.content if block.type == "text")
        return text, [(block.name, block.input) for block in reply.content if block.type == "tool_use"]


async def ask_gemini(url, *, stream):
    client = genai.Client(api_key=CAPABILITY, http_options=types.HttpOptions(base_url=url))
    declared = types.FunctionDeclaration(name="bash", description="runs", parameters_json_schema=SCHEMA)
    config = types.GenerateContentConfig(
        system_instruction="Be brief.",
        tools=[types.Tool(function_declarations=[declared])],
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )
    asked = {"model": "gemini-x", "contents": "Which files?", "config": config}
    try:
        if stream:
            chunks = [chunk async for chunk in await client.aio.models.generate_content_stream(**asked)]
        else:
            chunks = [await client.aio.models.generate_content(**asked)]
        assert chunks[-1].candidates[0].finish_reason == "STOP"
        parts = [part for chunk in chunks for part in (chunk.candidates[0].content.parts or [])]
    finally:
        await client.aio.aclose()
    text = "".join(part.text for part in parts if part.text and not part.thought)
    return text, [(p.function_call.name, dict(p.function_call.args)) for p in parts if p.function_call]


ASK = {"chat": ask_chat, "responses": ask_responses, "messages": ask_messages, "gemini": ask_gemini}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dialect", ASK)
@pytest.mark.filterwarnings("default")  # of the client libraries
async def test_clients_read_the_door(dialect, upstream, stream):
    async with FakeModels([SAID]) as server:
        if upstream == "scripted":
            door = ModelDoor(upstream="scripted", capability=CAPABILITY, script=SCRIPT)
        else:
            door = ModelDoor(upstream=server.url, dialect=upstream, capability=CAPABILITY)
        async with ModelDoorServer(door) as gateway:
            text, calls = await ASK[dialect](gateway.url, stream=stream)
            opened, closed = gateway.node.calls
    assert text == SAID.text
    assert calls == [(name, arguments) for _, name, arguments in SAID.calls]
    assert gateway.node.log[0] == "append opened"
    assert gateway.node.log[1].startswith(f"open_steps {opened.branch} ")
    assert gateway.node.log[2] == "append closed"
    assert (opened.dialect, opened.stream, closed.finish, closed.steps) == (dialect, stream, "tool_calls", [0, 1])
    assert "Which files?" in opened.messages
    assert SAID.text in closed.reply
    assert len(set(closed.tool_calls)) == 2
    if upstream != "scripted":
        assert (closed.prompt_tokens, closed.completion_tokens, closed.cached_tokens) == (20, 9, 5)
        assert all(CAPABILITY not in json.dumps([r.headers, r.body, r.target]) for r in server.requests)


@pytest.mark.parametrize("upstream", ["chat", "responses", "messages", "gemini"])
@pytest.mark.parametrize("dialect", ASK)
@pytest.mark.filterwarnings("default")
async def test_a_wrong_key_opens_nothing(dialect, upstream, monkeypatch):
    async with FakeModels([SAID]) as server:
        door = ModelDoor(upstream=server.url, dialect=upstream, capability="another-cells-key")
        async with ModelDoorServer(door) as gateway:
            with pytest.raises(
                (openai.AuthenticationError, anthropic.AuthenticationError, genai.errors.ClientError)
            ) as error:
                await ASK[dialect](gateway.url, stream=False)
            (denied,) = gateway.node.calls
        assert "401" in str(error.value)
        assert (denied.state, denied.verdict, denied.rule) == ("denied", "deny", "model-capability")
        assert all(count.is_nothing() for count in server.received.values())
