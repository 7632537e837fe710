"""A run as spans of the OpenTelemetry semantic conventions for generative AI. Pure, one record at a time.

Source: open-telemetry/semantic-conventions-genai (status: development). ``invoke_agent`` is an episode, ``chat`` a model
call, ``execute_tool`` a step. Ids are derived from run, episode and number, so that the same run exported twice is the same
trace. What the conventions have no name for is under ``vallum.*``.

What was said (messages, arguments) is left out unless asked for. Facts of a step that come after it closed are events of the
episode's span.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from vallum.core.events import (
    ContainmentAction,
    DnsQuery,
    EpisodeEnded,
    EpisodeStarted,
    Event,
    Finding,
    Flow,
    HttpRequest,
    McpCall,
    ModelCall,
    PacketDropped,
    ProcessStarted,
    Record,
    RunEnded,
    RunStarted,
    StepClosed,
    StepOpened,
    ToolCall,
)
from vallum.core.messages import Media, Message, Part, Reasoning, Reply, Text
from vallum.core.messages import ToolCall as ProposedCall
from vallum.core.text import show
from vallum.record.trajectory_fold import name_agent

Value = str | int | float | bool | list[str]

MAX_EVENTS = 64
"""Of one span; all are counted."""
MAX_TEXT = 65536
"""Characters of one attribute."""
_PROVIDERS = {"chat": "openai", "responses": "openai", "messages": "anthropic", "gemini": "gcp.gemini"}


@dataclass
class SpanEvent:
    """A moment within a span."""

    name: str
    t_ns: int
    attributes: dict[str, Value]


@dataclass
class Span:
    """A stretch of time with what is known of it."""

    name: str
    trace_id: bytes
    """16 bytes."""
    span_id: bytes
    """8 bytes."""
    parent_id: bytes | None
    kind: Literal["internal", "client"]
    start_ns: int
    """Wall clock."""
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[SpanEvent] = field(default_factory=list)
    error: str = ""
    """Why it failed; empty when it did not."""

    def add(self, name: str, t_ns: int, attributes: dict[str, Value]) -> None:
        """Note an event, as long as there is room."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(SpanEvent(name, t_ns, attributes))

    def count(self, name: str) -> None:
        """Add one to an attribute."""
        before = self.attributes.get(name, 0)
        self.attributes[name] = (before if isinstance(before, int) else 0) + 1


@dataclass
class _Episode:
    span: Span
    last_ns: int
    steps: dict[int, Span] = field(default_factory=dict)
    chats: dict[str, Span] = field(default_factory=dict)


