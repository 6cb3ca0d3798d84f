"""The replica's metrics: their definitions, and what each call adds to them.

    python -m tinylm.serving.metrics      # print them as a Markdown table

The end of a call and the engine's steps only change plain numbers. Once a second, `tinylm.serving.ray.exporter` gives
these numbers to Ray.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import grpc

from tinylm.engine import Engine
from tinylm.engine.stats import Histogram
from tinylm.serving.calls import Call, RateLimited
from tinylm.serving.limits import KINDS

PREFIX = "tinylm_"
METHODS = ("Generate", "GenerateStream", "POST /v1/completions")  # only these calls count as requests
# An answer of 64 tokens takes 20 to 100 ms, and its first token a few ms. Anything above 10 s is a fault.
REQUEST_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity, so that it is a fast key
class Metric:
    """A metric and its description."""

    name: str  # without prefixes and suffixes
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    label: str | None = None
    values: tuple[str, ...] = ()  # known values of the label

    @property
    def exported(self) -> str:
        """Return the name in Prometheus, without a histogram's `_bucket`, `_sum` and `_count`."""
        return f"ray_{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


def _counter(name: str, unit: str, meaning: str, label: str | None = None, values: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "counter", unit, meaning, label, values)


def _seconds(name: str, meaning: str) -> Metric:
    return Metric(f"{name}_seconds", "histogram", "seconds", meaning)


