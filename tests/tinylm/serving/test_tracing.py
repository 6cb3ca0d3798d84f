"""Spans of calls: when they are exported, what they say, and that OpenTelemetry is not imported without them."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import subprocess
import sys
import time

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tinylm import SamplingParams
from tinylm.engine import Engine
from tinylm.engine.async_engine import Listener
from tinylm.engine.completion import CompletionBuilder
from tinylm.engine.request import Progress
from tinylm.model import Model
from tinylm.serving.calls import Answer, Call, Refused, answering
from tinylm.serving.trace_context import TraceContext
from tinylm.serving.tracing import Tracing, protocol_of, stages, tracing_from

ALL, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
URL = "http://localhost:4318"
CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", is_sampled=True)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({}, None),
        ({ALL: ""}, None),
        ({ALL: URL}, "http/protobuf"),
        ({TRACES: URL}, "http/protobuf"),
        ({TRACES: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
        (
            {ALL: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            "http/protobuf",
        ),
        ({ALL: URL, "OTEL_SDK_DISABLED": "true"}, None),
        ({ALL: URL, "OTEL_SDK_DISABLED": "True"}, None),
        ({ALL: URL, "OTEL_SDK_DISABLED": "false"}, "http/protobuf"),
        ({ALL: URL, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({ALL: URL, "OTEL_TRACES_EXPORTER": "console, otlp"}, "http/protobuf"),
        ({ALL: URL, "OTEL_TRACES_EXPORTER": "zipkin"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, None),
    ],
)
def test_the_standard_variables_turn_spans_on_and_off(environment: dict[str, str], protocol: str | None):
    assert protocol_of(environment) == protocol


def test_without_a_collector_nothing_of_opentelemetry_is_imported():
    code = (
        "import sys; from tinylm.serving import tracing; from tinylm.serving.calls import answering\n"
        f"assert tracing.tracing_from({{'OTEL_SDK_DISABLED': 'true', {ALL!r}: {URL!r}}}, '', '') is None\n"
        "assert tracing.tracing_from({}, '', '') is None\n"
        "with answering('Generate', lambda call: None): pass\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.exporter") is not None
    and importlib.util.find_spec("opentelemetry.exporter.otlp") is not None,
    reason="the exporter is installed",
)
def test_a_missing_exporter_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert tracing_from({ALL: URL}, "replica", "model") is None
        assert tracing_from({ALL: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "replica", "model") is None
    assert ["extra `tracing`" in record.message for record in caplog.records] == [True, False]
    assert "'http/json', it must be one of http/protobuf, grpc" in caplog.records[1].message


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing(exporter, "replica-1", "a-model")


@pytest.fixture
def engine(tiny_config, tiny_quantized) -> Engine:
    return Engine(Model(tiny_config, tiny_quantized, "numpy", "float32"), n_slots=1)


def answers(engine: Engine, tokenizer, n: int) -> list[Answer]:
    """Return complete answers of a real engine. All but the first wait for a slot."""
    requests = [engine.submit([1, 5, 7], SamplingParams(temperature=0, max_tokens=4)) for _ in range(n)]
    while engine.has_work:
        engine.step()
    made = []
    for request in requests:
        listener, builder = Listener(), CompletionBuilder(tokenizer, request.params)
        listener.progress = request.progress()
        builder.take(listener.progress)
        made.append(Answer(listener, builder.completion))
    return made


def test_a_call_has_a_span_and_one_for_each_stage(tracing, exporter, engine, tokenizer):
    before_ns = time.time_ns()
    with answering("Generate", tracing.record) as call:
        call.trace, call.n_expected = CALLER, 2
        call.answers = answers(engine, tokenizer, 2)
    tracing.close()
    *children, span = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("Generate", SpanKind.SERVER, StatusCode.UNSET)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (CALLER.trace_id, CALLER.parent_id)
    assert call.log_fields()["trace_id"] == CALLER.trace_id
    assert before_ns <= span.start_time + 10**6  # the two clocks are read one after the other
    assert span.end_time <= time.time_ns() + 10**6
    assert span.attributes["gen_ai.usage.output_tokens"] == call.n_tokens
    assert span.resource.attributes["service.name"] == "tinylm"
    assert span.resource.attributes["service.instance.id"] == "replica-1"
    assert [child.name for child in children] == ["queue", "prefill", "decode"] * 2
    for number in range(2):
        queue, prefill, decode = children[3 * number : 3 * number + 3]
        assert {child.parent.span_id for child in (queue, prefill, decode)} == {span.context.span_id}
        assert span.start_time <= queue.start_time <= queue.end_time == prefill.start_time
        assert prefill.end_time == decode.start_time <= decode.end_time <= span.end_time
        assert queue.attributes["tinylm.answer"] == number
    # The second answer waits for the only slot until the first one ends.
    assert children[3].end_time >= children[2].end_time


def test_a_refused_call_has_one_span_with_its_status(tracing, exporter):
    errors = [Refused(grpc.StatusCode.UNAUTHENTICATED, "no key"), RuntimeError("a fault")]
    for error in errors:
        with answering("Tokenize", tracing.record):
            raise error
    tracing.close()
    refused, failed = exporter.get_finished_spans()
    assert refused.attributes["rpc.response.status_code"] == "UNAUTHENTICATED"
    assert refused.status.status_code is StatusCode.UNSET  # the caller's error
    assert (failed.status.status_code, failed.status.description) == (
        StatusCode.ERROR,
        "unexpected error: RuntimeError",
    )


def test_a_call_without_a_trace_gets_one_in_its_log_line(tracing, exporter, caplog):
    with caplog.at_level(logging.INFO, "ray.serve"):
        for _ in range(2):
            with answering("Tokenize", tracing.record):
                pass
    tracing.close()
    ids = [f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()]
    assert [record.trace_id for record in caplog.records] == ids
    assert len(set(ids)) == 2


def test_a_trace_that_the_caller_does_not_record_is_not_exported(tracing, exporter):
    with answering("Tokenize", tracing.record) as call:
        call.trace = TraceContext(CALLER.trace_id, CALLER.parent_id, is_sampled=False)
    tracing.close()
    assert exporter.get_finished_spans() == ()
    assert call.log_fields()["trace_id"] == CALLER.trace_id


def test_without_spans_the_log_line_has_the_callers_trace():
    call = Call("Generate")
    assert "trace_id" not in call.log_fields()
    call.trace = CALLER
    assert call.log_fields()["trace_id"] == CALLER.trace_id


def test_the_environment_names_the_service(exporter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "stories")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracing = Tracing(exporter, "replica-1", "a-model")
    with answering("Tokenize", tracing.record):
        pass
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "stories"
    assert span.resource.attributes["deployment.environment.name"] == "test"


TIMES = st.lists(st.floats(0, 100), min_size=5, max_size=5).map(sorted)


@given(times=TIMES, n_reached=st.integers(1, 3), ended=st.booleans())
def test_stages_cover_the_time_of_an_answer_without_gaps(times: list[float], n_reached: int, ended: bool):
    submitted, admitted, first, finished, now = times
    listener = Listener()
    listener.progress = Progress(
        3, 0, (), (), (), None, submitted, admitted if n_reached > 1 else None, first if n_reached > 2 else None,
        finished if ended else None,
    )  # fmt: skip
    made = list(stages(Answer(listener), now))
    assert [name for name, _, _ in made] == ["queue", "prefill", "decode"][:n_reached]
    assert made[0][1] == submitted
    assert made[-1][2] == (finished if ended and finished else now)
    assert all(end == begin for (_, _, end), (_, begin, _) in itertools.pairwise(made))
