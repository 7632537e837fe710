"""Trajectories out of a run's records. Pure.

The model gateway records of each request only what is new since the call that it goes on from; here the conversations are
put together again. Words that were cut in the record (too long) stand as their size and digest.

Memory grows with what the record keeps of the conversations, each message once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vallum.core.events import (
    ContainmentAction,
    EpisodeEnded,
    EpisodeStarted,
    Event,
    ModelCall,
    Record,
    RunStarted,
    StepClosed,
    ToolCall,
    ToolResult,
)
from vallum.core.messages import Media, Message, Part, Reasoning, Reply, Text, Tool
from vallum.core.messages import ToolCall as ProposedCall
from vallum.core.messages import ToolResult as ToldResult
from vallum.record.chapters import RunStory
from vallum.record.story import StoryTeller
from vallum.record.trajectory import Call, EpisodeTrajectories, Metrics, Result, Source, Trajectory, Turn, join_text
from vallum.record.trajectory_facts import Charges
from vallum.record.trajectory_links import Opening, arrange

COMMANDS = "commands"
"""Branch of the trajectory that holds what belongs to no conversation."""
_STOPPING = frozenset({"kill_step", "kill_cell", "freeze_step", "freeze_cell"})


@dataclass
class _Asked:
    """A model call: what was new in it, and where it goes on from."""

    parent: str
    known: int
    messages: tuple[Message, ...]
    trajectory: Trajectory
    reply: Message | None = None
    turn: Turn | None = None


@dataclass
class _Episode:
    """One cell, while it is told."""

    id: str
    run: str
    charges: Charges = field(default_factory=Charges)
    branches: dict[str, Trajectory] = field(default_factory=dict)
    openings: dict[str, Opening] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    owners: dict[int, Turn] = field(default_factory=dict)
    """Step -> the turn that opened it."""
    homes: dict[int, Trajectory] = field(default_factory=dict)
    closed: dict[int, int] = field(default_factory=dict)
    """Step -> when it was closed."""
    last: Trajectory | None = None
    started: EpisodeStarted | None = None
    ended: EpisodeEnded | None = None


def fold_trajectories(records: Iterable[Record]) -> tuple[RunStory, list[EpisodeTrajectories]]:
    """The story of a run and the trajectories of its episodes, in one pass over its records."""
    teller = TrajectoryTeller()
    for record in records:
        teller.take(record)
    return teller.story, teller.finish()


class TrajectoryTeller:
    """The state of the fold."""

    def __init__(self) -> None:
        self._story = StoryTeller()
        self._episodes: dict[str, _Episode] = {}
        self._commands: dict[int, tuple[Turn, str]] = {}
        self._started: RunStarted | None = None
        self._take: dict[type[Event], Callable[[_Episode, int, Any], None]] = {
            ModelCall: self._model_call,
            ToolCall: self._tool_call,
            ToolResult: self._tool_result,
            ContainmentAction: self._action,
        }

    @property
    def story(self) -> RunStory:
        """The story so far."""
        return self._story.story

    def take(self, record: Record) -> None:
        """Tell one record more; they come in their order."""
        self._story.take(record)
        event = record.event
        if isinstance(event, RunStarted):
            self._started = self._started or event
        name = event.scope.episode
        if name is None:
            return
        episode = self._episodes.get(name)
        if episode is None:
            episode = self._episodes[name] = _Episode(name, event.scope.run)
        if isinstance(event, EpisodeStarted):
            episode.started = event
        elif isinstance(event, EpisodeEnded):
            episode.ended = event
        elif isinstance(event, StepClosed) and event.scope.step is not None:
            episode.closed[event.scope.step] = event.t_ns
        episode.charges.take(event)
        if (take := self._take.get(type(event))) is not None:
            take(episode, record.id, event)

    def finish(self) -> list[EpisodeTrajectories]:
        """The episodes, joined and charged. The fold is over with it."""
        return [self._finish(episode) for episode in self._episodes.values()]

    def _finish(self, episode: _Episode) -> EpisodeTrajectories:
        story = self.story.episodes.get(episode.id)
        for trajectory in episode.branches.values():
            for turn in trajectory.turns:
                if steps := {call.step for call in turn.calls if call.step is not None}:
                    turn.containment = episode.charges.sum_up(story, steps)
            owned = {call.step for turn in trajectory.turns for call in turn.calls if call.step is not None}
            trajectory.containment = episode.charges.sum_up(story, owned)
        roots = arrange([one for one in episode.branches.values() if one.turns], episode.openings, episode.closed)
        everything = set(episode.charges.steps) | (set(story.steps) if story is not None else set())
        return EpisodeTrajectories(
            run=episode.run,
            episode=episode.id,
            containment=episode.charges.sum_up(story, everything),
            roots=roots,
            started=episode.started,
            ended=episode.ended,
        )

    # ------------------------------------------------------------------ conversations

    def _model_call(self, episode: _Episode, number: int, event: ModelCall) -> None:
        if event.retry_of:
            earlier = episode.asked.get(event.retry_of)
            if earlier is not None and earlier.turn is not None:
                earlier.turn.facts["retries"] = earlier.turn.facts.get("retries", 0) + 1
        elif event.state == "opened":
            self._ask(episode, event)
        elif event.state == "closed":
            self._answer(episode, event)
        else:
            where = episode.branches.get(event.branch) or episode.last or self._outside(episode)
            where.turns.append(_told_by_gateway(event, "model call refused"))

    def _ask(self, episode: _Episode, event: ModelCall) -> None:
        messages = _read_messages(event.messages)
        trajectory = episode.branches.get(event.branch)
        if trajectory is None:
            trajectory = self._begin(episode, event, messages)
        episode.last = trajectory
        episode.asked[event.call] = _Asked(event.parent, event.known, messages, trajectory)
        if event.tools:
            trajectory.tools = _read(event.tools, tuple[Tool, ...], ())
        parent = episode.asked.get(event.parent)
        if (
            parent is not None
            and parent.reply is not None
            and parent.trajectory is trajectory
            and event.known == _length(parent)
            and messages
            and messages[0].role == "assistant"
        ):
            messages = messages[1:]  # the reply again, in the agent's own words: what the model really said is told
        _add_messages(trajectory, messages, event.t_ns, is_copied=False)

    def _begin(self, episode: _Episode, event: ModelCall, messages: tuple[Message, ...]) -> Trajectory:
        trajectory = self._new(episode, event.branch)
        trajectory.model = event.model_used or event.model
        parent = episode.asked.get(event.parent)
        if parent is not None and event.known:
            history = _conversation(episode.asked, event.parent)[: event.known]
            _add_messages(trajectory, tuple(history), event.t_ns, is_copied=True)
        first = next((m for m in messages if m.role == "user"), None)
        episode.openings[event.branch] = Opening(
            trajectory=trajectory,
            t_ns=event.t_ns,
            parent=parent.trajectory if parent is not None else None,
            known=event.known,
            task=join_text(_words(first)).strip() if first is not None else "",
            agent=event.agent,
            last_ns=event.t_ns,
        )
        return trajectory

    def _answer(self, episode: _Episode, event: ModelCall) -> None:
        asked = episode.asked.get(event.call)
        trajectory = asked.trajectory if asked is not None else episode.branches.get(event.branch)
        if trajectory is None:
            trajectory = self._new(episode, event.branch or COMMANDS)
        if event.branch in episode.openings:
            episode.openings[event.branch].last_ns = event.t_ns
        if event.verdict != "allow" or event.finish == "error" or not event.reply:
            turn = _told_by_gateway(event, "model call failed")
            turn.facts |= {"tokens_spent": _spent(event)}
            trajectory.turns.append(turn)
        else:
            reply = _read_reply(event.reply)
            turn = _make_turn(event, reply)
            trajectory.turns.append(turn)
            for call in turn.calls:
                if call.step is not None:
                    episode.owners[call.step], episode.homes[call.step] = turn, trajectory
            if asked is not None:
                asked.reply = Message("assistant", reply.parts)
        if asked is not None:
            asked.turn = turn

    # ------------------------------------------------------------------ commands and kills

    def _tool_call(self, episode: _Episode, number: int, event: ToolCall) -> None:
        step = event.scope.step
        if event.source != "sdk" or step is None:
            return
        turn = episode.owners.get(step)
        outside = self._outside(episode)
        if turn is None:
            turn = episode.owners[step] = Turn("agent", event.t_ns, model_calls=0)
            episode.homes[step] = outside
            outside.turns.append(turn)
        elif episode.homes[step] is not outside:
            return  # a proposed call is being run: how it ended is in the facts of its step
        name = f"{event.scope.tool_call or 'call'}-{number}"
        turn.calls.append(Call(name, event.name, event.arguments, step=step))
        self._commands[number] = turn, name

    def _tool_result(self, episode: _Episode, number: int, event: ToolResult) -> None:
        found = self._commands.pop(event.call, None)
        if found is None:
            return
        turn, name = found
        words = event.error or f"exit code {event.exit_code}" + (", its time was up" if event.timed_out else "")
        words += f"; {event.output_bytes} bytes of output, sha256:{event.output_sha256}"
        is_error = bool(event.error) or event.exit_code != 0
        turn.results.append(Result(name, (Text(words),), is_error))

    def _action(self, episode: _Episode, number: int, event: ContainmentAction) -> None:
        if event.action not in _STOPPING:
            return
        where = episode.homes.get(event.scope.step) if event.scope.step is not None else None
        words = f"Containment: {event.action.replace('_', ' ')} {event.target}: {event.reason}"
        facts = {"event": number, "action": event.action, "cause": event.cause, "latency_ns": event.latency_ns}
        turn = Turn("system", event.t_ns, (Text(words),), facts=facts)
        (where or episode.last or self._outside(episode)).turns.append(turn)

    def _outside(self, episode: _Episode) -> Trajectory:
        found = episode.branches.get(COMMANDS)
        if found is None:
            found = self._new(episode, COMMANDS)
            found.kind = "commands"
        return found

    def _new(self, episode: _Episode, branch: str) -> Trajectory:
        made = episode.branches[branch] = Trajectory(episode.run, episode.id, branch)
        if self._started is not None:
            made.agent, made.version = name_agent(self._started.command), self._started.version
        return made


def name_agent(command: list[str]) -> str:
    """The harness that the run's command names; ``vallum`` for the reference agent."""
    if command[:2] != ["vallum", "agent"]:
        return "agent"
    for place, word in enumerate(command):
        if word == "--harness" and place + 1 < len(command):
            return command[place + 1]
        if word.startswith("--harness="):
            return word.partition("=")[2]
    return "vallum"


