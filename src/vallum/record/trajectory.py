"""What an agent said and did, turn by turn, beside what the kernel saw: the form that every export is made of.

A trajectory is one conversation with a model (a branch of an episode), or the commands that a client gave a cell without
one. Words come from the model gateway, facts from the kernel and the node; the two are never mixed: what a turn says is in
its parts, calls and results, what it did is in its :class:`Containment`.

Times are nanoseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from vallum.core.events import EpisodeEnded, EpisodeStarted
from vallum.core.messages import Media, Text, Tool

Source = Literal["system", "user", "agent"]
Kind = Literal["main", "subagent", "continuation", "fork", "auxiliary", "commands"]
"""``main``          a conversation that nothing else led to;
``subagent``      begun while a tool call of another conversation was open (see ``link``);
``continuation``  goes on where another one ended, after its history was compacted or rewritten;
``fork``          goes on from the middle of another one, which went on as well;
``auxiliary``     a conversation beside a main one that offered no tools (a title, a summary);
``commands``      no conversation: what a client asked the node for, and what could be charged to no conversation.
"""

Link = Literal["", "prompt", "time", "results", "messages", "task", "ambiguous"]
"""How a trajectory was joined to its parent:

``prompt``     its first message stands in the arguments of the parent's open tool call;
``time``       exactly one tool call was open when it began, and it offered tools;
``results``    it brings results of the parent's tool calls;
``messages``   it begins with the parent's messages;
``task``       it begins with the same task as one that has ended;
``ambiguous``  several tool calls were open: it stands alone.
"""


@dataclass(frozen=True)
class Denial:
    """Refused attempts that are alike."""

    kind: str
    """``flow``, ``dns``, ``packet`` or ``request``."""
    target: str
    rule: str
    reason: str
    count: int
    bytes_out: int
    process: str
    """Command line of the first; empty when not known."""
    first_event: int
    late: int
    """How many came from what the step had left running."""


@dataclass(frozen=True)
class FindingFact:
    """A finding charged to a turn."""

    event: int
    detector: str
    title: str
    severity: str
    attack: list[str]


@dataclass
class ApprovalFact:
    """An action that waited for a person."""

    approval: str
    subject: str
    rule: str
    verdict: str = "pending"
    by: str = ""
    why: str = ""


@dataclass(frozen=True)
class CommandFact:
    """A command that was really started for a turn, and how it ended."""

    text: str
    exit_code: int | None
    timed_out: bool
    error: str


@dataclass
class Containment:
    """What node and kernel say about some steps of a cell. Lists are bounded; counts are exact."""

    steps: list[int] = field(default_factory=list)
    denied: int = 0
    denied_late: int = 0
    denials: list[Denial] = field(default_factory=list)
    allowed: int = 0
    """Permitted connections."""
    bytes_out: int = 0
    bytes_in: int = 0
    processes: int = 0
    cpu_ns: int | None = None
    memory_peak_bytes: int | None = None
    left_running: int = 0
    findings: list[FindingFact] = field(default_factory=list)
    approvals: list[ApprovalFact] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Paths written or found changed."""
    packages: list[str] = field(default_factory=list)
    """``ecosystem:name==version digest``."""
    commands: list[CommandFact] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    """What was done to contain: ``kill_step: why``."""
    confidence: float = 1.0
    """The lowest of all facts charged to these steps."""
    methods: list[str] = field(default_factory=list)
    """How they were charged."""

    @property
    def is_contaminated(self) -> bool:
        """Whether something was refused or found."""
        return bool(self.denied or self.findings)


@dataclass(frozen=True)
class Call:
    """A tool call of a reply, or a command of a client."""

    id: str
    """Unique in its turn."""
    name: str
    arguments: str
    """JSON, or free text for ``custom``."""
    kind: str = "function"
    step: int | None = None
    """The step of the cell that it opened."""


@dataclass(frozen=True)
class Result:
    """What the agent told the model that a tool answered (not evidence); of commands, how the node saw them end."""

    call: str | None
    parts: tuple[Text | Media, ...]
    is_error: bool = False

    @property
    def text(self) -> str:
        """Its words."""
        return join_text(self.parts)


@dataclass(frozen=True)
class Metrics:
    """Of one model call. Tokens as the upstream counted them; None where it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd_micros: int | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    """One per completion token, natural logarithm."""


@dataclass(eq=False)
class Turn:
    """One step of a trajectory, as ATIF understands it. (A *step* of Vallum is what one tool call opened.)"""

    source: Source
    t_ns: int
    parts: tuple[Text | Media, ...] = ()
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    model: str = ""
    metrics: Metrics | None = None
    model_calls: int | None = None
    """How many calls of a model made this turn; None where it was not made but told."""
    is_copied: bool = False
    """It was told as history, and was not made here."""
    containment: Containment | None = None
    subagents: dict[str, list[str]] = field(default_factory=dict)
    """Call id -> ids of the trajectories that were begun by it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """About the model call: ``model_call``, ``finish``, ``retries``, ``rule``, ``reason``, ``policy_version``..."""

    @property
    def text(self) -> str:
        """Its words."""
        return join_text(self.parts)


@dataclass(eq=False)
class Trajectory:
    """One conversation of an episode."""

    run: str
    episode: str
    branch: str
    kind: Kind = "main"
    link: Link = ""
    parent: str = ""
    """Id of the trajectory that it is joined to."""
    agent: str = "agent"
    version: str = ""
    model: str = ""
    tools: tuple[Tool, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    subagents: list[Trajectory] = field(default_factory=list)
    continued: str = ""
    """Id of the trajectory that goes on where this one ended."""
    containment: Containment = field(default_factory=Containment)
    """Of all its steps."""

    @property
    def id(self) -> str:
        """``RUN.EPISODE.BRANCH``."""
        return f"{self.run}.{self.episode}.{self.branch}"

    def walk(self) -> Iterator[Trajectory]:
        """Itself and all sub-agents below it."""
        waiting = [self]
        while waiting:
            one = waiting.pop()
            yield one
            waiting += reversed(one.subagents)


@dataclass
class EpisodeTrajectories:
    """All conversations of one cell, and the facts that belong to none of them."""

    run: str
    episode: str
    containment: Containment
    """Of the whole cell, facts included that could be charged to no step."""
    roots: list[Trajectory]
    started: EpisodeStarted | None = None
    ended: EpisodeEnded | None = None

    @property
    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory, sub-agents included."""
        for root in self.roots:
            yield from root.walk()


def join_text(parts: tuple[Text | Media, ...]) -> str:
    """The words of parts; of media their type and digest."""
    return "".join(
        part.text if isinstance(part, Text) else f"[{part.media_type} {part.digest or part.url}]" for part in parts
    )