class SpanTeller:
    """The state of the fold: spans that are open. Bounded by the steps and calls that are open at once."""

    def __init__(self, *, with_content: bool = False) -> None:
        self._with_content = with_content
        self._episodes: dict[tuple[str, str], _Episode] = {}
        self._agents: dict[str, tuple[str, str]] = {}
        self._take: dict[type[Event], Callable[[_Episode, Any], Span | None]] = {
            StepOpened: self._step_opened,
            StepClosed: self._step_closed,
            ToolCall: self._tool_call,
            ModelCall: self._model_call,
            ProcessStarted: self._process,
            Flow: self._attempt,
            HttpRequest: self._attempt,
            McpCall: self._attempt,
            DnsQuery: self._attempt,
            PacketDropped: self._attempt,
            Finding: self._finding,
            ContainmentAction: self._action,
        }

    def take(self, record: Record) -> list[Span]:
        """Tell one record more; the spans that are over with it."""
        event = record.event
        run, name = event.scope.run, event.scope.episode
        if name is None:
            if isinstance(event, RunStarted):
                self._agents[run] = name_agent(event.command), event.version
            if isinstance(event, RunEnded):
                self._agents.pop(run, None)
                return self.finish(run)
            return []
        episode = self._episodes.get((run, name))
        if episode is None:
            if isinstance(event, EpisodeEnded):
                return []
            episode = self._episodes[run, name] = self._begin(event, run, name)
        episode.last_ns = event.t_ns
        if isinstance(event, EpisodeEnded):
            episode.span.attributes["vallum.ended"] = event.reason
            return self._end(run, name)
        take = self._take.get(type(event))
        ended = take(episode, event) if take is not None else None
        return [ended] if ended is not None else []

    def finish(self, run: str) -> list[Span]:
        """End what is still open of a run, at the time of its last event."""
        return [span for key in list(self._episodes) if key[0] == run for span in self._end(*key)]

    def _begin(self, event: Event, run: str, name: str) -> _Episode:
        agent, version = self._agents.get(run, ("agent", ""))
        span = Span(
            name=f"invoke_agent {show(agent, 80)}",
            trace_id=_derive(16, run, name),
            span_id=_derive(8, run, name, "agent"),
            parent_id=None,
            kind="internal",
            start_ns=event.t_ns,
            attributes={
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.agent.name": show(agent, 200),
                "gen_ai.agent.id": f"{run}.{name}",
                "gen_ai.conversation.id": f"{run}.{name}",
                "vallum.run": run,
                "vallum.episode": name,
                "vallum.version": version,
                "vallum.denied": 0,
                "vallum.findings": 0,
                "vallum.processes": 0,
            },
        )
        if isinstance(event, EpisodeStarted):
            span.attributes |= {
                "vallum.image": event.image,
                "vallum.image_digest": event.image_digest,
                "vallum.level": event.level,
                "vallum.containment": event.containment,
            }
        return _Episode(span, event.t_ns)

    def _end(self, run: str, name: str) -> list[Span]:
        episode = self._episodes.pop((run, name))
        spans = [*episode.steps.values(), *episode.chats.values(), episode.span]
        for span in spans:
            span.end_ns = episode.last_ns
        return spans

    def _child(self, episode: _Episode, event: Event, name: str, *key: str) -> Span:
        return Span(
            name=name,
            trace_id=episode.span.trace_id,
            span_id=_derive(8, event.scope.run, event.scope.episode or "", *key),
            parent_id=episode.span.span_id,
            kind="internal",
            start_ns=event.t_ns,
            attributes={"vallum.run": event.scope.run, "vallum.episode": event.scope.episode or ""},
        )

    def _step_opened(self, episode: _Episode, event: StepOpened) -> None:
        step = event.scope.step
        if step is None:
            return
        span = episode.steps[step] = self._child(episode, event, f"execute_tool {event.cause}", "step", str(step))
        span.attributes |= {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": event.cause,
            "gen_ai.tool.type": "function",
            "vallum.step": step,
            "vallum.denied": 0,
            "vallum.findings": 0,
            "vallum.processes": 0,
        }
        if event.scope.tool_call:
            span.attributes["gen_ai.tool.call.id"] = event.scope.tool_call

    def _tool_call(self, episode: _Episode, event: ToolCall) -> None:
        span = episode.steps.get(event.scope.step) if event.scope.step is not None else None
        if span is None or "vallum.source" in span.attributes:
            return  # the step is named by the call that opened it
        span.name = f"execute_tool {show(event.name, 120)}"
        span.attributes |= {"gen_ai.tool.name": show(event.name, 200), "vallum.source": event.source}
        if event.model_call:
            span.parent_id = _derive(8, event.scope.run, event.scope.episode or "", "chat", event.model_call)
        if self._with_content:
            span.attributes["gen_ai.tool.call.arguments"] = event.arguments[:MAX_TEXT]

    def _step_closed(self, episode: _Episode, event: StepClosed) -> Span | None:
        span = episode.steps.pop(event.scope.step, None) if event.scope.step is not None else None
        if span is None:
            return None
        span.end_ns = event.t_ns
        for name, value in (
            ("vallum.exit_code", event.exit_code),
            ("vallum.cpu_ns", event.cpu_ns),
            ("vallum.memory_peak_bytes", event.memory_peak_bytes),
            ("vallum.left_running", event.left_running),
        ):
            if value is not None:
                span.attributes[name] = value
        return span

    def _model_call(self, episode: _Episode, event: ModelCall) -> Span | None:
        if event.retry_of:
            return None
        span = episode.chats.pop(event.call, None)
        if span is None:
            span = self._child(episode, event, f"chat {show(event.model, 120)}", "chat", event.call)
            span.kind = "client"
            span.attributes |= {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": _PROVIDERS.get(event.dialect, event.dialect),
                "gen_ai.request.model": show(event.model, 200),
                "gen_ai.conversation.id": f"{event.scope.run}.{event.scope.episode}.{event.branch}",
                "gen_ai.request.stream": event.stream,
                "vallum.model_call": event.call,
            }
            if self._with_content and event.messages:
                span.attributes["gen_ai.input.messages"] = write_messages(event.messages)[:MAX_TEXT]
        if event.state == "opened":
            episode.chats[event.call] = span
            return None
        span.end_ns = event.t_ns
        span.attributes |= {"gen_ai.response.model": show(event.model_used or event.model, 200)}
        if event.finish:
            span.attributes["gen_ai.response.finish_reasons"] = [event.finish]
        for name, value in (
            ("gen_ai.usage.input_tokens", event.prompt_tokens),
            ("gen_ai.usage.output_tokens", event.completion_tokens),
            ("gen_ai.usage.cache_read.input_tokens", event.cached_tokens),
            ("vallum.cost_usd_micros", event.cost_usd_micros),
            ("vallum.overhead_ns", event.overhead_ns),
        ):
            if value is not None:
                span.attributes[name] = value
        if event.policy_version:
            span.attributes["vallum.policy_version"] = show(event.policy_version, 200)
        if event.verdict != "allow" or event.finish == "error":
            span.error = show(f"{event.rule}: {event.reason}", 500)
        if self._with_content and event.reply:
            span.attributes["gen_ai.output.messages"] = write_reply(event.reply)[:MAX_TEXT]
        return span

    def _spans(self, episode: _Episode, event: Event) -> list[Span]:
        """Where a fact is counted: the episode, and its step while that is open."""
        step = episode.steps.get(event.scope.step) if event.scope.step is not None else None
        return [episode.span] if step is None else [episode.span, step]

    def _process(self, episode: _Episode, event: ProcessStarted) -> None:
        for span in self._spans(episode, event):
            span.count("vallum.processes")

    def _attempt(self, episode: _Episode, event: Flow | HttpRequest | McpCall | DnsQuery | PacketDropped) -> None:
        state = getattr(event, "state", "denied" if event.verdict != "allow" else "")
        if state != "denied":
            return
        spans = self._spans(episode, event)
        for span in spans:
            span.count("vallum.denied")
        attributes: dict[str, Value] = {"vallum.rule": event.rule, "vallum.target": _target(event)}
        if event.scope.step is not None:
            attributes["vallum.step"] = event.scope.step
        spans[-1].add("vallum.denied", event.t_ns, attributes)

    def _finding(self, episode: _Episode, event: Finding) -> None:
        spans = self._spans(episode, event)
        for span in spans:
            span.count("vallum.findings")
        attributes: dict[str, Value] = {"vallum.detector": event.detector, "vallum.severity": event.severity}
        attributes |= {"vallum.title": event.title, "vallum.attack": event.attack}
        if event.scope.step is not None:
            attributes["vallum.step"] = event.scope.step
        spans[-1].add("vallum.finding", event.t_ns, attributes)

    def _action(self, episode: _Episode, event: ContainmentAction) -> None:
        span = self._spans(episode, event)[-1]
        span.add("vallum.action", event.t_ns, {"vallum.action": event.action, "vallum.reason": event.reason})
        if event.action in ("kill_step", "kill_cell"):
            span.error = show(f"{event.action}: {event.reason}", 500)


