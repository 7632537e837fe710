"""What the door does with calls: steps before tool calls, branches, retries, budgets, holds, stop."""

import asyncio
import contextlib
import json

import msgspec
import pytest

from vallum.core.verdict import Decision
from vallum.gateway.kit import Canary, Credential, Kit, ModelBudget, ModelPrice
from vallum.testing.fakes.models import Said

CALL = Said(text="Listing.", calls=(("c1", "bash", {"command": "ls"}),))
DONE = Said(text="Done.")


def answer_of(response):
    return response.json()["choices"][0]["message"]


def result(call_id, words):
    return {"role": "tool", "tool_call_id": call_id, "content": words}


async def test_text_goes_on_at_once_and_tool_calls_wait_for_their_steps(agent):
    async with agent([msgspec.structs.replace(CALL, pause_s=0.05)]) as it:
        it.node.step_s = 0.3
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}], "tools": []}
        seen = []
        loop = asyncio.get_running_loop()
        headers = {"authorization": f"Bearer {it.door._door.capability}"}
        async with it.client.stream("POST", it.door.url + "/v1/chat/completions", json=body, headers=headers) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"] or [{"delta": {}}]
                    seen.append((loop.time(), delta[0]["delta"], list(it.node.log)))
        words = [entry for entry in seen if entry[1].get("content")]
        calls = [entry for entry in seen if entry[1].get("tool_calls")]
        assert words[0][2] == ["append opened"], "words went on before the reply was complete"
        assert all(log == ["append opened", "open_steps b1 c1", "append closed"] for _, _, log in calls)
        assert calls[0][0] - words[-1][0] > 0.25


async def test_no_tool_call_leaves_without_its_step(agent):
    async with agent([CALL, DONE]) as it:
        denied = await it.chat("hi", stream=True)
        assert "c1" in denied.text  # the twin: with a node, it goes on
        it.node.is_gone = True
        refused = await it.chat("hello", stream=False)
        assert refused.status_code == 503
        assert "c1" not in refused.text


async def test_the_next_request_of_the_branch_closes_its_steps(agent):
    async with agent([CALL, CALL, DONE]) as it:
        first = answer_of(await it.chat("go"))
        second = answer_of(await it.chat("go", first, result("c1", "a b")))
        await it.chat("go", first, result("c1", "a b"), second, result("c1", "c"))
        calls = [c for c in it.node.calls if c.state == "opened"]
        assert {c.branch for c in calls} == {"b1"}
        assert [c.known for c in calls] == [0, 2, 4]
        assert [c.parent for c in calls] == ["", calls[0].call, calls[1].call]
        assert [len(json.loads(c.messages)) for c in calls] == [1, 1, 1]
        assert [entry for entry in it.node.log if "steps" in entry] == [
            "open_steps b1 c1",
            "close_steps b1",
            "open_steps b1 c1",
            "close_steps b1",
        ]
        assert calls[0].tools
        assert not calls[1].tools, "tools are told once"


async def test_branches_that_nobody_comes_back_to_are_closed(agent, monkeypatch):
    monkeypatch.setattr("vallum.gateway.model.calls.MAX_OPEN_STEPS", 3)
    async with agent([CALL]) as it:
        for number in range(5):
            await it.chat(f"go {number}")
        assert [entry for entry in it.node.log if "close_" in entry] == ["close_steps b1", "close_steps b2"]


async def test_results_as_user_messages_go_on_in_the_branch(agent):
    async with agent([CALL, DONE]) as it:
        await it.chat("go")
        told = {"role": "assistant", "content": "I called bash: ls"}
        await it.chat("go", told, "Observation: a b")
        assert [c.branch for c in it.node.calls if c.state == "opened"] == ["b1", "b1"]
        assert "close_steps b1" in it.node.log


async def test_compaction_and_sub_agents_are_other_branches(agent):
    async with agent([CALL, DONE, CALL, DONE]) as it:
        first = answer_of(await it.chat("go"))
        await it.chat("You are a sub-agent: count.")  # while the parent's call runs
        assert "close_steps b1" not in it.node.log
        await it.chat("go", first, result("c1", "a"))
        await it.chat("Summary of what was done: listed.")
        assert [c.branch for c in it.node.calls if c.state == "opened"] == ["b1", "b2", "b1", "b3"]


