"""The scheduling priority of the load generator."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from loadtest.generator.priority import schedule, waited_s

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these scheduling policies")
BUSY = "while True: pass"
T = TypeVar("T")


def realtime_is_permitted() -> bool:
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def in_a_thread(work: Callable[[], T]) -> T:
    """Return the result of `work()`. The scheduling of its thread ends with it."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_threads_inherit_the_permitted_scheduling() -> None:
    def work() -> tuple[str, int, int]:
        got = schedule(realtime=True)
        policy = in_a_thread(lambda: os.sched_getscheduler(0))
        schedule(realtime=False)
        return got, policy, os.sched_getscheduler(0)

    expected = ("realtime", os.SCHED_RR) if realtime_is_permitted() else ("normal", os.SCHED_OTHER)
    assert in_a_thread(work) == (*expected, os.SCHED_OTHER)


def test_waiting_for_a_core_is_counted() -> None:
    """Two busy processes on the same core make this one wait."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rivals = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        before, end = waited_s(), time.monotonic() + 30
        while waited_s() <= before and time.monotonic() < end:
            pass
        assert waited_s() > before
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
        os.sched_setaffinity(0, cores)
