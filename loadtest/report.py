"""From single answers to the figures of a run."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from loadtest.closed_loop import Answer, Load

PERCENTILES = (50, 90, 95, 99)


def latencies(seconds: list[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds; {} of nothing."""
    if not seconds:
        return {}
    values = np.array(seconds) * 1000
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {
        name: round(value, 2)
        for name, value in {"mean": float(values.mean()), **percentiles, "max": float(values.max())}.items()
    }


def summarize(load: Load, answers: list[Answer]) -> dict:
    """Rates count answers that ended in the measured time; latencies are of the answers with status OK."""
    good = [answer for answer in answers if answer.status == "OK"]
    tokens = sum(answer.tokens for answer in good)
    return {
        "load": dataclasses.asdict(load),
        "requests_per_s": round(len(good) / load.duration_s, 3),
        "tokens_per_s": round(tokens / load.duration_s, 1),
        "tokens_an_answer": round(tokens / len(good), 2) if good else 0.0,
        "full_length_answers": sum(answer.tokens == load.max_tokens for answer in good),
        "latency_ms": latencies([answer.ended_at - answer.sent_at for answer in good]),
        "first_token_ms": latencies([a.first_text_at - a.sent_at for a in good if a.first_text_at]) or None,
        "statuses": dict(Counter(answer.status for answer in answers)),
        "replicas": dict(sorted(Counter(answer.replica for answer in good).items())),
    }
