"""Make the engine of each replica slow while a file exists, so that a stream lasts as long as a test needs.

A Serve config names `begin` in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve calls it in each replica.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from tinylm.serving.ray import internals

FILE = "TINYLM_TEST_SLOW_WHILE"  # the variable with the path of the file
STEP_S = 2.0  # each step gives every running request a token


def begin() -> None:
    internals.set_grpc_limits()  # the committed configs name it in the same variable
    try:
        serve.get_replica_context()
    except RayServeException:  # Serve's proxies call this too, and have no engine
        return
    from tinylm.engine import Engine

    Engine.step = slow(Engine.step)


def slow(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    file = Path(os.environ[FILE])

    def slow_step(engine: Any) -> Any:
        changed = step(engine)
        until = time.monotonic() + STEP_S
        while file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return changed

    return slow_step
