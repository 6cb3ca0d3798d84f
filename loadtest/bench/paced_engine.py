"""Make each step of a replica's engine take the same time, whatever else the processor does.

A Serve config names `begin` in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve calls it in each replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from tinylm.serving.ray import internals

STEP_S = 0.02  # many times a step's own time


Step = Callable[[Any], Any]  # of an engine


def begin() -> None:
    replace_steps(paced)


def replace_steps(changed: Callable[[Step], Step]) -> None:
    """Let the engine of this process use `changed(step)` in place of its step. Serve's proxies have no engine."""
    internals.set_grpc_limits()  # the committed configs name it in the same variable
    try:
        serve.get_replica_context()
    except RayServeException:  # a proxy
        return
    from tinylm.engine import Engine

    Engine.step = changed(Engine.step)  # type: ignore[assignment, method-assign]


def paced(step: Step) -> Step:
    """Return a step that ends STEP_S after its beginning, or later if `step` itself takes longer."""

    def paced_step(engine: Any) -> Any:
        until = time.monotonic() + STEP_S
        changed = step(engine)
        time.sleep(max(0.0, until - time.monotonic()))
        return changed

    return paced_step