_FINISHED = ("stop", "length", "timeout")
_ENDINGS = (*_FINISHED, "cancelled", "error")
_CODES = ("INVALID_ARGUMENT", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
REQUESTS = _counter(
    "requests",
    "requests",
    "generating calls that a replica received, counted at their end: request_success + requests_cancelled + "
    "requests_refused",
)
SUCCESSES = _counter(
    "request_success",
    "requests",
    "complete answers by ending: the model or a stop string (stop), max_tokens or the context (length), timeout_ms "
    "(timeout); a call with several answers counts once",
    "finished_reason",
    _FINISHED,
)
CANCELLED = _counter("requests_cancelled", "requests", "calls that the client or its deadline ended before the answer")
REFUSED = _counter(
    "requests_refused",
    "requests",
    "calls that ended with an error, by gRPC status: INVALID_ARGUMENT and UNAUTHENTICATED are the client's errors, "
    "RESOURCE_EXHAUSTED means a full queue or a limit of the key, UNAVAILABLE and INTERNAL are faults of the replica",
    "code",
    _CODES,
)
RATE_LIMITED = _counter(
    "requests_rate_limited",
    "requests",
    "calls that a limit of their key refused, by what it limits per minute; requests_refused counts them too",
    "limit",
    KINDS,
)
PROMPT_TOKENS = _counter(
    "prompt_tokens",
    "tokens",
    "prompt tokens (with the boundary) of requests that the engine accepted, by the request's ending",
    "finished_reason",
    _ENDINGS,
)
GENERATION_TOKENS = _counter(
    "generation_tokens",
    "tokens",
    "generated tokens, counted at the request's end, by its ending; cancelled and error had no complete answer",
    "finished_reason",
    _ENDINGS,
)
TIME_TO_FIRST_TOKEN = _seconds("time_to_first_token", "from a request's arrival in the replica to its first token")
INTER_TOKEN_LATENCY = _seconds("inter_token_latency", "from each token of an answer to the next, in the engine")
LATENCY = _seconds(
    "e2e_request_latency", "from a request's arrival in the replica to its last token; complete answers only"
)
QUEUE_TIME = _seconds(
    "request_queue_time",
    "from a request's arrival in the replica to its slot of the engine, or to its end without one; refused requests "
    "are not counted",
)
RUNNING = Metric("num_requests_running", "gauge", "requests", "requests that hold a slot of the engine now")
WAITING = Metric("num_requests_waiting", "gauge", "requests", "requests that wait for a slot now")
CACHE_USAGE = Metric(
    "kv_cache_usage_perc", "gauge", "share, 0 to 1", "positions of the KV cache in use now, of slots times context"
)
STEP_DURATION = _seconds("step_duration", "one step of the engine: one batch through the model, and sampling")
BATCH_SIZE = Metric("batch_size", "histogram", "sequences", "sequences that got a token in a step, if there were any")
PREFIX_QUERIES = _counter("prefix_cache_queries", "tokens", "prompt tokens of requests that got a slot")
PREFIX_HITS = _counter("prefix_cache_hits", "tokens", "prompt tokens whose keys and values were already in the cache")
METRICS = (
    REQUESTS, SUCCESSES, CANCELLED, REFUSED, RATE_LIMITED, PROMPT_TOKENS, GENERATION_TOKENS, TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY, LATENCY, QUEUE_TIME, RUNNING, WAITING, CACHE_USAGE, STEP_DURATION, BATCH_SIZE, PREFIX_QUERIES,
    PREFIX_HITS,
)  # fmt: skip


class ServiceMetrics:
    """The numbers of one replica."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counts = {
            (metric, value): 0 for metric in METRICS if metric.kind == "counter" for value in metric.values or ("",)
        }
        self._first_token_s, self._queue_s = Histogram(REQUEST_BOUNDS_S), Histogram(REQUEST_BOUNDS_S)
        self.latency_s = Histogram(REQUEST_BOUNDS_S)  # of complete answers, from arrival to the last token

    @property
    def n_requests(self) -> int:
        """Return how many requests have ended, in any way."""
        return self._counts[REQUESTS, ""]

    def counts(self) -> Iterator[tuple[Metric, str, int]]:
        """Yield each counter, the value of its label ("" without a label), and its count."""
        stats = self._engine.stats
        self._counts[PREFIX_QUERIES, ""] = stats.n_prompt_tokens
        self._counts[PREFIX_HITS, ""] = stats.n_reused_tokens
        for (metric, value), count in self._counts.items():
            yield metric, value, count

    def gauges(self) -> dict[Metric, float]:
        """Return the gauges' values now."""
        engine = self._engine
        return {RUNNING: engine.n_running, WAITING: engine.n_waiting, CACHE_USAGE: engine.kv_usage}

    def histograms(self) -> dict[Metric, Histogram]:
        """Return all histograms, of the calls and of the engine."""
        stats = self._engine.stats
        return {
            TIME_TO_FIRST_TOKEN: self._first_token_s,
            LATENCY: self.latency_s,
            QUEUE_TIME: self._queue_s,
            INTER_TOKEN_LATENCY: stats.inter_token_s,
            STEP_DURATION: stats.step_s,
            BATCH_SIZE: stats.batch_size,
        }

    def count(self, call: Call) -> None:
        """Count a call that has ended. Ignore calls that do not generate text."""
        if call.method not in METHODS:
            return
        self._add(REQUESTS)
        reason = call.finish_reason
        if len(call.completions) == call.n_expected and reason is not None:
            self._add(SUCCESSES, reason)  # even when the client leaves after the last message
        elif call.status is grpc.StatusCode.CANCELLED:
            self._add(CANCELLED)
        else:
            self._add(REFUSED, call.status.name)
            if isinstance(call.error, RateLimited):
                self._add(RATE_LIMITED, call.error.kind)
        for answer in call.answers:
            self._add(PROMPT_TOKENS, call.reason_of(answer), answer.n_prompt_tokens)
            self._add(GENERATION_TOKENS, call.reason_of(answer), answer.n_tokens)
        self._observe_times(call)

    def _observe_times(self, call: Call) -> None:
        """Observe times since the call's arrival, which the engine does not know. Several answers count as one."""
        first_tokens = [a.progress.first_token_at for a in call.answers if a.progress.first_token_at is not None]
        if first_tokens:
            self._first_token_s.observe(min(first_tokens) - call.began_at)
        is_answered = len(call.completions) == call.n_expected
        if is_answered:
            ends = [a.progress.submitted_at + a.completion.total_s for a in call.answers if a.completion is not None]
            self.latency_s.observe(max(ends) - call.began_at)
        if is_answered or call.status is grpc.StatusCode.CANCELLED:
            admitted = [a.progress.admitted_at for a in call.answers if a.progress.admitted_at is not None]
            self._queue_s.observe(min(admitted, default=time.monotonic()) - call.began_at)

    def _add(self, metric: Metric, value: str = "", amount: int = 1) -> None:
        self._counts[metric, value] = self._counts.get((metric, value), 0) + amount


def table() -> str:
    """Return all metrics as a Markdown table."""
    rows = [
        f"| `{metric.exported}`{f' by `{metric.label}`' if metric.label else ''} | {metric.kind} | {metric.unit} | "
        f"{metric.meaning} |"
        for metric in METRICS
    ]
    return "\n".join(["| metric | kind | unit | meaning |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
