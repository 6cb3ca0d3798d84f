"""Make the engine of each replica slow while a file exists, so that a stream lasts as long as a test needs.

A Serve config names `begin` in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve calls it in each replica.
"""

import os
import time
from pathlib import Path
from typing import Any

from loadtest.bench.paced_engine import Step, replace_steps

FILE = "TINYLM_TEST_SLOW_WHILE"  # the variable with the path of the file
STEP_S = 2.0  # each step gives every running request a token


def begin() -> None:
    replace_steps(slow)


def slow(step: Step) -> Step:
    file = Path(os.environ[FILE])

    def slow_step(engine: Any) -> Any:
        changed = step(engine)
        until = time.monotonic() + STEP_S
        while file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return changed

    return slow_step
