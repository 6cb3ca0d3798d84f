"""Goodput: the share of requests that were as fast as was promised, by limits such as `ttft<50,e2e<500` (ms)."""

from __future__ import annotations

import re

import numpy as np

METRICS = {"ttft": "time to first token", "tpot": "time per output token after the first", "e2e": "end to end"}


def parse(text: str) -> dict[str, float]:
    """`ttft<50,e2e<500` -> {"ttft": 50.0, "e2e": 500.0}. Raises ValueError."""
    limits: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*<\s*([\d.]+)\s*", item)
        if match is None or match[1] not in METRICS or match[1] in limits:
            raise ValueError(
                f"--goodput is {text!r}: it must be limits in ms as in ttft<50,e2e<500, each of "
                f"{', '.join(METRICS)} at most once"
            )
        try:
            limits[match[1]] = float(match[2])
        except ValueError:
            raise ValueError(f"--goodput limits {match[1]} to {match[2]!r}: it must be a number of ms") from None
    return limits


def met(limits: dict[str, float], seconds: dict[str, np.ndarray], ok: np.ndarray) -> np.ndarray:
    """(n,) which calls were OK (n,) and below every limit; one that lacks a figure (NaN) has not met its limit."""
    good = ok.copy()
    for name, limit_ms in limits.items():
        good &= seconds[name] * 1000 < limit_ms  # False of NaN
    return good
