"""Every fact of every run goes through here: appended first, then judged, then counted.

Fails closed: when a ledger cannot append, the run's owner is told once (``on_blind``) and every
further ``emit`` raises, so nothing can go on unrecorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vallum.core import clock
from vallum.core.errors import InvalidInput, RecordError
from vallum.core.events import (
    AnyEvent,
    DnsQuery,
    EpisodeStarted,
    Finding,
    Flow,
    PacketDropped,
    ProcessStarted,
    Record,
    RunEnded,
    SensorStatus,
    StepOpened,
)
from vallum.core.scope import BY_NODE, Scope
from vallum.detectors.bank import DetectorBank
from vallum.node.redaction import Redactor
from vallum.node.telemetry import CONTROL, SpanFeed
from vallum.record.chain import read_anchor
from vallum.record.ledger import Ledger
from vallum.record.reader import decode_line, is_live, list_ids, read_lines

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Counts of one episode, for the summary at its end."""

    steps: int = 0
    processes: int = 0
    denied: int = 0
    findings: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    processes_by_step: dict[int, int] = field(default_factory=dict)

    def take(self, event: AnyEvent) -> None:
        """Count one event."""
        if isinstance(event, StepOpened):
            self.steps += 1
        elif isinstance(event, ProcessStarted):
            self.processes += 1
            if event.scope.step is not None:
                self.processes_by_step[event.scope.step] = self.processes_by_step.get(event.scope.step, 0) + 1
        elif isinstance(event, Flow):
            if event.state == "denied":
                self.denied += 1
            elif event.state == "closed":
                self.bytes_out += event.bytes_out
                self.bytes_in += event.bytes_in
        elif isinstance(event, DnsQuery | PacketDropped):
            self.denied += event.verdict == "deny"
        elif isinstance(event, Finding):
            self.findings += 1


class RunBook:
    """One run: its ledger, its detectors and its counts."""

    def __init__(
        self,
        run: str,
        ledger: Ledger,
        on_blind: Callable[[str, str], None],
        redactor: Redactor,
        feed: SpanFeed | None = None,
    ) -> None:
        self.run = run
        self._feed = feed
        self.ledger = ledger
        self._redactor = redactor
        self.holders: set[int] = set()
        """Clients that used the run and are still connected."""
        self.exit_code: int | None = None
        self.episodes: set[str] = set()
        """Ids that are taken: two cells with one id could not be told apart in the record."""
        self._bank = DetectorBank(clock=lambda: (clock.wall_ns(), clock.mono_ns()))
        self._tallies: dict[str, Tally] = {}
        self._on_blind = on_blind
        self._blind = False

    def take_episode(self, wanted: str | None) -> str:
        """An id for a new episode: ``wanted``, or the next free ``e<number>``.

        Raises:
            InvalidInput: the run has had an episode of that id.
        """
        if wanted in self.episodes:
            raise InvalidInput(f"run {self.run} has an episode {wanted} already: choose another id, or give none")
        number = len(self.episodes)
        while wanted is None and f"e{number}" in self.episodes:
            number += 1
        episode = wanted or f"e{number}"
        self.episodes.add(episode)
        return episode

    def emit(self, event: AnyEvent) -> int:
        """Append, then let the detectors see it; their findings are appended too.

        Raises:
            RecordError: it could not be appended.
        """
        return self.emit_all([event])[0]

    def emit_all(self, events: Sequence[AnyEvent]) -> range:
        """:meth:`emit` of several at the price of one write: all of them or none. Returns their numbers.

        Raises:
            RecordError: they could not be appended.
        """
        try:
            events = [self._redactor.clean(event) for event in events]
            numbers = self.ledger.append_many(events)
        except RecordError as error:
            if not self._blind:
                self._blind = True
                self._on_blind(self.run, str(error))
            raise
        if self._feed is not None:
            self._feed.take([Record(id=number, event=event) for number, event in zip(numbers, events, strict=True)])
        for number, event in zip(numbers, events, strict=True):
            self._count(event)
            if isinstance(event, Finding):
                continue
            for finding in self._bank.observe(Record(id=number, event=event)):
                self.emit(finding)
            if self._bank.failed and not self._blind:
                self._blind = True
                self._on_blind(self.run, f"the detectors {', '.join(sorted(self._bank.failed))} failed")
        return numbers

    def tally(self, episode: str) -> Tally:
        """Counts of one episode."""
        return self._tallies.setdefault(episode, Tally())

    def _count(self, event: AnyEvent) -> None:
        if event.scope.episode is not None:
            self.tally(event.scope.episode).take(event)


