"""OpenTelemetry spans of a request along its stations, written when it has ended: what it costs while it runs is a few
clock readings.

anychip.request   from arrival to the end (stations 1 to 12)
  anychip.input     body checked, template applied, prompt tokenized (1, 2)
  anychip.queue     until first scheduled (3 to 5)
  anychip.prefill   until the first token (6 to 10)
  anychip.decode    first token to the last (4 to 10, over and over)
  anychip.output    last token to the end of the response (11, 12)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anychip.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


@dataclass(slots=True, kw_only=True)
class RequestTimes:
    """On the monotonic clock; None where it never came to that."""

    arrived: float
    accepted: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    ended: float


class Tracer:
    """Sends spans over OTLP; `exporter` replaces that in tests. Raises ConfigError without the extra."""

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace import Status, StatusCode, set_span_in_context
        except ImportError as error:
            raise ConfigError('tracing needs OpenTelemetry; pip install "anychip[otel]"') from error
        self._extract, self._in_context = extract, set_span_in_context
        self._failed: Callable[[str], Any] = lambda text: Status(StatusCode.ERROR, text)
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "anychip"}))
        processor = BatchSpanProcessor(_otlp(endpoint)) if exporter is None else SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("anychip")

    def record(
        self,
        request_id: str,
        times: RequestTimes,
        attributes: Mapping[str, Any],
        *,
        headers: Mapping[str, str],
        error: BaseException | None,
    ) -> None:
        """`headers` may carry the caller's traceparent."""
        # Spans want the time of day; both clocks run alike.
        offset = time.time() - time.monotonic()

        def at(moment: float) -> int:
            return int((moment + offset) * 1e9)

        root = self._tracer.start_span(
            "anychip.request",
            context=self._extract(dict(headers)),
            start_time=at(times.arrived),
            attributes={"gen_ai.request.model": self._model, "gen_ai.request.id": request_id, **attributes},
        )
        if error is not None:
            root.set_status(self._failed(f"{type(error).__name__}: {error}"))
        context = self._in_context(root)
        stages = (
            ("anychip.input", times.arrived, times.accepted),
            ("anychip.queue", times.accepted, times.scheduled),
            ("anychip.prefill", times.scheduled, times.first_token),
            ("anychip.decode", times.first_token, times.last_token),
            ("anychip.output", times.last_token, times.ended),
        )
        for name, start, end in stages:
            if start is None:
                break
            span = self._tracer.start_span(name, context=context, start_time=at(start))
            span.end(at(times.ended if end is None else end))
        root.end(at(times.ended))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()  # type: ignore[no-untyped-call, unused-ignore]


def _otlp(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError('tracing needs the OTLP exporter; pip install "anychip[otel]"') from error
    return OTLPSpanExporter(endpoint=endpoint)
