"""Spans, and what a real OTLP/HTTP receiver gets of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from vallum.core.errors import InvalidInput, RecordError
from vallum.core.events import RunEnded
from vallum.core.messages import Text
from vallum.core.scope import BY_NODE, Scope
from vallum.record.export.base import ChosenRun
from vallum.record.export.otlp import OtlpJsonFormat, SpanSender, complete_endpoint, send_runs
from vallum.record.export.spans import Span, SpanTeller
from vallum.record.trajectory_fold import fold_trajectories
from vallum.testing.collector import Collector
from vallum.testing.conversations import Conversations, call, say, tell

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

SECRET = "the words of the task"


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with Collector() as made:
        yield made


def talk() -> Conversations:
    told = Conversations()
    asked = told.converse([say("user", SECRET)], Text("hm"), call("bash", 1, command=f"echo {SECRET}"))
    told.refuse(0)
    told.finish(0)
    told.refuse(0)
    told.converse([*asked, tell(1, "out")], Text("done"))
    told.close_episode()
    return told


def spans_of(told: Conversations, *, with_content: bool = False) -> dict[str, Span]:
    teller = SpanTeller(with_content=with_content)
    return {span.span_id.hex(): span for record in told.records() for span in teller.take(record)}


def chosen(told: Conversations) -> ChosenRun:
    records = told.records()
    return ChosenRun("r-talk", fold_trajectories(records)[1], lambda: iter(records))


def test_an_episode_is_a_trace_of_agent_calls_and_tools() -> None:
    spans = spans_of(talk())
    agent = next(span for span in spans.values() if span.name == "invoke_agent agent")
    chats = [span for span in spans.values() if span.name == "chat mock-1"]
    (tool,) = (span for span in spans.values() if span.name == "execute_tool bash")
    assert len({span.trace_id for span in spans.values()}) == 1
    assert [chat.parent_id for chat in chats] == [agent.span_id] * 2
    assert tool.parent_id == chats[0].span_id
    assert chats[0].attributes["gen_ai.usage.input_tokens"] == 10
    assert chats[0].attributes["gen_ai.response.model"] == "mock-1.5"
    assert tool.attributes["vallum.denied"] == 1
    assert [event.attributes["vallum.target"] for event in tool.events] == ["pool.test:3333"]
    assert agent.attributes["vallum.denied"] == 2
    assert [event.name for event in agent.events] == ["vallum.denied"]
    assert all(span.end_ns >= span.start_ns for span in spans.values())


def test_words_are_left_out_unless_asked_for() -> None:
    silent, open_ = spans_of(talk()), spans_of(talk(), with_content=True)
    assert SECRET not in str(silent)
    assert str(open_).count(SECRET) >= 2
    told = next(span for span in open_.values() if "gen_ai.input.messages" in span.attributes)
    messages = json.loads(str(told.attributes["gen_ai.input.messages"]))
    assert messages == [{"role": "user", "parts": [{"type": "text", "content": SECRET}]}]


def test_a_run_that_broke_off_still_ends_its_spans() -> None:
    told = Conversations()
    told.converse([say("user", "x")], call("bash", 1, command="sleep 9"))
    teller = SpanTeller()
    assert [span.name for record in told.records() for span in teller.take(record)] == ["chat mock-1"]
    assert [span.name for span in teller.finish("r-talk")] == ["execute_tool bash", "invoke_agent agent"]
    assert teller.finish("r-talk") == []


def test_a_receiver_gets_every_span_and_the_same_ones_again(receiver: Collector) -> None:
    for _ in range(2):
        sender = SpanSender(receiver.url)
        assert send_runs([chosen(talk())], sender, with_content=False) == 4
        sender.close()
    assert receiver.paths == ["/v1/traces"] * 2
    assert [span.span_id for span in receiver.spans[:4]] == [span.span_id for span in receiver.spans[4:]]
    names = sorted(span.name for span in receiver.spans[:4])
    assert names == ["chat mock-1", "chat mock-1", "execute_tool bash", "invoke_agent agent"]
    attributes = {one.key: one.value for span in receiver.spans for one in span.attributes}
    assert attributes["gen_ai.operation.name"].string_value
    assert SECRET.encode() not in b"".join(span.SerializeToString() for span in receiver.spans)


def test_a_collector_that_refuses_is_an_error(receiver: Collector) -> None:
    receiver.status = 400
    sender = SpanSender(receiver.url)
    with pytest.raises(RecordError, match="did not take"):
        send_runs([chosen(talk())], sender, with_content=False)
    sender.close()
    assert receiver.spans == []


def test_the_json_form_has_hex_ids_and_numbers(receiver: Collector) -> None:
    (file,) = OtlpJsonFormat().write([chosen(talk())])
    assert file.name == "r-talk.otlp.jsonl"
    request = json.loads(file.data)
    spans = request["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert {span["traceId"] for span in spans} == {next(iter(spans_of(talk()).values())).trace_id.hex()}
    assert all(isinstance(span["kind"], int) and len(span["spanId"]) == 16 for span in spans)


@pytest.mark.parametrize("url", ["", "localhost:4318", "file:///etc/passwd", "http://", "http://[x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="OTLP endpoint"):
        complete_endpoint(url)


def test_a_path_that_was_given_stays() -> None:
    assert complete_endpoint("https://c.test/otlp/v1/traces") == "https://c.test/otlp/v1/traces"
    assert complete_endpoint("http://c.test:4318/") == "http://c.test:4318/v1/traces"


def test_live_spans_are_sent_as_they_end(receiver: Collector) -> None:
    from vallum.node.telemetry import SpanFeed

    feed = SpanFeed(SpanSender(receiver.url))
    records = talk().records()
    feed.take(records[:-1])
    deadline = time.monotonic() + 10
    while len(receiver.spans) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(span.name for span in receiver.spans) == ["chat mock-1", "chat mock-1", "execute_tool bash"]
    feed.take(records[-1:])
    feed.stop()
    assert receiver.spans[-1].name == "invoke_agent agent"
    assert feed.forget("r-talk") == 0


def test_what_a_dead_collector_was_not_told_is_counted(receiver: Collector) -> None:
    from vallum.node.telemetry import SpanFeed

    receiver.status = 400
    feed = SpanFeed(SpanSender(receiver.url))
    told = talk()
    told.add(RunEnded(t_ns=1, mono_ns=1, scope=Scope(run="r-talk"), attribution=BY_NODE, outcome="finished"))
    feed.take(told.records())
    feed.stop()
    assert receiver.spans == []
    assert feed.forget("r-talk") == 4