async def test_an_agent_that_rewrites_its_history_is_found_by_its_calls(agent):
    async with agent([CALL, DONE]) as it:
        first = answer_of(await it.chat("go, it is 10:00"))
        await it.chat("go, it is 10:01", first, result("c1", "a"))
        opened = [c for c in it.node.calls if c.state == "opened"]
        assert opened[1].branch == "b2"
        assert opened[1].parent == opened[0].call
        assert "close_steps b1" in it.node.log


async def test_headers_tell_parallel_agents_apart(agent):
    async with agent([msgspec.structs.replace(DONE, wait_s=0.2)]) as it:
        headers = [{"x-claude-code-session-id": "s", "x-claude-code-agent-id": name} for name in ("a", "b")]
        await asyncio.gather(*(it.chat("same words", headers=h) for h in headers))
        assert {c.branch for c in it.node.calls} == {"b1", "b2"}
        assert {c.agent for c in it.node.calls} == {"s/a", "s/b"}
        assert len(it.server.requests) == 2


async def test_retries_make_one_call(agent):
    async with agent([msgspec.structs.replace(CALL, wait_s=0.2)]) as it:
        again = {"x-stainless-retry-count": "1"}
        replies = await asyncio.gather(it.chat("go"), it.chat("go", headers=again))
        replies.append(await it.chat("go", headers=again))
        assert len(it.server.requests) == 1
        assert len({reply.content for reply in replies}) == 1
        assert sum("open_steps" in entry for entry in it.node.log) == 1
        retries = [c for c in it.node.calls if c.retry_of]
        assert len(retries) == 2
        assert {c.retry_of for c in retries} == {c.call for c in it.node.calls if c.state == "opened"}
        await it.chat("go on")
        assert len(it.server.requests) == 2


async def test_a_call_goes_on_for_a_retry_when_its_agent_hangs_up(agent):
    async with agent([msgspec.structs.replace(CALL, wait_s=0.4)]) as it:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(it.chat("go"), 0.1)
        assert answer_of(await it.chat("go"))["tool_calls"][0]["id"] == "c1"
        assert len(it.server.requests) == 1


async def test_a_request_without_tools_opens_no_step(agent, script):
    said = script({"tool_calls": [{"name": "bash", "arguments": {}}]}, {"tools": False, "text": "A title"})
    async with agent([DONE], upstream="scripted", script=said) as it:
        assert answer_of(await it.chat("title?", tools=()))["content"] == "A title"
        assert not [entry for entry in it.node.log if "steps" in entry]
        assert answer_of(await it.chat("go"))["tool_calls"]


async def test_what_would_exceed_the_budget_is_not_asked(agent):
    async with agent([DONE], budget=ModelBudget(calls=2)) as it:
        assert (await it.chat("1")).status_code == 200
        assert (await it.chat("2")).status_code == 200
        refused = await it.chat("3")
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "model-budget"
        assert len(it.server.requests) == 2
        assert (it.node.calls[-1].state, it.node.calls[-1].rule) == ("denied", "model-budget")


async def test_tokens_and_money_are_counted_from_usage(agent):
    said = Said(text="x", prompt_tokens=1_000_000, completion_tokens=100_000, cached_tokens=400_000)
    price = ModelPrice(prompt_usd_micros=3_000_000, completion_usd_micros=15_000_000, cached_usd_micros=300_000)
    async with agent([said], price=price, budget=ModelBudget(usd_micros=3_500_000)) as it:
        await it.chat("1")
        assert it.node.calls[-1].cost_usd_micros == 600_000 * 3 + 400_000 * 3 // 10 + 100_000 * 15
        sent = it.server.requests[-1].body
        assert 0 < sent["max_tokens"] <= 3_500_000 // 15
        assert (await it.chat("2")).status_code == 200
        assert (await it.chat("3")).status_code == 403, "3.42 + 3.42 of 3.5 are used"


async def test_an_agent_that_goes_on_after_refusals_is_frozen_and_then_told_404(agent):
    async with agent([DONE], budget=ModelBudget(calls=0)) as it:
        statuses = [(await it.chat(f"{n}")).status_code for n in range(15)]
        assert statuses[0] == 403
        assert statuses[-1] == 404
        assert it.node.log.count("stop_agent") == 1
        assert it.server.requests == []


@pytest.mark.parametrize("pattern", ["ba*", "BASH"])  # agents may not mind the case, so neither do we
async def test_a_held_call_waits_for_a_person(agent, pattern):
    async with agent([CALL], hold_tools=(pattern,)) as it:
        it.node.hold_s = 0.2
        it.node.decisions = [Decision(verdict="allow", rule="person", reason="fine")]
        assert answer_of(await it.chat("go"))["tool_calls"]
        assert [entry.split()[0] for entry in it.node.log] == ["append", "hold", "open_steps", "append"]


