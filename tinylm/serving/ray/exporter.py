"""Give a replica's metrics to Ray once a second. Ray's node agents show them to Prometheus.

Ray adds the prefix `ray_` and the labels deployment, replica and application. One call of `ray.serve.metrics` costs
microseconds, so nothing is exported per request or per step.
"""

from __future__ import annotations

import asyncio
import logging

from ray.serve import metrics as ray_metrics

from tinylm.engine.stats import Histogram
from tinylm.serving.metrics import METRICS, PREFIX, Metric, ServiceMetrics
from tinylm.serving.ray.internals import export_zero

logger = logging.getLogger("ray.serve")

EXPORT_EVERY_S = 1.0


class Exporter:
    """Exports a replica's metrics from a task of the running event loop.

    Counters become Ray Counters, and everything else becomes Ray Gauges. A histogram becomes the gauges `_bucket` (with
    the label `le`), `_sum` and `_count`. They are exact, and cost the same at any load. Ray's own Histogram needs one
    call a value, computes `_sum` from the middle of each bucket, and repeats every value in the node's agent.
    """

    def __init__(self, metrics: ServiceMetrics) -> None:
        """Call it inside the replica's running event loop."""
        self._metrics = metrics
        self._counters: dict[Metric, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._exported: dict[tuple[Metric, str], int] = {}  # counts so far
        for metric in METRICS:
            name, text = PREFIX + metric.name, f"{metric.meaning} ({metric.unit})"
            if metric.kind == "counter":
                self._counters[metric] = ray_metrics.Counter(name, text, (metric.label,) if metric.label else None)
            elif metric.kind == "gauge":
                self._gauges[metric.name] = ray_metrics.Gauge(name, text)
            else:
                self._gauges[f"{metric.name}_bucket"] = ray_metrics.Gauge(f"{name}_bucket", text, ("le",))
                self._gauges[f"{metric.name}_sum"] = ray_metrics.Gauge(f"{name}_sum", text)
                self._gauges[f"{metric.name}_count"] = ray_metrics.Gauge(f"{name}_count", text)
        self._task = asyncio.get_running_loop().create_task(self._export_forever())

    async def _export_forever(self) -> None:
        while True:
            try:
                self.export()
            except Exception:  # a fault of metrics must not end the service, or stop later exports
                logger.exception("metrics could not be exported")
            await asyncio.sleep(EXPORT_EVERY_S)

    def export(self) -> None:
        """Give all numbers to Ray as they are now."""
        for metric, value, count in self._metrics.counts():
            self._count(metric, value, count)
        for metric, number in self._metrics.gauges().items():
            self._gauges[metric.name].set(number, {})
        for metric, histogram in self._metrics.histograms().items():
            self._histogram(metric, histogram)

    def _count(self, metric: Metric, value: str, count: int) -> None:
        tags = {metric.label: value} if metric.label else {}
        before = self._exported.get((metric, value))
        if before is None:
            export_zero(self._counters[metric], tags)
        if count > (before or 0):
            self._counters[metric].inc(count - (before or 0), tags)
        self._exported[metric, value] = count

    def _histogram(self, metric: Metric, histogram: Histogram) -> None:
        counts = histogram.cumulative()
        for bound, count in zip((*(f"{bound:g}" for bound in histogram.bounds), "+Inf"), counts, strict=True):
            self._gauges[f"{metric.name}_bucket"].set(count, {"le": bound})
        self._gauges[f"{metric.name}_sum"].set(histogram.sum, {})
        self._gauges[f"{metric.name}_count"].set(counts[-1], {})
