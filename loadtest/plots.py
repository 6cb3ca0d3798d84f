"""Pictures of results by matplotlib: each function draws one and returns its figure, or None of nothing to draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from loadtest import histogram
from loadtest.table import load_name

Result = Mapping[str, Any]
Run = Mapping[str, Any]
WIDTH_IN = 7.5
HEIGHT_IN = 4.2
TITLES = {"latency": "end-to-end latency", "ttft": "time to first token", "itl": "inter-token latency"}


def histograms(result: Result, name: str) -> Figure | None:
    """How often each duration came, a panel a load; repeats are added up."""
    loads = _merged(result, name)
    if not loads:
        return None
    columns = min(len(loads), 3)
    rows = -(-len(loads) // columns)
    figure = Figure((3.4 * columns, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(_literal(f"{result['label']}: {TITLES[name]}"), fontsize=11)
    for axes, (load, merged) in zip(figure.subplots(rows, columns, squeeze=False).flat, loads.items(), strict=False):
        values, counts = histogram.recorded(merged)
        bins = np.geomspace(values.min() * 0.98, values.max() * 1.02, 40)
        axes.hist(values, bins, weights=counts, color="tab:blue")
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        for share, colour in ((50, "tab:green"), (99, "tab:red")):
            value = merged.get_value_at_percentile(share) / 1000
            axes.axvline(value, color=colour, linewidth=1, label=f"p{share} {value:.3g} ms")
        axes.set_title(load, fontsize=9)
        axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("ms", fontsize=8)
    return figure


def percentiles(result: Result, name: str) -> Figure | None:
    """The duration that a share of requests stays below, to the last one; a line a load."""
    loads = _merged(result, name)
    if not loads:
        return None
    figure, axes = _axes(f"{result['label']}: {TITLES[name]} by percentile")
    for load, merged in loads.items():
        shares, values = histogram.curve(merged)
        axes.plot(1 / (1 - shares), values, label=load)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * (1 - 1 / x):.6g}" if x > 0 else ""))
    _plain_numbers(axes.yaxis)
    axes.set(xlabel="percentile", ylabel="ms")
    axes.legend(fontsize=8)
    return figure


def against_load(results: Sequence[Result], stream: bool) -> Figure | None:
    """Tokens a second and p99 latency against the number of clients (or the rate), a line a result."""
    figure = Figure((WIDTH_IN * 1.4, HEIGHT_IN), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = 0
    for result in results:
        points = _by_load(result, stream)
        if not points:
            continue
        drawn += 1
        loads = sorted(points)
        for axes, path in ((left, ("tokens_per_s",)), (right, ("latency_ms", "p99"))):
            middle, low, high = _spread([_values(points[load], path) for load in loads])
            axes.errorbar(loads, middle, [middle - low, high - middle], marker="o", capsize=2,
                          label=_literal(result["label"]))  # fmt: skip
    if not drawn:
        return None
    is_open = any(run["load"]["rate_per_s"] for result in results for run in result["runs"])
    for axes, title in ((left, "output tokens/s"), (right, "p99 end-to-end latency, ms")):
        axes.set(xlabel="requests/s offered" if is_open else "clients", title=title)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    _plain_numbers(right.yaxis)
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.suptitle(
        f"{'streams' if stream else 'unary'}; medians, bars from least to most of repeated runs", fontsize=10
    )
    return figure


def against_replicas(results: Sequence[Result], stream: bool) -> Figure | None:
    """Tokens a second against the number of replicas, a line a series and load; None if no series has two numbers."""
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for run in result["runs"]:
            if run["load"]["stream"] == stream and result["replicas"]:
                name = ", ".join(filter(None, (result["series"], load_name(run))))
                lines[name][result["replicas"]].append(run["tokens_per_s"])
    several = {name: points for name, points in lines.items() if len(points) > 1}
    if not several:
        return None
    figure, axes = _axes(f"output tokens/s against replicas, {'streams' if stream else 'unary'}")
    for name, points in several.items():
        counts = sorted(points)
        middle, low, high = _spread([np.array(points[count]) for count in counts])
        axes.errorbar(counts, middle, [middle - low, high - middle], marker="o", capsize=2, label=_literal(name))
    axes.set(xlabel="replicas", ylabel="tokens/s", xticks=sorted({n for points in several.values() for n in points}))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _merged(result: Result, name: str) -> dict[str, Any]:
    """A histogram a load, over its repeats."""
    loads: dict[str, Any] = {}
    for run in result["runs"]:
        if text := run["histograms"].get(name):
            load = load_name(run) + (", stream" if run["load"]["stream"] else "")
            if load in loads:
                loads[load].add(histogram.decode(text))
            else:
                loads[load] = histogram.decode(text)
    return loads


def _by_load(result: Result, stream: bool) -> dict[float, list[Run]]:
    points: dict[float, list[Run]] = defaultdict(list)
    for run in result["runs"]:
        if run["load"]["stream"] == stream and run["latency_ms"]:
            points[run["load"]["concurrency"] or run["load"]["rate_per_s"]].append(run)
    return points


def _values(runs: Sequence[Run], path: tuple[str, ...]) -> np.ndarray:
    values: list[float] = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key]
        values.append(value)
    return np.array(values)


def _spread(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(medians, least, most) of each group."""
    return tuple(np.array([f(group) for group in groups]) for f in (np.median, np.min, np.max))  # type: ignore[return-value]


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_literal(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _literal(text: str) -> str:
    """Return the text as Matplotlib must get it, so that it reads no formula between dollar signs."""
    return text.replace("$", r"\$")


def _plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, as they are."""
    axis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())