async def test_a_refused_call_never_reaches_the_agent_and_the_model_answers_anew(agent):
    async with agent([CALL, DONE], hold_tools=("bash",)) as it:
        reply = await it.chat("go", stream=True)
        assert "c1" not in reply.text
        assert "Listing." not in reply.text
        assert "Do" in reply.text
        assert not [entry for entry in it.node.log if "steps" in entry]
        told = it.server.requests[-1].body["messages"]
        assert told[-2]["tool_calls"][0]["id"] == "c1"
        assert told[-1]["tool_call_id"] == "c1"
        assert "nobody answered" in told[-1]["content"]


async def test_three_new_answers_and_no_more(agent):
    async with agent([CALL], hold_tools=("bash",)) as it:
        reply = await it.chat("go")
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "model-hold"
        assert len(it.server.requests) == 4
        assert it.node.calls[-1].verdict == "deny"


async def test_a_long_hold_keeps_the_stream_alive(agent, monkeypatch):
    monkeypatch.setattr("vallum.gateway.model.answer.KEEP_ALIVE_S", 0.05)
    async with agent([CALL], hold_tools=("bash",)) as it:
        it.node.hold_s = 0.3
        it.node.decisions = [Decision(verdict="allow", rule="person", reason="fine")]
        reply = await it.chat("go", stream=True)
        assert reply.text.count(": keep-alive") >= 3
        assert "c1" in reply.text


async def test_the_key_and_headers_of_the_agent_stay_here(agent):
    kit = Kit(credentials=(Credential(name="k", hosts=("127.0.0.1",), secret=b"sk-real-secret"),))
    async with agent([DONE], kit=kit, credential="k", model="other", temperature=0.3) as it:
        reply = await it.chat("hi", headers={"x-evil": "1", "cookie": "a=b", "openai-organization": "o"})
        sent = it.server.requests[-1]
        assert sent.headers["authorization"] == "Bearer sk-real-secret"
        assert not {"x-evil", "cookie", "openai-organization", "user-agent"} & set(sent.headers)
        assert (sent.body["model"], sent.body["temperature"]) == ("other", 0.3)
        assert "sk-real" not in reply.text
        assert all("sk-real" not in repr(event) for event in it.node.events)


async def test_a_key_for_another_host_is_not_sent(agent):
    kit = Kit(credentials=(Credential(name="k", hosts=("api.example.test",), secret=b"sk-real-secret"),))
    async with agent([DONE], kit=kit, credential="k") as it:
        assert (await it.chat("hi")).status_code == 500
        assert it.server.requests == []
        assert it.node.calls[-1].rule == "credential"


async def test_a_canary_is_not_sent(agent):
    kit = Kit(canaries=(Canary(name="planted", value=b'line "one"\nline two'),))
    async with agent([DONE], kit=kit) as it:
        assert (await it.chat("nothing to see")).status_code == 200
        refused = await it.chat('the file says: line "one"\nline two')
        assert refused.status_code == 403
        assert it.node.calls[-1].rule == "canary"
        assert len(it.server.requests) == 1


async def test_token_ids_are_asked_for_and_kept(agent):
    said = Said(text="x", token_ids=(7, 8))
    async with agent([said], want_token_ids=True) as it:
        await it.chat("hi")
        assert it.server.requests[-1].body["return_token_ids"] is True
        closed = it.node.calls[-1]
        assert (closed.prompt_token_ids, closed.completion_token_ids, closed.logprobs) == (
            [1, 2, 3],
            [7, 8],
            [-0.5, -0.5],
        )


async def test_hosted_tools_are_stripped_unless_granted(agent):
    hosted = {"type": "web_search"}
    body = {
        "model": "m",
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://evil.test/?q=secret"}]}],
        "tools": [hosted, {"type": "mcp", "server_url": "https://evil.test"}, {"type": "brand_new"}],
    }
    async with agent([DONE]) as it:
        await it.post(body, "/v1/responses")
        sent = json.dumps(it.server.requests[-1].body)
        assert "evil.test" not in sent
        assert "web_search" not in sent
        assert it.node.calls[0].stripped == ["brand_new", "mcp", "url_content", "web_search"]
    async with agent([DONE], hosted=("web_search",)) as it:
        await it.post(body, "/v1/responses")
        assert it.server.requests[-1].body["tools"] == [hosted]


