"""What a call that a limit refused looks like over HTTP, in the log and in the metrics."""

from __future__ import annotations

import json
import logging

import grpc
import pytest

from tinylm.engine import Engine, EngineFull
from tinylm.model import Model
from tinylm.serving.calls import Call, RateLimited, answering
from tinylm.serving.http.errors import refused
from tinylm.serving.keys import Key
from tinylm.serving.limits import Limits, Refusal
from tinylm.serving.metrics import RATE_LIMITED, REFUSED, ServiceMetrics

KEY = Key("alice", "0" * 64, Limits(60, 900))


def failed(error: Exception, on_end=lambda call: None) -> Call:
    with answering("Generate", on_end) as call:
        call.key = KEY
        raise error
    return call


@pytest.mark.parametrize(
    ("wait_ns", "words", "header"),
    [(1, "0.1 s", "1"), (10**9, "1.0 s", "1"), (10**9 + 1, "1.1 s", "2"), (59_970_000_000, "60.0 s", "60")],
)
def test_a_named_time_is_never_too_short(wait_ns: int, words: str, header: str):
    call = failed(RateLimited("alice", Refusal("tokens", 900, wait_ns)))
    assert call.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call.details == f"the key 'alice' has a limit of 900 tokens per minute: try again in {words}"
    response = refused(call)
    assert (response.status_code, response.headers["retry-after"]) == (429, header)
    assert json.loads(response.body)["error"] == {
        "message": call.details, "type": "tokens", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip


def test_a_full_queue_is_another_error_than_a_limit():
    response = refused(failed(EngineFull("no room")))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    error = json.loads(response.body)["error"]
    assert (error["type"], error["code"]) == ("server_error", "queue_full")


def test_refusals_are_counted_by_the_kind_of_limit(tiny_config, tiny_quantized, caplog):
    metrics = ServiceMetrics(Engine(Model(tiny_config, tiny_quantized, "numpy", "float32"), n_slots=1))
    with caplog.at_level(logging.INFO, "ray.serve"):
        for error in [RateLimited("alice", Refusal("requests", 60, 1)), EngineFull("no room")]:
            failed(error, metrics.count)
        failed(RateLimited("alice", Refusal("tokens", 900, 1)), metrics.count)
    counts = {(metric, value): count for metric, value, count in metrics.counts()}
    assert (counts[RATE_LIMITED, "requests"], counts[RATE_LIMITED, "tokens"]) == (1, 1)
    assert counts[REFUSED, "RESOURCE_EXHAUSTED"] == 3
    assert [record.api_key_name for record in caplog.records] == ["alice"] * 3