def _make_turn(event: ModelCall, reply: Reply) -> Turn:
    ids: set[str] = set()
    calls = []
    for place, call in enumerate(reply.tool_calls):
        name = call.id if call.id and call.id not in ids else f"{event.call}.{place}"
        ids.add(name)
        step = event.steps[place] if place < len(event.steps) else None
        calls.append(Call(name, call.name, call.arguments, call.kind, step))
    facts: dict[str, Any] = {"model_call": event.call, "finish": event.finish}
    facts |= {name: value for name in ("policy_version", "stripped", "upstream") if (value := getattr(event, name))}
    facts["overhead_ns"], facts["duration_ns"] = event.overhead_ns, event.duration_ns
    return Turn(
        "agent",
        event.t_ns,
        _words(Message("assistant", reply.parts)),
        reasoning="".join(part.text for part in reply.parts if isinstance(part, Reasoning)),
        calls=calls,
        model=event.model_used or event.model,
        metrics=_spent(event),
        model_calls=1,
        facts=facts,
    )


def _spent(event: ModelCall) -> Metrics:
    return Metrics(
        event.prompt_tokens,
        event.completion_tokens,
        event.cached_tokens,
        event.cost_usd_micros,
        event.prompt_token_ids,
        event.completion_token_ids,
        event.logprobs,
    )


