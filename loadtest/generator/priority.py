"""Schedule the load generator before other processes, because it may share the cores with the measured server.

A client that waits for a core sends late and sees answers late, and its figures blame the service for that. So the
system schedules its threads first where that is permitted (Linux, with CAP_SYS_NICE). Results always contain how long
it waited.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

Scheduling = Literal["realtime", "normal"]


def schedule(realtime: bool) -> Scheduling:
    """Set the scheduling of this thread and of the threads that it starts from now on. Return what was permitted."""
    if sys.platform != "linux":
        return "normal"
    policy = os.SCHED_RR if realtime else os.SCHED_OTHER
    try:
        os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(policy)))
    except PermissionError:
        return "normal"
    return "realtime" if realtime else "normal"


def waited_s() -> float:
    """Return for how many seconds the main thread of this process was ready to run and had no core."""
    try:
        _, waited_ns, _ = Path(f"/proc/self/task/{os.getpid()}/schedstat").read_text(encoding="ascii").split()
    except OSError:  # not Linux, or a kernel that does not count
        return 0.0
    return int(waited_ns) / 1e9
