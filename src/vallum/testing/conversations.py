"""Records of conversations with a model, as gateway and node write them: for tests of what reads them.

Where a request belongs is found by the gateway's own :class:`~vallum.gateway.model.branches.Branches`.
"""

from __future__ import annotations

import json
from typing import Any, cast

from vallum.core.events import (
    AnyEvent,
    ContainmentAction,
    EpisodeEnded,
    Finding,
    Flow,
    ModelCall,
    Record,
    StepClosed,
    StepOpened,
    ToolCall,
)
from vallum.core.messages import Message, Part, Reply, Text, Tool, ToolResult, Usage, encode
from vallum.core.messages import ToolCall as ProposedCall
from vallum.core.scope import Attribution
from vallum.gateway.model.branches import Branches
from vallum.testing.incident import BY_CGROUP, Tale

SHELL = Tool("bash", "run a command", '{"type":"object","properties":{"command":{"type":"string"}}}')


def say(role: str, words: str) -> Message:
    """A message of words."""
    return Message(cast(Any, role), (Text(words),))


def call(name: str, number: int, **arguments: object) -> ProposedCall:
    """A tool call ``c<number>``."""
    return ProposedCall(f"c{number}", name, json.dumps(arguments))


def tell(number: int, words: str) -> Message:
    """The result of ``c<number>``."""
    return Message("tool", (ToolResult(f"c{number}", (Text(words),)),))


class Conversations(Tale):
    """Tells model calls on the clock of a tale."""

    def __init__(self, run: str = "r-talk", episode: str = "e-0") -> None:
        super().__init__(run, episode)
        self._branches = Branches()
        self._calls = 0
        self._steps = 0

    def converse(
        self,
        messages: list[Message],
        *parts: Part,
        tools: tuple[Tool, ...] = (SHELL,),
        agent: str = "",
        **closing: Any,
    ) -> list[Message]:
        """A request and its reply; returns the conversation with the reply. Steps are opened for its tool calls."""
        self._calls += 1
        name = f"m{self._calls}"
        place = self._branches.place(name, tuple(messages), seed=agent, with_ids=True)
        known: dict[str, Any] = {
            "call": name,
            "verdict": "allow",
            "rule": "model-door",
            "reason": "",
            "dialect": "chat",
        }
        known |= {
            "model": "mock-1",
            "model_used": "mock-1.5",
            "branch": place.branch,
            "parent": place.parent,
            "agent": agent,
        }
        self.pass_ms(5)
        self.add(
            ModelCall(
                **self.fields(), state="opened", **known, known=place.known,
                messages=encode(tuple(messages[place.known :]), 1 << 20), tools=encode(tools, 1 << 20) if tools else "",
            )
        )  # fmt: skip
        self.pass_ms(20)
        reply = Reply(parts=tuple(parts), finish="tool_calls", usage=Usage(10, 5, 2))
        steps = [self.propose(one, name) for one in reply.tool_calls]
        self.add(
            ModelCall(
                **self.fields(), state="closed", **known, reply=encode(reply, 1 << 20), steps=steps,
                tool_calls=[one.id for one in reply.tool_calls], duration_ns=20_000_000,
                **{"finish": "tool_calls", "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 2, "cost_usd_micros": 150, **closing},
            )
        )  # fmt: skip
        message = Message("assistant", reply.parts)
        self._branches.answered(place, name, message, with_ids=True)
        return [*messages, message]

    def propose(self, one: ProposedCall, model_call: str) -> int:
        """Open the step of a tool call."""
        step, self._steps = self._steps, self._steps + 1
        self.add(StepOpened(**self.fields(step), cause="tool_call", cgroup_id=9000 + step))
        self.add(
            ToolCall(**self.fields(step), name=one.name, arguments=one.arguments, source="model", model_call=model_call)
        )
        return step

    def command(self, argv: list[str], code: int = 0) -> int:
        """A step that a client asked for, with no model; returns its number."""
        step, self._steps = self._steps, self._steps + 1
        started_ns, number = self.now_ns, self.open(step, argv)
        self.pass_ms(10)
        self.close(step, number, started_ns, code)
        return step

    def finish(self, step: int) -> None:
        """Close a step."""
        self.pass_ms(3)
        self.add(
            StepClosed(
                **self.fields(step), duration_ns=3_000_000, exit_code=0, cpu_ns=7_000_000, memory_peak_bytes=1 << 20, processes=1, left_running=0,
            )
        )  # fmt: skip

    def refuse(self, step: int | None, host: str = "pool.test", *, by: Attribution = BY_CGROUP) -> int:
        """A denied connection of a step."""
        process = self.start(step, ["curl", host]) if step is not None else None
        return self.add(
            Flow(
                **self.fields(step, by=by), state="denied", flow=f"f{len(self.events)}", verdict="deny", rule="default-deny",
                reason="no rule grants it", dst_ip="198.51.100.7", dst_port=3333, dst_host=host, protocol="stratum", bytes_out=0,
                bytes_in=0, process=process, decision_ns=300_000,
            )
        )  # fmt: skip

    def accuse(self, step: int, evidence: int) -> None:
        """A finding in a step."""
        self.add(
            Finding(
                **self.fields(step, by=BY_CGROUP), detector="mining.pool", title="Mining pool asked for", severity="high", attack=["T1496"],
                summary="it dialled a pool", evidence=[evidence],
            )
        )  # fmt: skip

    def kill(self, step: int | None, cause: int) -> None:
        """Containment stops a step, or the cell."""
        action: Any = "kill_cell" if step is None else "kill_step"
        self.add(
            ContainmentAction(
                **self.fields(step), action=action, target="cell", reason="mining", latency_ns=2_000_000, cause=cause
            )
        )

    def close_episode(self) -> None:
        """The cell ends."""
        self.pass_ms(5)
        self.add(EpisodeEnded(**self.fields(), reason="closed", survivors=0))

    def records(self) -> list[Record]:
        """What was told, numbered."""
        return number_events(self.events)


def number_events(events: list[AnyEvent]) -> list[Record]:
    """Events with their numbers."""
    return [Record(id=number, event=event) for number, event in enumerate(events)]