def _told_by_gateway(event: ModelCall, what: str) -> Turn:
    facts = {"model_call": event.call, "rule": event.rule, "status": event.status}
    return Turn("system", event.t_ns, (Text(f"{what} ({event.rule}): {event.reason}"),), facts=facts)


def _add_messages(trajectory: Trajectory, messages: tuple[Message, ...], t_ns: int, *, is_copied: bool) -> None:
    for message in messages:
        for told in (part for part in message.parts if isinstance(part, ToldResult)):
            _add_result(trajectory, told, t_ns, is_copied=is_copied)
        if message.role == "assistant":
            calls = [
                Call(part.id or f"told.{len(trajectory.turns)}.{place}", part.name, part.arguments, part.kind)
                for place, part in enumerate(part for part in message.parts if isinstance(part, ProposedCall))
            ]
            # An assistant's message that the model gateway did not see being made is history, whoever wrote it.
            trajectory.turns.append(Turn("agent", t_ns, _words(message), calls=calls, is_copied=True))
        elif words := _words(message):
            source: Source = "system" if message.role == "system" else "user"
            trajectory.turns.append(Turn(source, t_ns, words, is_copied=is_copied))


def _add_result(trajectory: Trajectory, told: ToldResult, t_ns: int, *, is_copied: bool) -> None:
    for turn in reversed(trajectory.turns):
        if not turn.calls:
            continue
        answered = {result.call for result in turn.results}
        waiting = [call.id for call in turn.calls if call.id not in answered]
        wanted = told.call if told.call else next(iter(waiting), "")
        if wanted in waiting:
            turn.results.append(Result(wanted, told.parts, told.is_error))
            return
        if not told.call:
            break
    facts = {"answers": told.call} if told.call else {}
    turn = Turn("system", t_ns, results=[Result(None, told.parts, told.is_error)], is_copied=is_copied, facts=facts)
    trajectory.turns.append(turn)