class Recorder:
    """The ledgers of the node."""

    def __init__(self, runs_dir: Path, on_blind: Callable[[str, str], None], redactor: Redactor | None = None) -> None:
        """``redactor`` takes registered secrets out of every event before it is written."""
        self._redactor = redactor or Redactor()
        self.feed: SpanFeed | None = None
        """Is told of every event after it was written; of the runs that are opened from then on."""
        self._runs_dir = runs_dir
        self._on_blind = on_blind
        self._books: dict[str, RunBook] = {}

    def open(self, run: str) -> tuple[RunBook, bool]:
        """The book of ``run`` and whether it is new to this node.

        Raises:
            RecordError: its ledger cannot be opened.
        """
        book = self._books.get(run)
        if book is not None:
            return book, False
        if (self._runs_dir / run).exists():
            ledger = Ledger.open(self._runs_dir, run)
        else:
            ledger = Ledger.create(self._runs_dir, run)
        book = self._books[run] = RunBook(run, ledger, self._on_blind, self._redactor, self.feed)
        book.episodes |= _read_episodes(self._runs_dir / run)
        return book, True

    def get(self, run: str) -> RunBook | None:
        """The open book of ``run``."""
        return self._books.get(run)

    def emit(self, event: AnyEvent) -> int:
        """Append to the run that the event's scope names.

        Raises:
            RecordError: that run is not open here, or cannot be appended to.
        """
        book = self._books.get(event.scope.run)
        if book is None:
            raise RecordError(f"run {event.scope.run} is not open in this node, so nothing can be recorded of it")
        return book.emit(event)

    def books(self) -> list[RunBook]:
        """The runs that are open."""
        return list(self._books.values())

    def close(self, run: str, outcome: str) -> None:
        """End a run: its last record, flushed to the disk."""
        book = self._books.pop(run, None)
        if book is None:
            return
        try:
            if self.feed is not None and (lost := self.feed.forget(run)):
                book.emit(
                    SensorStatus(
                        t_ns=clock.wall_ns(),
                        mono_ns=clock.mono_ns(),
                        scope=Scope(run=run),
                        attribution=BY_NODE,
                        sensor=CONTROL,
                        state="degraded",
                        detail="the OTLP collector was not told of everything; the record has it all",
                        dropped=lost,
                    )
                )
            book.emit(
                RunEnded(
                    t_ns=clock.wall_ns(),
                    mono_ns=clock.mono_ns(),
                    scope=Scope(run=run),
                    attribution=BY_NODE,
                    outcome=outcome,
                    exit_code=book.exit_code,
                )
            )
        except RecordError as error:
            log.error("run %s has no last record: %s", run, error)
        try:
            book.ledger.close()
        except RecordError as error:
            log.error("the ledger of run %s could not be closed in order: %s", run, error)

    def close_interrupted(self) -> int:
        """End the runs that a crash of an earlier node left open; how many there were.

        A ledger that was changed meanwhile is left as it is: it is evidence.
        """
        ended = 0
        for run in list_ids(self._runs_dir):
            directory = self._runs_dir / run
            anchor = read_anchor(directory)
            if (anchor is not None and anchor.closed) or is_live(directory):
                continue
            try:
                ledger = Ledger.open(self._runs_dir, run)
                ledger.append(
                    RunEnded(
                        t_ns=clock.wall_ns(),
                        mono_ns=clock.mono_ns(),
                        scope=Scope(run=run),
                        attribution=BY_NODE,
                        outcome="interrupted",
                    )
                )
                ledger.close()
                ended += 1
            except RecordError as error:
                log.warning("run %s was interrupted and is left as it is: %s", run, error)
        return ended

    def close_all(self, outcome: str) -> None:
        """End every run."""
        for run in list(self._books):
            self.close(run, outcome)


def _read_episodes(directory: Path) -> set[str]:
    """Ids of the episodes that a run has had."""
    mark = b'{"kind":"%b"' % str(EpisodeStarted.__struct_config__.tag).encode()
    lines = (line for line in read_lines(directory) if line.payload.startswith(mark))
    return {episode for line in lines if (episode := decode_line(line, directory).event.scope.episode) is not None}
