"""Live spans to a collector that the operator named (``VALLUM_OTLP_ENDPOINT``). Off unless it did.

An observer, not a wall: it may fail open. What is recorded never waits for it; a collector that is slow or gone costs spans, and
each run's record says how many (``sensor.status`` of ``export.otlp``). All of them can be had again from the record:
``vallum data export --format otlp``.

Covered: nothing is sent before it is in the record, and registered secrets are taken out before. Not covered: what the
collector does with them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from vallum.core.errors import InvalidInput
from vallum.core.events import Record
from vallum.record.export.otlp import AT_ONCE, SpanSender
from vallum.record.export.spans import Span, SpanTeller

ENDPOINT = "VALLUM_OTLP_ENDPOINT"
CONTENT = "VALLUM_OTLP_CONTENT"
"""``1``: what was said goes along."""
CONTROL = "export.otlp"
WAITING = 20_000
"""Records that may wait to be told."""
LINGER_S = 1.0
"""How long a span waits for company."""
STOP_S = 5.0

log = logging.getLogger(__name__)


class SpanFeed:
    """Tells a collector of records, in a thread of its own."""

    def __init__(self, sender: SpanSender, *, with_content: bool = False) -> None:
        self._sender = sender
        self._teller = SpanTeller(with_content=with_content)
        self._queue: queue.Queue[Record | None] = queue.Queue(WAITING)
        self._lost: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def take(self, records: Sequence[Record]) -> None:
        """Records that were appended. Never blocks and never raises: what does not fit is counted as lost."""
        for record in records:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                with self._lock:
                    self._lost[record.event.scope.run] += 1

    def forget(self, run: str) -> int:
        """A run is about to end: how many of its records or spans were lost so far."""
        with self._lock:
            return self._lost.pop(run, 0)

    def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        try:
            self._queue.put(None, timeout=STOP_S)
        except queue.Full:
            log.warning("the OTLP collector is too slow: what it was not told of is lost to it")
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            log.warning("the OTLP collector did not answer in %g s: what it was not told of is lost to it", STOP_S)
            return
        self._sender.close()

    def _work(self) -> None:
        waiting: list[Span] = []
        send_at = 0.0
        while True:
            try:
                record = self._queue.get(timeout=max(0.0, send_at - time.monotonic()) if waiting else None)
            except queue.Empty:
                self._send(waiting)
                waiting = []
                continue
            if record is not None:
                made = self._teller.take(record)
                if made and not waiting:
                    send_at = time.monotonic() + LINGER_S
                waiting += made
            if waiting and (record is None or len(waiting) >= AT_ONCE):
                self._send(waiting)
                waiting = []
            if record is None:
                return

    def _send(self, spans: list[Span]) -> None:
        for start in range(0, len(spans), AT_ONCE):
            batch = spans[start : start + AT_ONCE]
            if not self._sender.send(batch):
                log.warning("the OTLP collector at %s did not take %d spans", self._sender.endpoint, len(batch))
                with self._lock:
                    self._lost.update(str(span.attributes["vallum.run"]) for span in batch)


def make_feed(environ: Mapping[str, str]) -> tuple[SpanFeed | None, dict[str, str]]:
    """The feed that the node's environment asks for, and its tier: empty where none is asked for."""
    endpoint = environ.get(ENDPOINT, "")
    if not endpoint:
        return None, {}
    try:
        sender = SpanSender(endpoint)
    except InvalidInput as error:
        log.warning("no spans are sent: %s", error)
        return None, {CONTROL: f"missing: {error}"}
    return SpanFeed(sender, with_content=environ.get(CONTENT) == "1"), {CONTROL: "enforced"}