def _words(message: Message) -> tuple[Text | Media, ...]:
    return tuple(part for part in message.parts if isinstance(part, Text | Media))


def _length(asked: _Asked) -> int:
    return asked.known + len(asked.messages)


def _conversation(asked: dict[str, _Asked], call: str) -> list[Message]:
    """All messages of a call with its reply, as far as the record has them."""
    chain: list[_Asked] = []
    seen: set[str] = set()
    while (found := asked.get(call)) is not None and call not in seen:
        seen.add(call)
        chain.append(found)
        call = found.parent
    messages: list[Message] = []
    for one in reversed(chain):
        del messages[one.known :]
        messages += one.messages
        if one.reply is not None:
            messages.append(one.reply)
    return messages


def _read_messages(text: str) -> tuple[Message, ...]:
    """Messages of the record; what was cut is one system message that says so."""
    cut: tuple[Part, ...] = (Text(_describe_cut(text)),)
    return _read(text, tuple[Message, ...], (Message("system", cut),)) if text else ()


def _read_reply(text: str) -> Reply:
    """A reply of the record; what was cut is a text that says so."""
    found = _read(text, Reply, None)
    if found is None or _read(text, _CutText, None) is not None:
        return Reply(parts=(Text(_describe_cut(text)),))
    assert isinstance(found, Reply)
    return found


def _read(text: str, form: Any, otherwise: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=form)
    except (msgspec.MsgspecError, RecursionError):
        return otherwise


class _Cut(msgspec.Struct):
    bytes: int
    digest: str


class _CutText(msgspec.Struct):
    cut: _Cut


def _describe_cut(text: str) -> str:
    found: _CutText | None = _read(text, _CutText, None)
    if found is None:
        return "[words that cannot be read in the record]"
    return f"[{found.cut.bytes} bytes that the record does not keep, {found.cut.digest}]"
