"""The replica's metrics: what they are called, what each request adds to them, and how they reach Ray.

    python -m tinylm.serving.metrics      # the table of docs/monitoring.md

The end of a request and the engine's steps only change plain numbers; once a second a task hands them to
`ray.serve.metrics`, where every call costs microseconds. Ray adds the prefix `ray_` and the labels deployment, replica
and application, and its node agents show the numbers to Prometheus; dashboards and alerts are in configs/monitoring.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Literal

import grpc
from ray.serve import metrics as ray_metrics

from tinylm.engine import Engine
from tinylm.serving.calls import Call
from tinylm.stats import Histogram

logger = logging.getLogger("ray.serve")

EXPORT_EVERY_S = 1.0
PREFIX = "tinylm_"
METHODS = ("Generate", "GenerateStream", "POST /v1/completions")  # their calls are the requests that are counted
# An answer of 64 tokens takes 20 to 100 ms, its first token a few; what is beyond 10 s is a fault, however far.
REQUEST_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10,
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A metric as `docs/monitoring.md` describes it; `values` are those its label is known to take."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    label: str | None = None
    values: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees, without a histogram's `_bucket`, `_sum` and `_count`."""
        return f"ray_{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


_ENDINGS = ("stop", "length", "timeout", "cancelled", "error")
METRICS = (
    Metric(
        "requests",
        "counter",
        "requests",
        "calls of Generate, GenerateStream and /v1/completions that reached a replica, counted when they end: the sum "
        "of request_success, requests_cancelled and requests_refused",
    ),
    Metric(
        "request_success",
        "counter",
        "requests",
        "answers, by how they ended: the model or a stop string (stop), max_tokens or the context (length), timeout_ms "
        "(timeout, which a unary call hears of as DEADLINE_EXCEEDED); a call with several answers counts once",
        "finished_reason",
        ("stop", "length", "timeout"),
    ),
    Metric(
        "requests_cancelled",
        "counter",
        "requests",
        "calls that the client, or its deadline, ended before the answer had",
    ),
    Metric(
        "requests_refused",
        "counter",
        "requests",
        "calls that ended with a status instead of an answer, by its gRPC name: INVALID_ARGUMENT and UNAUTHENTICATED "
        "are the client's doing, RESOURCE_EXHAUSTED is a full queue, UNAVAILABLE and INTERNAL are the replica's faults",
        "code",
        ("INVALID_ARGUMENT", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"),
    ),
    Metric(
        "prompt_tokens",
        "counter",
        "tokens",
        "prompt tokens, the boundary included, of requests that the engine took, by how they ended, also in the queue; "
        "over stop, length and timeout it is the sum of usage.prompt_tokens",
        "finished_reason",
        _ENDINGS,
    ),
    Metric(
        "generation_tokens",
        "counter",
        "tokens",
        "tokens of answers, counted when the request ends, by how it ended; over stop, length and timeout it is the "
        "sum of usage.completion_tokens, and what was generated for nothing is under cancelled and error",
        "finished_reason",
        _ENDINGS,
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "seconds",
        "from a request's arrival in the replica to its first token; of every request that got one, however it ended",
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "seconds",
        "from each token of an answer to the next, in the engine; of every token after an answer's first",
    ),
    Metric(
        "e2e_request_latency_seconds",
        "histogram",
        "seconds",
        "from a request's arrival in the replica to its last token; of answers (request_success)",
    ),
    Metric(
        "request_queue_time_seconds",
        "histogram",
        "seconds",
        "from a request's arrival in the replica until it had a slot of the engine, or until it ended if it never had "
        "one; not of refused requests",
    ),
    Metric("num_requests_running", "gauge", "requests", "requests that hold a slot of the engine now"),
    Metric("num_requests_waiting", "gauge", "requests", "requests queued for a slot now"),
    Metric(
        "kv_cache_usage_perc",
        "gauge",
        "share, 0 to 1",
        "positions of the KV cache that running requests hold now, of slots times context",
    ),
    Metric(
        "step_duration_seconds",
        "histogram",
        "seconds",
        "of a step of the engine: one batch through the model, its tokens sampled",
    ),
    Metric(
        "batch_size",
        "histogram",
        "sequences",
        "sequences that a step gave a token; steps that only read prompts do not count",
    ),
    Metric(
        "prefix_cache_queries",
        "counter",
        "tokens",
        "prompt tokens of requests that were given a slot",
    ),
    Metric(
        "prefix_cache_hits",
        "counter",
        "tokens",
        "those of them whose keys and values were in the cache already",
    ),
)


class ServiceMetrics:
    """Make it inside a replica's running event loop, on which it exports from then on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counts = {  # metric, label's value
            (metric.name, value): 0
            for metric in METRICS
            if metric.kind == "counter"
            for value in metric.values or ("",)
        }
        self._histograms = {
            "time_to_first_token_seconds": Histogram(REQUEST_BOUNDS_S),
            "e2e_request_latency_seconds": Histogram(REQUEST_BOUNDS_S),
            "request_queue_time_seconds": Histogram(REQUEST_BOUNDS_S),
            "inter_token_latency_seconds": engine.stats.inter_token_s,
            "step_duration_seconds": engine.stats.step_s,
            "batch_size": engine.stats.batch_size,
        }
        self._exporter = _Exporter()
        self._task = asyncio.get_running_loop().create_task(self._export_forever())

    @property
    def n_requests(self) -> int:
        """Requests that have ended, however they did."""
        return self._counts["requests", ""]

    @property
    def latency_s(self) -> Histogram:
        """Of answers, from their request's arrival to their last token."""
        return self._histograms["e2e_request_latency_seconds"]

    def count(self, call: Call) -> None:
        """Count a call that has ended, unless it asked for no text."""
        if call.method not in METHODS:
            return
        self._add("requests")
        reason = call.finish_reason
        if len(call.completions) == call.n_expected and reason is not None:
            self._add("request_success", reason)  # whatever came after: a client may leave once it has the last message
        elif call.status is grpc.StatusCode.CANCELLED:
            self._add("requests_cancelled")
        else:
            self._add("requests_refused", call.status.name)
        for answer in call.answers:
            self._add("prompt_tokens", call.reason_of(answer), answer.n_prompt_tokens)
            self._add("generation_tokens", call.reason_of(answer), answer.n_tokens)
        self._observe_times(call)

    def _observe_times(self, call: Call) -> None:
        """Times count from the call's arrival, of which the engine does not know; of several answers, in all."""
        first_tokens = [a.sequence.first_token_at for a in call.answers if a.sequence.first_token_at is not None]
        if first_tokens:
            self._observe("time_to_first_token_seconds", min(first_tokens) - call.began_at)
        is_answered = len(call.completions) == call.n_expected
        if is_answered:
            ends = [a.sequence.submitted_at + a.completion.total_s for a in call.answers if a.completion is not None]
            self._observe("e2e_request_latency_seconds", max(ends) - call.began_at)
        if is_answered or call.status is grpc.StatusCode.CANCELLED:
            admitted = [a.sequence.admitted_at for a in call.answers if a.sequence.admitted_at is not None]
            self._observe("request_queue_time_seconds", min(admitted, default=time.monotonic()) - call.began_at)

    def _add(self, name: str, value: str = "", amount: int = 1) -> None:
        self._counts[name, value] = self._counts.get((name, value), 0) + amount

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    async def _export_forever(self) -> None:
        while True:
            try:
                self.export()
            except Exception:  # metrics must never end a service, nor themselves
                logger.exception("metrics could not be exported")
            await asyncio.sleep(EXPORT_EVERY_S)

    def export(self) -> None:
        """Hand all numbers to Ray as they are now."""
        engine = self._engine
        self._counts["prefix_cache_queries", ""] = engine.stats.n_prompt_tokens
        self._counts["prefix_cache_hits", ""] = engine.stats.n_reused_tokens
        for (name, value), count in self._counts.items():
            self._exporter.count(name, value, count)
        for name, histogram in self._histograms.items():
            self._exporter.histogram(name, histogram)
        self._exporter.gauge("num_requests_running", engine.n_running)
        self._exporter.gauge("num_requests_waiting", engine.n_waiting)
        self._exporter.gauge("kv_cache_usage_perc", engine.kv_usage)


class _Exporter:
    """Ray's side: a Counter for what is counted, Gauges for all else.

    Ray's own Histogram takes one call a value, loses the values (its `_sum` is made of the buckets' midpoints) and
    replays every single one in the node's agent. So a histogram goes out as the series that Prometheus makes of one,
    as gauges: `_bucket` by its upper bound `le`, `_sum`, `_count`; exact, at a cost that traffic does not change.
    """

    def __init__(self) -> None:
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._labels: dict[str, str | None] = {metric.name: metric.label for metric in METRICS}
        self._counted: dict[tuple[str, str], int] = {}
        for metric in METRICS:
            name, text = PREFIX + metric.name, f"{metric.meaning} ({metric.unit})"
            if metric.kind == "counter":
                self._counters[metric.name] = ray_metrics.Counter(name, text, (metric.label,) if metric.label else None)
            elif metric.kind == "gauge":
                self._gauges[metric.name] = ray_metrics.Gauge(name, text)
            else:
                self._gauges[f"{metric.name}_bucket"] = ray_metrics.Gauge(f"{name}_bucket", text, ("le",))
                self._gauges[f"{metric.name}_sum"] = ray_metrics.Gauge(f"{name}_sum", text)
                self._gauges[f"{metric.name}_count"] = ray_metrics.Gauge(f"{name}_count", text)

    def count(self, name: str, value: str, count: int) -> None:
        """The count so far of a counter, for one value of its label."""
        label = self._labels[name]
        tags = {label: value} if label else {}
        before = self._counted.get((name, value))
        if before is None:
            # `inc` refuses 0, but `rate` never sees what happened before a series was there.
            self._counters[name]._record(0, tags)
        if count > (before or 0):
            self._counters[name].inc(count - (before or 0), tags)
        self._counted[name, value] = count

    def gauge(self, name: str, value: float, tags: dict[str, str] | None = None) -> None:
        self._gauges[name].set(value, tags or {})

    def histogram(self, name: str, histogram: Histogram) -> None:
        counts = histogram.cumulative()
        for bound, count in zip((*(f"{bound:g}" for bound in histogram.bounds), "+Inf"), counts, strict=True):
            self.gauge(f"{name}_bucket", count, {"le": bound})
        self.gauge(f"{name}_sum", histogram.sum)
        self.gauge(f"{name}_count", counts[-1])


def table() -> str:
    """All metrics as the Markdown table of docs/monitoring.md."""
    rows = [
        f"| `{metric.exported}`{f' by `{metric.label}`' if metric.label else ''} | {metric.kind} | {metric.unit} | "
        f"{metric.meaning} |"
        for metric in METRICS
    ]
    return "\n".join(["| metric | kind | unit | meaning |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
