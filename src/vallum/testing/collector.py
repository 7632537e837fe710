"""An OTLP/HTTP endpoint on loopback that keeps the spans it is sent, decoded. Needs the extra ``otel``."""

from __future__ import annotations

import http.server
import importlib
import threading
from types import TracebackType
from typing import Any, Self


class Collector:
    """Listens from the start to the end of a ``with``. ``status`` other than 200 refuses what is sent."""

    def __init__(self) -> None:
        service = importlib.import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list[Any] = []
        """``opentelemetry.proto.trace.v1.Span``, in the order they came."""
        self.paths: list[str] = []
        self.status = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                outer.paths.append(self.path)
                if outer.status == 200:
                    request = service.ExportTraceServiceRequest.FromString(raw)
                    outer.spans += [
                        span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans
                    ]
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Keep quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.05), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
