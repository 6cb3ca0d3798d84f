"""From single calls to the figures of a run. Every definition stands in docs/speed.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from loadtest import goodput, histogram
from loadtest.load import Load
from loadtest.records import Records

LATE_S = 0.01  # a request sent so much after its time was late


def measured(load: Load, records: Records) -> Records:
    """The calls that count: the warm-up's are left out.

    Closed loop by time: those that ended within it. Closed loop by number: those sent after the warm-up. Open loop:
    those that were to be sent after it, however long they took.
    """
    if load.rate_per_s is not None:
        return records.where(records.intended_s >= 0)
    if load.requests is not None:
        return records.where(records.sent_s >= 0)
    return records.where((records.ended_s >= 0) & (records.ended_s <= load.duration_s))


def summarize(load: Load, records: Records, limits: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of a run as they stand in a result file; `limits` are the goodput's. Latencies are of OK calls."""
    calls = measured(load, records)
    window_s = load.duration_s if load.requests is None else float(calls.ended_s.max(initial=1e-9))
    ok = calls.where(calls.status == "OK")
    ended = records.where((records.status == "OK") & (records.ended_s >= 0) & (records.ended_s <= window_s))
    histograms = {name: histogram.of_seconds(*of) for name, of in distributions(load, ok).items()}
    result: dict[str, Any] = {
        "window_s": round(window_s, 3),
        "requests": len(calls),
        "requests_per_s": round(len(ended) / window_s, 3),
        "tokens_per_s": round(float(ended.tokens.sum()) / window_s, 1),
        "tokens_an_answer": _mean(ok.tokens),
        "prompt_tokens_a_request": _mean(ok.prompt_tokens),
        "full_length_answers": int((ok.tokens == ok.wanted).sum()),
        "statuses": dict(Counter(calls.status.tolist()).most_common()),
        "replicas": dict(sorted(Counter(ok.replica[ok.replica != ""].tolist()).items())),
        "replica_spread": _spread(ok),
        **{f"{name}_ms": histogram.figures(h) for name, h in histograms.items()},
        "failures_ms": _failures(calls),
    }
    if load.stream:
        result["messages"] = _messages(ok)
    if load.rate_per_s is not None:
        result["sends"] = _sends(calls, window_s)
    elif load.requests is None:
        result["unfinished"] = _unfinished(load, records)
    if limits:
        good = int(goodput.met(limits, times(calls), calls.status == "OK").sum())
        share = good / len(calls) if len(calls) else 0.0
        result["goodput"] = {"limits_ms": limits, "share": round(share, 6), "requests_per_s": round(good / window_s, 3)}
    result["histograms"] = {name: histogram.encode(h) for name, h in histograms.items() if h.get_total_count()}
    return result


def times(calls: Records) -> dict[str, np.ndarray]:
    """Seconds (n,) of each call: e2e, ttft, tpot; NaN where a call has none."""
    following = calls.tokens - calls.first_tokens
    tpot = np.full(len(calls), np.nan)
    np.divide(calls.last_s - calls.first_s, following, out=tpot, where=following > 0)
    return {"e2e": calls.ended_s - calls.intended_s, "ttft": calls.first_s - calls.intended_s, "tpot": tpot}


def distributions(load: Load, ok: Records) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Seconds (n,) and how often each counts (n,), None for once, by the figure's name.

    latency, ttft and tpot count each call once, itl each token but those of a stream's first message, gap each
    message but a stream's first. latency_from_send is an open loop's latency as a naive client would tell it.
    """
    seconds = times(ok)
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"latency": (seconds["e2e"], None)}
    if load.rate_per_s is not None:
        found["latency_from_send"] = (ok.ended_s - ok.sent_s, None)
    if load.stream:
        for name in ("ttft", "tpot"):
            found[name] = (seconds[name][~np.isnan(seconds[name])], None)
        found["itl"] = (ok.itl_s, ok.gap_tokens)
        found["gap"] = (ok.gap_s, None)
    return found


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 2) if len(values) else 0.0


def _failures(calls: Records) -> dict[str, dict[str, float]]:
    """How long calls took that ended otherwise than by an answer, by status: a refusal should be quick."""
    seconds = times(calls)["e2e"]
    statuses = sorted(set(calls.status.tolist()) - {"OK"})
    return {name: histogram.figures(histogram.of_seconds(seconds[calls.status == name])) for name in statuses}


def _spread(ok: Records) -> float | None:
    """The busiest replica's answers over the mean of all that answered: 1 is perfectly even."""
    counts = np.unique(ok.replica[ok.replica != ""], return_counts=True)[1]
    return round(float(counts.max() / counts.mean()), 3) if len(counts) else None


def _messages(ok: Records) -> dict[str, Any]:
    """How tokens came in messages, and whether the number in each is known rather than spread evenly."""
    known = bool((ok.told | (ok.messages == ok.tokens)).all())
    return {"tokens_a_message": _mean(ok.tokens / np.maximum(ok.messages, 1)), "tokens_of_each_known": known}


def _sends(calls: Records, window_s: float) -> dict[str, float]:
    lateness = calls.sent_s - calls.intended_s
    return {
        "intended_per_s": round(len(calls) / window_s, 3),
        "late": int((lateness > LATE_S).sum()),
        "late_by_more_than_ms": LATE_S * 1000,
        "latest_ms": round(float(lateness.max(initial=0)) * 1000, 3),
    }


def _unfinished(load: Load, records: Records) -> dict[str, float]:
    """Calls that were open when a closed loop's time was over: in no other figure, so that a hang would hide there."""
    still_open = records.where((records.sent_s < load.duration_s) & (records.ended_s > load.duration_s))
    longest = float((still_open.ended_s - still_open.sent_s).max(initial=0))
    return {"requests": len(still_open), "longest_ms": round(longest * 1000, 3)}
