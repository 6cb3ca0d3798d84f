"""Compute the figures of a run from its calls. docs/speed.md defines the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.generator.call_record import CallRecord
from loadtest.load import Load
from loadtest.results import goodput, histogram

LATE_S = 0.01  # a request that is sent later than this after its time counts as late
Records = Sequence[CallRecord]


def summarize(load: Load, records: Records, limits: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the figures of a run as they stand in a result file. Latencies are those of OK calls.

    records: all calls, with times in seconds from the start of the measured time. limits: see `goodput.parse`.
    """
    calls = measured(load, records)
    ok = [call for call in calls if call.status == "OK"]
    window_s = load.duration_s if load.requests is None else max([call.ended_at for call in calls], default=1e-9)
    histograms = {name: histogram.of_seconds(*of) for name, of in distributions(load, ok).items()}
    replicas = Counter(call.replica for call in ok if call.replica)
    result: dict[str, Any] = {
        "window_s": round(window_s, 3),
        "requests": len(calls),
        **_throughput(records, window_s),
        "tokens_an_answer": _mean([call.tokens for call in ok]),
        "prompt_tokens_a_request": _mean([call.prompt_tokens for call in ok]),
        "full_length_answers": sum(call.tokens == call.wanted for call in ok),
        "statuses": dict(Counter(call.status for call in calls).most_common()),
        "replicas": dict(sorted(replicas.items())),
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
        result["goodput"] = _goodput(calls, limits, window_s)
    result["histograms"] = {name: h.encode().decode() for name, h in histograms.items() if h.get_total_count()}
    return result


def measured(load: Load, records: Records) -> list[CallRecord]:
    """Return the calls that count. Calls of the warm-up do not.

    In an open loop, a call counts if it was intended after the warm-up, however long it took. In a closed loop with a
    number of requests, it counts if it was sent after the warm-up. In a closed loop with a duration, it counts if it
    ended within the measured time.
    """
    if load.rate_per_s is not None:
        return [call for call in records if call.intended_at >= 0]
    if load.requests is not None:
        return [call for call in records if call.sent_at >= 0]
    return [call for call in records if 0 <= call.ended_at <= load.duration_s]


def times(call: CallRecord) -> dict[str, float | None]:
    """Return e2e, ttft and tpot of a call in seconds; None where the call has no such figure."""
    found: dict[str, float | None] = {"e2e": call.latency_s, "ttft": None, "tpot": None}
    if call.text_at:
        found["ttft"] = call.text_at[0] - call.intended_at
        following = call.tokens - int(call.tokens_of_messages()[0])
        if following > 0:
            found["tpot"] = (call.text_at[-1] - call.text_at[0]) / following
    return found


def distributions(load: Load, ok: Records) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Return by the name of a figure: its values in seconds (n,), and how often each counts (n,), or None for once.

    latency, ttft and tpot have one value per call. gap has one per message of a stream, and itl one per token, both
    without the first message. latency_from_send is what a naive client would report as the latency of an open loop.
    """
    seconds = [times(call) for call in ok]
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"latency": (_array(seconds, "e2e"), None)}
    if load.rate_per_s is not None:
        found["latency_from_send"] = (np.array([call.ended_at - call.sent_at for call in ok]), None)
    if load.stream:
        found["ttft"] = (_array(seconds, "ttft"), None)
        found["tpot"] = (_array(seconds, "tpot"), None)
        gaps, tokens, itl = _gaps(ok)
        found["itl"] = (itl, tokens)
        found["gap"] = (gaps, None)
    return found


def _array(seconds: Sequence[dict[str, float | None]], name: str) -> np.ndarray:
    return np.array([of_call[name] for of_call in seconds if of_call[name] is not None], np.float64)


def _gaps(ok: Records) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (m,) of the gaps between messages of streams: seconds, tokens of the later message, itl in seconds."""
    gaps, tokens, itl = [np.empty(0)], [np.empty(0, np.int64)], [np.empty(0)]
    for call in ok:
        if len(call.text_at) < 2:
            continue
        seconds, counts = np.diff(call.text_at), call.tokens_of_messages()[1:]
        gaps.append(seconds)
        tokens.append(counts)
        if call.text_tokens is None:  # assume that each message after the first carries the same number of tokens
            itl.append(seconds * (len(call.text_at) - 1) / max(call.tokens - 1, 1))
        else:
            itl.append(seconds / np.maximum(counts, 1))
    return np.concatenate(gaps), np.concatenate(tokens), np.concatenate(itl)


def _throughput(records: Records, window_s: float) -> dict[str, float]:
    ended = [call for call in records if call.status == "OK" and 0 <= call.ended_at <= window_s]
    return {
        "requests_per_s": round(len(ended) / window_s, 3),
        "tokens_per_s": round(sum(call.tokens for call in ended) / window_s, 1),
    }


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 2) if values else 0.0


def _failures(calls: Records) -> dict[str, dict[str, float]]:
    """Return by status how long failed calls took: a refusal should be quick."""
    statuses = sorted({call.status for call in calls} - {"OK"})
    seconds = {status: np.array([c.latency_s for c in calls if c.status == status]) for status in statuses}
    return {status: histogram.figures(histogram.of_seconds(values)) for status, values in seconds.items()}


def _messages(ok: Records) -> dict[str, Any]:
    """Return how many tokens a message carries, and whether that is known of each message."""
    known = all(call.text_tokens is not None or len(call.text_at) == call.tokens for call in ok)
    per_message = [call.tokens / max(len(call.text_at), 1) for call in ok]
    return {"tokens_a_message": _mean(per_message), "tokens_of_each_known": known}


def _sends(calls: Records, window_s: float) -> dict[str, float]:
    lateness = [call.sent_at - call.intended_at for call in calls]
    return {
        "intended_per_s": round(len(calls) / window_s, 3),
        "late": sum(seconds > LATE_S for seconds in lateness),
        "late_by_more_than_ms": LATE_S * 1000,
        "latest_ms": round(max(lateness, default=0) * 1000, 3),
    }


def _unfinished(load: Load, records: Records) -> dict[str, float]:
    """Return the calls that were open at the end of a closed loop. No other figure counts them."""
    still_open = [call for call in records if call.sent_at < load.duration_s < call.ended_at]
    longest_s = max([call.ended_at - call.sent_at for call in still_open], default=0)
    return {"requests": len(still_open), "longest_ms": round(longest_s * 1000, 3)}


def _goodput(calls: Records, limits: dict[str, float], window_s: float) -> dict[str, Any]:
    good = sum(call.status == "OK" and goodput.is_met(limits, times(call)) for call in calls)
    share = good / len(calls) if calls else 0.0
    return {"limits_ms": limits, "share": round(share, 6), "requests_per_s": round(good / window_s, 3)}