def _derive(size: int, *names: str) -> bytes:
    return hashlib.sha256("\n".join(names).encode()).digest()[:size]


def _target(event: Flow | HttpRequest | McpCall | DnsQuery | PacketDropped) -> str:
    if isinstance(event, DnsQuery):
        return show(f"{event.qname} {event.qtype}", 300)
    if isinstance(event, HttpRequest):
        return show(f"{event.method} {event.scheme}://{event.host}:{event.port}", 300)
    if isinstance(event, McpCall):
        return show(f"{event.server} {event.tool}", 300)
    host = getattr(event, "dst_host", None) or event.dst_ip
    return show(f"{host}:{event.dst_port}" if event.dst_port is not None else host, 300)


def write_messages(text: str) -> str:
    """Messages of the record as ``gen_ai.input.messages``; what cannot be read stands as it is."""
    try:
        messages = msgspec.json.decode(text, type=tuple[Message, ...])
    except (msgspec.MsgspecError, RecursionError):
        return text
    told = [{"role": message.role, "parts": [_describe_part(part) for part in message.parts]} for message in messages]
    return msgspec.json.encode(told).decode()


def write_reply(text: str) -> str:
    """A reply of the record as ``gen_ai.output.messages``."""
    try:
        reply = msgspec.json.decode(text, type=Reply)
    except (msgspec.MsgspecError, RecursionError):
        return text
    parts = [_describe_part(part) for part in reply.parts]
    return msgspec.json.encode([{"role": "assistant", "parts": parts, "finish_reason": reply.finish}]).decode()


def _describe_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "content": part.text}
    if isinstance(part, Reasoning):
        return {"type": "reasoning", "content": part.text}
    if isinstance(part, Media):
        return {"type": "media", "mime_type": part.media_type, "digest": part.digest, "uri": part.url}
    if isinstance(part, ProposedCall):
        return {"type": "tool_call", "id": part.id, "name": part.name, "arguments": part.arguments}
    words = "".join(one.text for one in part.parts if isinstance(one, Text))
    return {"type": "tool_call_response", "id": part.call, "response": words}
