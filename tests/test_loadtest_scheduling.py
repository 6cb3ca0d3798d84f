"""The load generator's place before what it measures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from loadtest.client.scheduling import schedule, waited_s

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets a process come first")
BUSY = "while True: pass"


def may_come_first() -> bool:
    """Whether this user may, as a process of its own finds out."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def in_a_thread(work):
    """The result of `work()`, whose thread takes its own scheduling with it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_it_says_what_it_got_and_threads_inherit_it():
    def work():
        got = schedule(realtime=True)
        policy = in_a_thread(lambda: os.sched_getscheduler(0))
        schedule(realtime=False)
        return got, policy, os.sched_getscheduler(0)

    expected = ("realtime", os.SCHED_RR) if may_come_first() else ("normal", os.SCHED_OTHER)
    assert in_a_thread(work) == (*expected, os.SCHED_OTHER)


def test_waiting_for_a_core_is_noticed():
    """Beside two that never let go of the same core, whoever wants it all the time has to wait."""
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
