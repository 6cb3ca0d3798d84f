"""Spans and trace ids of a service whose environment names a collector.

The OTLP exporter is an extra of TinyLM. Here a stand-in for it writes the spans to the file that the endpoint names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
import yaml
from helpers.service import Service, running_service

from tinylm.client import METADATA
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

GIVE_UP_S = 60
EXPORTER = """
import os
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class OTLPSpanExporter(SpanExporter):
    def export(self, spans):
        with open(os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"], "a") as file:
            file.writelines(span.to_json(indent=None) + "\\n" for span in spans)
        return SpanExportResult.SUCCESS
"""


@pytest.fixture(scope="module")
def spans_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spans") / "spans.jsonl"


@pytest.fixture(scope="module")
def service(spans_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("tracing")
    module = directory / "packages/opentelemetry/exporter/otlp/proto/http/trace_exporter/__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text(EXPORTER)
    values = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    values["applications"][0]["deployments"][0]["num_replicas"] = 1
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(directory / "packages"), os.environ.get("PYTHONPATH", "")]),
        "OTEL_EXPORTER_OTLP_ENDPOINT": str(spans_file),
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running_service(config, directory, **environment) as service:
        yield service


def exported(spans_file: Path, trace_id: str, n_spans: int) -> dict[str, dict]:
    """Return the spans of a trace by their name, when there are `n_spans`."""
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        lines = spans_file.read_text(encoding="utf-8").splitlines() if spans_file.exists() else []
        spans = [span for span in map(json.loads, lines) if span["context"]["trace_id"] == f"0x{trace_id}"]
        if len(spans) >= n_spans:
            assert len(spans) == n_spans
            return {span["name"]: span for span in spans}
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("protocol", ["Generate", "GenerateStream", "POST /v1/completions"])
def test_a_call_continues_the_callers_trace(
    service: Service, spans_file: Path, http: openai.DefaultHttpxClient, protocol: str
) -> None:
    trace_id, parent_id = os.urandom(16).hex(), os.urandom(8).hex()
    traceparent = f"00-{trace_id}-{parent_id}-01"
    if protocol.startswith("POST"):
        body = {"prompt": "Once", "max_tokens": 5}
        headers = {"traceparent": traceparent}
        http.post(f"{service.url}/v1/completions", json=body, headers=headers).raise_for_status()
    else:
        with grpc.insecure_channel(service.address) as channel:
            metadata = (*METADATA, ("traceparent", traceparent))
            answer = getattr(TinyLMStub(channel), protocol)(
                pb.GenerateRequest(prompt="Once", max_tokens=5), metadata=metadata
            )
            if protocol == "GenerateStream":
                list(answer)
    spans = exported(spans_file, trace_id, 4)
    call = spans.pop(protocol)
    assert call["parent_id"] == f"0x{parent_id}"
    assert list(spans) == ["queue", "prefill", "decode"]
    assert {span["parent_id"] for span in spans.values()} == {call["context"]["span_id"]}
    (line,) = (line for line in service.call_lines() if line.get("trace_id") == trace_id)
    assert line["method"] == protocol


def test_a_call_without_a_trace_or_with_a_wrong_one_gets_its_own(service: Service, spans_file: Path) -> None:
    with grpc.insecure_channel(service.address) as channel:
        for more in ((), (("traceparent", f"00-{'0' * 32}-00f067aa0ba902b7-01"),)):
            before = len(service.call_lines())
            TinyLMStub(channel).Generate(pb.GenerateRequest(prompt="Once", max_tokens=2), metadata=(*METADATA, *more))
            line = service.call_lines()[before]
            assert exported(spans_file, line["trace_id"], 4)["Generate"]["parent_id"] is None
