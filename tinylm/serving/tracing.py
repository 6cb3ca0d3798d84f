"""Export OpenTelemetry spans of calls: one for the call, and one for each stage of each answer.

OpenTelemetry is imported only if its standard environment variables name a collector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

import grpc

import tinylm
from tinylm.serving.calls import Answer, Call

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("ray.serve")

EXPORTERS = {  # OTEL_EXPORTER_OTLP_PROTOCOL -> module
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}
DEFAULT_PROTOCOL = "http/protobuf"
# The statuses that OpenTelemetry's conventions for gRPC servers call errors: the others are the caller's.
ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """Return the OTLP protocol that OpenTelemetry's environment variables ask for, None if they name no collector.

    See https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/: an empty value counts as
    absent.
    """

    def value(name: str) -> str:
        return environment.get(name, "").strip()

    if value("OTEL_SDK_DISABLED").lower() == "true":
        return None
    exporters = value("OTEL_TRACES_EXPORTER") or "otlp"
    if "otlp" not in [name.strip() for name in exporters.split(",")]:
        return None
    if not (value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or value("OTEL_EXPORTER_OTLP_ENDPOINT")):
        return None
    return value("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or value("OTEL_EXPORTER_OTLP_PROTOCOL") or DEFAULT_PROTOCOL


def tracing_from(environment: Mapping[str, str], replica: str, model: str) -> Tracing | None:
    """Return what exports spans, or None if the environment names no collector.

    A collector that cannot be used is an error in the log, and the service runs without spans: the variables can be
    meant for other programs.
    """
    protocol = protocol_of(environment)
    if protocol is None:
        return None
    if protocol not in EXPORTERS:
        logger.error("no spans: the OTLP protocol is %r, it must be one of %s", protocol, ", ".join(EXPORTERS))
        return None
    try:
        exporter = import_module(EXPORTERS[protocol]).OTLPSpanExporter()
    except ImportError as error:
        logger.error("no spans: %s. Install TinyLM's extra `tracing`, or set OTEL_TRACES_EXPORTER=none", error)
        return None
    return Tracing(exporter, replica, model)


class Tracing:
    """Makes the spans of a call when it has ended, and gives them to an exporter in a thread of the SDK.

    The SDK's own variables apply, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_BSP_SCHEDULE_DELAY.
    """

    def __init__(self, exporter: SpanExporter, replica: str, model: str) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        own = {
            "service.name": "tinylm",
            "service.version": tinylm.__version__,
            "service.instance.id": replica,
        }
        self._provider = TracerProvider(resource=Resource.create(own).merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tinylm", tinylm.__version__)
        self._model = model

    def record(self, call: Call) -> None:
        """Export the spans of a call that ends now. A call without a trace gets a new one, for its line in the log."""
        try:
            self._record(call)
        except Exception:  # a fault of tracing must not fail the call
            logger.exception("the spans of a call could not be made")

    def _record(self, call: Call) -> None:
        from opentelemetry import trace

        now = time.monotonic()
        epoch_ns = time.time_ns() - round(now * 1e9)  # of the monotonic clock
        span = self._tracer.start_span(
            call.method,
            context=_context(call),
            kind=trace.SpanKind.SERVER,
            attributes={
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": call.n_prompt_tokens,
                "gen_ai.usage.output_tokens": call.n_tokens,
                "gen_ai.response.finish_reasons": [call.reason_of(answer) for answer in call.answers],
                "rpc.response.status_code": call.status.name,
            },
            start_time=epoch_ns + round(call.began_at * 1e9),
        )
        if call.status in ERRORS:
            span.set_status(trace.StatusCode.ERROR, call.details)
        inside = trace.set_span_in_context(span)
        for number, answer in enumerate(call.answers):
            for name, begin, end in stages(answer, now):
                child = self._tracer.start_span(
                    name, inside, attributes={"tinylm.answer": number}, start_time=epoch_ns + round(begin * 1e9)
                )
                child.end(epoch_ns + round(end * 1e9))
        span.end(epoch_ns + round(now * 1e9))
        call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Export the spans that are left."""
        self._provider.shutdown()


def stages(answer: Answer, now: float) -> Iterator[tuple[str, float, float]]:
    """Yield the name, the begin and the end of each stage that an answer has reached, in `time.monotonic()` seconds.

    now: the end of an answer that has no end of its own, because the client left.
    """
    progress = answer.progress
    end = progress.finished_at or now
    if answer.completion is not None:
        end = progress.submitted_at + answer.completion.total_s
    begins = [
        ("queue", progress.submitted_at),
        ("prefill", progress.admitted_at),
        ("decode", progress.first_token_at),
    ]
    reached = [(name, begin) for name, begin in begins if begin is not None]
    ends = [begin for _, begin in reached[1:]] + [end]
    for (name, begin), stage_end in zip(reached, ends, strict=True):
        yield name, begin, stage_end


def _context(call: Call) -> Context:
    """Return OpenTelemetry's form of the caller's trace, an empty context if the call has none."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    if call.trace is None:
        return Context()
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if call.trace.is_sampled else trace.TraceFlags.DEFAULT)
    parent = trace.SpanContext(int(call.trace.trace_id, 16), int(call.trace.parent_id, 16), True, flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())