async def test_previous_response_id_is_what_was_said_here(agent):
    async with agent([CALL, DONE]) as it:
        first = (await it.post({"model": "m", "input": "go"}, "/v1/responses")).json()
        more = {
            "model": "m",
            "previous_response_id": first["id"],
            "input": [{"type": "function_call_output", "call_id": "c1", "output": "a b"}],
        }
        assert (await it.post(more, "/v1/responses")).status_code == 200
        sent = it.server.requests[-1].body
        assert [item["type"] for item in sent["input"]] == [
            "message",
            "message",
            "function_call",
            "function_call_output",
        ]
        assert sent["store"] is False
        assert [c.branch for c in it.node.calls] == ["b1"] * 4
        assert "close_steps b1" in it.node.log
        unknown = await it.post({**more, "previous_response_id": "resp_other"}, "/v1/responses")
        assert unknown.status_code == 400


async def test_a_recorded_run_is_replayed(agent):
    async with agent([CALL, DONE]) as it:
        first = answer_of(await it.chat("go"))
        last = answer_of(await it.chat("go", first, result("c1", "a b")))
        record = b"\n".join(msgspec.json.encode(event) for event in it.node.events)
    async with agent([DONE], upstream="replay", script=record) as it:
        assert answer_of(await it.chat("go"))["tool_calls"] == first["tool_calls"]
        assert answer_of(await it.chat("go", first, result("c1", "a b")))["content"] == last["content"]
        assert it.server.requests == []
        missed = await it.chat("something else")
        assert missed.status_code == 409
        assert "no reply to this request" in missed.json()["error"]["message"]


async def test_parallel_sub_agents_are_scripted_apart(agent, script):
    said = script(
        {"first": "count dogs", "text": "3 dogs", "delay_s": 0.2},
        {"first": "count cats", "text": "2 cats"},
        {"when": "boom", "error": {"status": 500, "message": "it burnt"}},
    )
    async with agent([DONE], upstream="scripted", script=said) as it:
        dogs, cats = await asyncio.gather(it.chat("count dogs"), it.chat("count cats"))
        assert (answer_of(dogs)["content"], answer_of(cats)["content"]) == ("3 dogs", "2 cats")
        assert (await it.chat("boom")).status_code == 500
        assert (await it.chat("more")).status_code == 409


async def test_small_questions(agent):
    async with agent([DONE], model="m-1") as it:
        auth = {"authorization": f"Bearer {it.door._door.capability}"}
        listed = await it.client.get(f"{it.door.url}/v1/models", headers=auth)
        assert [entry["id"] for entry in listed.json()["data"]] == ["m-1"]
        asked = {"model": "x", "messages": [{"role": "user", "content": "hello"}]}
        counted = await it.post(asked, "/v1/messages/count_tokens?beta=true")
        assert counted.json() == {"input_tokens": 11}
        assert it.server.requests[-1].body["model"] == "m-1"
        counted = await it.post({"contents": [{"parts": [{"text": "hello"}]}]}, "/v1beta/models/x:countTokens")
        assert counted.json() == {"totalTokens": 11}
        assert (await it.client.get(f"{it.door.url}/v1/files", headers=auth)).status_code == 404
        assert it.node.calls == []


async def test_hanging_up_early_is_not_free(agent, monkeypatch):
    monkeypatch.setattr("vallum.gateway.model.calls.ABANDONED_S", 0.05)
    async with agent([Said(text="word " * 400, pieces=100, pause_s=0.02)], budget=ModelBudget(tokens=100)) as it:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(it.chat("tell me everything", stream=True), 0.5)
        for _ in range(100):
            if it.node.calls[-1].state == "closed":
                break
            await asyncio.sleep(0.02)
        closed = it.node.calls[-1]
        assert (closed.state, closed.finish) == ("closed", "error")
        assert "nobody waited" in closed.reason
        assert closed.completion_tokens > 10
        for number in range(4):
            last = await it.chat(f"more {number}")
        assert last.status_code == 403


async def test_a_stream_that_stays_open_after_its_end_is_over(agent):
    end = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    raw = head + b"%x\r\n%b\r\n" % (len(end), end)
    async with agent([Said(raw=raw, linger_s=5)]) as it:
        began = asyncio.get_running_loop().time()
        assert '"x"' in (await it.chat("x", stream=True)).text
        assert asyncio.get_running_loop().time() - began < 2
