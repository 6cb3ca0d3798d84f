"""The benchmark of misbehaving clients, on a running service."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.service import Service

from loadtest.bench import misbehaving
from loadtest.generator.call_record import CallRecord
from loadtest.generator.process_pool import ProcessPool

# One that repeats requests, and one whose connections stay open.
KINDS = ["half-closed streams", "clients that vanish within a stream"]


@pytest.mark.parametrize("name", KINDS)
def test_no_other_client_fails_and_all_slots_are_released(shared_service: Service, name: str) -> None:
    ports = shared_service.grpc_port, shared_service.http_port
    with ProcessPool() as of_grpc, ProcessPool() as of_http:
        pools = {shared_service.address: of_grpc, shared_service.url: of_http}
        found = misbehaving.measure(misbehaving.Service(*ports, pools), name, seconds=1.0)
    assert [window["with"] for window in found["windows"]] == [False, True, True, False]
    assert min(window["requests_per_s"] for window in found["windows"]) > 0
    assert found["errors"] == found["requests_left"] == 0
    assert sum(found["its_outcomes"].values()) > 0
    assert "replicas" in found["memory_growth_mib"]


def test_errors_and_late_calls_are_counted_in_their_window() -> None:
    call = CallRecord(turn=0, wanted=1, intended_at=0.0, sent_at=0.0, ended_at=0.5)
    found = misbehaving.figures([call, replace(call, ended_at=0.25), replace(call, status="UNAVAILABLE")], 2.0)
    assert found["requests_per_s"] == 1
    assert found["errors"] == 1
    assert found["p50_ms"] == pytest.approx(250, rel=0.01)
    assert found["p99_ms"] == pytest.approx(500, rel=0.01)
