"""The loop: ask the model, run the tools it asks for, tell it what happened, until it submits or a limit is reached.

Flow is by exceptions where the conversation ends (:class:`Submitted`, :class:`LimitReached`) and by messages where it
goes on (a refused, failed or malformed call is told to the model). Every call of a tool is one step of the cell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vallum.agent.approval import Approval, make_approval
from vallum.agent.compaction import Compaction, Summary
from vallum.agent.hooks import Hook
from vallum.agent.limits import Limits, Meter
from vallum.agent.messages import Message, Reply, ToolCall, Usage
from vallum.agent.models.base import Model, ModelError
from vallum.agent.tools.base import BadArguments, Submitted, Tool, ToolError, clip
from vallum.agent.transcript import Transcript
from vallum.core.errors import Contained

Status = Literal["submitted", "limit", "format", "model", "contained"]

SYSTEM = """\
You are an agent that solves a task with tools in a Linux sandbox. Work in small steps, look at what each one did, and \
check the result before you submit it with the `submit` tool. Every reply must call at least one tool.

What the sandbox may reach is decided by rules. A connection that is not granted is refused at once, with the rule and \
the reason; it is recorded, and trying other ways to the same end is recorded, too. If you need something that is not \
granted, say so when you submit."""

_NO_CALL = "The reply called no tool. Call one of: {names}. When the task is done, call `submit`."


class LimitReached(Exception):
    """The agent may not go on."""


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    status: Status
    """``submitted``, ``limit`` (said in ``detail``), ``format`` (no usable call), ``model`` (it could not be asked),
    ``contained`` (the cell was stopped)."""
    answer: str
    detail: str
    turns: int
    usage: Usage
    messages: list[Message] = field(repr=False)


class Observer:
    """Told what happens, for a terminal or a log. Every method may be overridden; none may raise."""

    def turn_started(self, number: int, depth: int) -> None:
        """The model is asked for the ``number``-th time (from 1); ``depth`` 1 is a sub-agent."""

    def replied(self, reply: Reply, depth: int) -> None:
        """The model answered."""

    def call_started(self, call: ToolCall, depth: int) -> None:
        """A tool is about to run."""

    def call_ended(self, call: ToolCall, result: str, ok: bool, depth: int) -> None:
        """A tool has run, was refused, or failed."""

    def compacted(self, before: int, after: int) -> None:
        """The conversation has ``after`` messages instead of ``before``."""


class Agent:
    """One conversation.

    Args:
        model: who is asked.
        tools: what it may ask for. ``submit`` should be among them.
        limits: how far it may go; ``meter`` is given by whoever shares one (a sub-agent).
        hooks: called in order before, in reverse after each tool call.
    """

    def __init__(
        self,
        model: Model,
        tools: Sequence[Tool],
        *,
        limits: Limits | None = None,
        system: str = SYSTEM,
        approval: Approval | None = None,
        hooks: Sequence[Hook] = (),
        compaction: Compaction | None = None,
        transcript: Transcript | None = None,
        observer: Observer | None = None,
        meter: Meter | None = None,
        depth: int = 0,
    ) -> None:
        self.model = model
        self.tools = {tool.spec.name: tool for tool in tools}
        self.limits = (limits or Limits()).check()
        self.meter = meter or Meter(self.limits)
        self.messages: list[Message] = []
        self.turns = 0
        self._system = system
        self._approval = approval or make_approval("all")
        self._hooks = list(hooks)
        self._compaction = compaction or Summary()
        self._transcript = transcript or Transcript()
        self._observer = observer or Observer()
        self._depth = depth
        self._malformed = 0
        self._prompt_tokens = 0

    async def run(self, task: str) -> Outcome:
        """Work on a task until it ends. Called again, it goes on in the same conversation."""
        if not self.messages:
            self._add(Message(role="system", content=self._system))
        self._add(Message(role="user", content=task))
        return await self.resume()

    async def resume(self, messages: Sequence[Message] = (), used: Usage | None = None) -> Outcome:
        """Go on, from ``messages`` (of a transcript) when given."""
        if messages:
            self.messages = list(messages)
        if used is not None:
            self.meter.add(used)
        status: Status = "submitted"
        answer = detail = ""
        try:
            async with asyncio.timeout(self.meter.left_s()):
                while True:
                    await self._turn()
        except Submitted as end:
            answer = end.answer
        except LimitReached as end:
            status, detail = ("format" if self._malformed >= self.limits.format_errors else "limit"), str(end)
        except TimeoutError:
            status, detail = "limit", f"{self.limits.wall_s:g} s are over"
        except ModelError as error:
            status, detail = "model", str(error)
        except Contained as error:
            status, detail = "contained", str(error)
        return Outcome(status, answer, detail, self.turns, self.meter.used, self.messages)

    async def close(self) -> None:
        """Let the tools go."""
        for tool in self.tools.values():
            await tool.close()

    # ------------------------------------------------------------------ one turn

    async def _turn(self) -> None:
        self._check_limits()
        await self._compact()
        self.turns += 1
        self._observer.turn_started(self.turns, self._depth)
        reply = await self.model.reply(self.messages, [tool.spec for tool in self.tools.values()])
        self.meter.add(reply.usage)
        self._transcript.count(reply.usage)
        self._prompt_tokens = reply.usage.prompt_tokens
        self._add(reply.message)
        self._observer.replied(reply, self._depth)
        if not reply.message.tool_calls:
            self._note_malformed()
            hint = "It was cut off because it was too long. " if reply.finish == "length" else ""
            self._add(Message(role="user", content=hint + _NO_CALL.format(names=", ".join(self.tools))))
            return
        await self._run_calls(reply.message.tool_calls)

    def _check_limits(self) -> None:
        if self._malformed >= self.limits.format_errors:
            raise LimitReached(f"{self._malformed} replies in a row had no usable tool call")
        if self.limits.turns is not None and self.turns >= self.limits.turns:
            raise LimitReached(f"{self.turns} turns are over")
        spent = self.meter.spent()
        if spent is not None:
            raise LimitReached(spent)

    async def _compact(self) -> None:
        before = self.messages
        self.messages, usage = await self._compaction.compact(before, self._prompt_tokens, self.model)
        if self.messages is not before:
            self.meter.add(usage)
            self._transcript.replace(self.messages)
            self._observer.compacted(len(before), len(self.messages))
            self._prompt_tokens = 0

    # ------------------------------------------------------------------ its calls

    async def _run_calls(self, calls: Sequence[ToolCall]) -> None:
        """Run them in order; those that may be side by side, side by side. Each gets its result, also when one submits."""
        usable = 0
        at = 0
        while at < len(calls):
            batch = self._batch(calls[at:])
            done = await asyncio.gather(*(self._run_call(call) for call in batch), return_exceptions=True)
            at += len(batch)
            for call, result in zip(batch, done, strict=True):
                if isinstance(result, BaseException):
                    for left in calls[calls.index(call) :]:
                        self._add(Message(role="tool", tool_call_id=left.id, content="(the work ended here)"))
                    raise result
                text, is_usable = result
                usable += is_usable
                self._add(Message(role="tool", tool_call_id=call.id, content=text))
        if usable:
            self._malformed = 0
        else:
            self._note_malformed()

    def _batch(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        """The first call, and those right after it that may run beside it."""
        count = 0
        while count < len(calls) and (tool := self.tools.get(calls[count].name)) is not None and tool.is_parallel:
            count += 1
        return calls[: max(1, count)]

    async def _run_call(self, call: ToolCall) -> tuple[str, bool]:
        """(what the model is told, whether the call was usable)."""
        self._observer.call_started(call, self._depth)
        tool = self.tools.get(call.name)
        ok = is_usable = False
        if tool is None:
            text = f"there is no tool {call.name!r}: use one of {', '.join(self.tools)}"
        elif (why := await self._refusal(call, tool)) is not None:
            text, is_usable = f"refused: {why}", True
        else:
            try:
                text = await tool.call(call.id, call.arguments)
                for hook in reversed(self._hooks):
                    text = await hook.after(call, text)
                ok = is_usable = True
            except BadArguments as error:
                text = str(error)
            except ToolError as error:
                text, is_usable = str(error), True
        text = clip(text)
        self._observer.call_ended(call, text, ok, self._depth)
        return text, is_usable

    async def _refusal(self, call: ToolCall, tool: Tool) -> str | None:
        for hook in self._hooks:
            why = await hook.before(call)
            if why is not None:
                return why
        return await self._approval(call, tool.effect)

    def _note_malformed(self) -> None:
        self._malformed += 1

    def _add(self, message: Message) -> None:
        self.messages.append(message)
        self._transcript.add(message)


def make_delegate(make_agent: Callable[[], Agent]) -> Callable[[str], asyncio.Future[str]]:
    """For :class:`vallum.agent.tools.task.Task`: runs a fresh agent on a prompt; its tools are let go afterwards."""

    async def work(prompt: str) -> str:
        agent = make_agent()
        try:
            outcome = await agent.run(prompt)
        finally:
            await agent.close()
        if outcome.status == "submitted":
            return outcome.answer
        if outcome.status in ("contained", "model"):
            raise ToolError(f"the sub-agent was stopped: {outcome.detail}")
        last = next((m.content for m in reversed(outcome.messages) if m.role == "assistant" and m.content), "")
        return f"(the sub-agent ended without submitting: {outcome.detail})\n{last}".rstrip()

    return lambda prompt: asyncio.ensure_future(work(prompt))
