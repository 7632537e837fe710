"""Spans over OTLP: to a file of OTLP's JSON form, or to a collector over HTTP. Needs the extra ``otel``.

Source: OpenTelemetry protocol 1.x, encoding and sending by OpenTelemetry's own packages. Sending is an observer's act: nothing
in a run waits for it, and what a collector refuses is lost there, not here.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from vallum.core.errors import InvalidInput, RecordError
from vallum.record.export.base import ChosenRun, ExportFile
from vallum.record.export.facts import file_stem
from vallum.record.export.spans import Span, SpanTeller
from vallum.version import __version__

AT_ONCE = 256
"""Spans in one request."""
SERVICE = "vallum"


class OtlpJsonFormat:
    """``--format otlp-json``: one file per run, readable by a collector's ``otlpjsonfile`` receiver."""

    name = "otlp-json"

    def __init__(self, *, with_content: bool = False) -> None:
        self._with_content = with_content

    def write(self, runs: Iterable[ChosenRun]) -> Iterator[ExportFile]:
        """See :class:`vallum.record.export.base.ExportFormat`.."""
        load()
        for run in runs:
            lines = [write_json(spans) for spans in batch_spans(run, with_content=self._with_content)]
            yield ExportFile(f"{file_stem(run.run)}.otlp.jsonl", b"".join(line + b"\n" for line in lines))


class SpanSender:
    """Sends spans to a collector over HTTP (protobuf).

    Args:
        endpoint: URL; ``/v1/traces`` is added where it has no path.

    Raises:
        InvalidInput: the endpoint is no http(s) URL, or the extra is not installed.
    """

    def __init__(self, endpoint: str, *, timeout_s: float = 10.0) -> None:
        load()
        self.endpoint = complete_endpoint(endpoint)
        module = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        self._exporter = module.OTLPSpanExporter(endpoint=self.endpoint, timeout=timeout_s)
        self._success = importlib.import_module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS

    def send(self, spans: Sequence[Span]) -> bool:
        """Send some spans; whether the collector took them. Blocks for at most the timeout."""
        return bool(self._exporter.export([_readable(span) for span in spans]) == self._success)

    def close(self) -> None:
        """Let go of the connection."""
        self._exporter.shutdown()


def batch_spans(run: ChosenRun, *, with_content: bool) -> Iterator[list[Span]]:
    """The spans of a run, some at a time."""
    teller = SpanTeller(with_content=with_content)
    chosen = {episode.episode for episode in run.episodes}
    waiting: list[Span] = []
    for record in run.records():
        name = record.event.scope.episode
        if name is None or name in chosen:
            waiting += teller.take(record)
        while len(waiting) >= AT_ONCE:
            yield waiting[:AT_ONCE]
            del waiting[:AT_ONCE]
    waiting += teller.finish(run.run)
    if waiting:
        yield waiting


def send_runs(runs: Iterable[ChosenRun], sender: SpanSender, *, with_content: bool) -> int:
    """Send the spans of some runs; how many there were.

    Raises:
        RecordError: the collector did not take them.
    """
    sent = 0
    for run in runs:
        for spans in batch_spans(run, with_content=with_content):
            if not sender.send(spans):
                raise RecordError(
                    f"the collector at {sender.endpoint} did not take the spans of run {run.run} (after {sent} that it took): "
                    "see the lines above; sending them again makes no second trace"
                )
            sent += len(spans)
    return sent


def complete_endpoint(endpoint: str) -> str:
    """The URL that traces are posted to.

    Raises:
        InvalidInput: it is no http(s) URL with a host.
    """
    try:
        parts = urlsplit(endpoint)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_usable = False
    if not is_usable:
        raise InvalidInput(f"the OTLP endpoint {endpoint[:200]!r} is not usable: give e.g. http://localhost:4318")
    return urlunsplit(parts._replace(path="/v1/traces")) if parts.path in ("", "/") else endpoint


def write_json(spans: Sequence[Span]) -> bytes:
    """An export request in OTLP's JSON form: ids in hex, enumerations as numbers."""
    encoder = importlib.import_module("opentelemetry.exporter.otlp.proto.common.trace_encoder")
    form = importlib.import_module("google.protobuf.json_format")
    request = encoder.encode_spans([_readable(span) for span in spans])
    plain: dict[str, Any] = form.MessageToDict(request, use_integers_for_enums=True)
    for resource in plain.get("resourceSpans", []):
        for scope in resource.get("scopeSpans", []):
            for span in scope.get("spans", []):
                for name in ("traceId", "spanId", "parentSpanId"):
                    if name in span:
                        span[name] = base64.b64decode(span[name]).hex()
    return msgspec.json.encode(plain)


def load() -> None:
    """Check that the extra is there.

    Raises:
        InvalidInput: it is not; the message names it.
    """
    try:
        importlib.import_module("opentelemetry.sdk.trace")
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise InvalidInput(
            f"OTLP needs OpenTelemetry's SDK ({error}): install it with 'pip install vallum[otel]'"
        ) from error


def _readable(span: Span) -> Any:
    trace = importlib.import_module("opentelemetry.trace")
    sdk = importlib.import_module("opentelemetry.sdk.trace")
    resources = importlib.import_module("opentelemetry.sdk.resources")
    scope = importlib.import_module("opentelemetry.sdk.util.instrumentation").InstrumentationScope

    def context(span_id: bytes) -> Any:
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        return trace.SpanContext(
            int.from_bytes(span.trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=flags
        )

    status = trace.Status(trace.StatusCode.ERROR, span.error) if span.error else trace.Status()
    return sdk.ReadableSpan(
        name=span.name,
        context=context(span.span_id),
        parent=context(span.parent_id) if span.parent_id is not None else None,
        resource=resources.Resource({"service.name": SERVICE, "service.version": __version__}),
        attributes=span.attributes,
        events=[sdk.Event(event.name, attributes=event.attributes, timestamp=event.t_ns) for event in span.events],
        kind=trace.SpanKind.CLIENT if span.kind == "client" else trace.SpanKind.INTERNAL,
        status=status,
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=scope(SERVICE, __version__),
    )
