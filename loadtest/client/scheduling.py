"""Who comes first where the load generator and what it measures share the cores: the generator.

A client that has to wait for a core sends late and sees late what has long been answered; a reader of its figures takes
that for the service's doing. On a machine of its own it would not wait. So its threads are scheduled before all others
where the system lets them (Linux, with CAP_SYS_NICE), and in any case it is known how long they had to wait.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

Scheduling = Literal["realtime", "normal"]


def schedule(realtime: bool) -> Scheduling:
    """For the calling thread and those that it starts from now on; says what it got."""
    if sys.platform != "linux":
        return "normal"
    policy = os.SCHED_RR if realtime else os.SCHED_OTHER
    try:
        os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(policy)))
    except PermissionError:
        return "normal"
    return "realtime" if realtime else "normal"


def waited_s() -> float:
    """Seconds that this process' main thread, where its event loop runs, has been ready to run and was not let."""
    try:
        _, waited_ns, _ = Path(f"/proc/self/task/{os.getpid()}/schedstat").read_text(encoding="ascii").split()
    except OSError:  # not Linux, or a kernel that doesn't count
        return 0.0
    return int(waited_ns) / 1e9
