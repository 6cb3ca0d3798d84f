"""Goodput: the share of requests within limits such as `ttft<50,e2e<500` (ms)."""

from __future__ import annotations

import re
from collections.abc import Mapping

METRICS = ("ttft", "tpot", "e2e")  # time to first token, time per further token, end to end


def parse(text: str) -> dict[str, float]:
    """Return the limits in ms: `ttft<50,e2e<500` -> {"ttft": 50.0, "e2e": 500.0}. Raises ValueError."""
    limits: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*<\s*(\d+\.?\d*|\.\d+)\s*", item)
        if match is None or match[1] not in METRICS or match[1] in limits:
            raise ValueError(
                f"--goodput is {text!r}: it must be limits in ms as in ttft<50,e2e<500, each of "
                f"{', '.join(METRICS)} at most once"
            )
        limits[match[1]] = float(match[2])
    return limits


def is_met(limits: Mapping[str, float], seconds: Mapping[str, float | None]) -> bool:
    """Return whether every figure is below its limit. A missing figure does not meet its limit."""
    found = {name: seconds[name] for name in limits}
    return all(value is not None and value * 1000 < limits[name] for name, value in found.items())
