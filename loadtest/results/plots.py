"""Pictures of results. Each function returns a figure of matplotlib, or None if there is nothing to draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from loadtest.results.histogram import recorded
from loadtest.results.result_file import figure_of
from loadtest.results.table import load_name
from tinylm.system.files import check_file, check_own, is_own_png

Result = Mapping[str, Any]
Run = Mapping[str, Any]
WIDTH_IN = 7.5
HEIGHT_IN = 4.2
DPI = 110
TITLES = {"latency": "end-to-end latency", "ttft": "time to first token", "itl": "inter-token latency"}


def check_picture(path: Path) -> None:
    """Raise OSError if `path` cannot be written, or if something is there that is not a picture of TinyLM."""
    check_own(path, is_own_png)
    check_file(path)


def histograms(result: Result, name: str) -> Figure | None:
    """Draw how often each duration occurred, with a panel for each load. Repeats are added up."""
    loads = _merged(result, name)
    if not loads:
        return None
    columns = min(len(loads), 3)
    rows = -(-len(loads) // columns)
    figure = Figure((3.4 * columns, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(_literal(f"{result['label']}: {TITLES[name]}"), fontsize=11)
    for axes, (load, merged) in zip(figure.subplots(rows, columns, squeeze=False).flat, loads.items(), strict=False):
        values, counts = recorded(merged)
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
    """Draw the duration by percentile, with a line for each load."""
    loads = _merged(result, name)
    if not loads:
        return None
    figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_literal(f"{result['label']}: {TITLES[name]} by percentile"), fontsize=10)
    axes.grid(alpha=0.3)
    for load, merged in loads.items():
        durations, counts = recorded(merged)
        total, longer = counts.sum(), counts[::-1].cumsum()[::-1]  # how many last at least as long
        axes.step([*total / longer, max(total, 2)], [*durations, durations[-1]], where="post", label=load)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * (1 - 1 / x):.6g}" if x > 0 else "")
    _plain_numbers(axes.yaxis)
    axes.set(xlabel="percentile", ylabel="ms")
    axes.legend(fontsize=8)
    return figure


def against_load(results: Sequence[Result], stream: bool) -> Figure | None:
    """Draw tokens/s and p99 latency against the number of clients or the rate, with a line for each result."""
    drawn = [(result["label"], points) for result in results if (points := _by_load(result, stream))]
    if not drawn:
        return None
    figure = Figure((WIDTH_IN * 1.4, HEIGHT_IN), layout="constrained")
    left, right = figure.subplots(1, 2)
    is_open = any(run["load"]["rate_per_s"] for result in results for run in result["runs"])
    for axes, title, path in (
        (left, "output tokens/s", ("tokens_per_s",)),
        (right, "p99 end-to-end latency, ms", ("latency_ms", "p99")),
    ):
        for label, points in drawn:
            values = [[figure_of(run, *path) for run in points[n]] for n in sorted(points)]
            middle = np.array([np.median(repeats) for repeats in values])
            below = middle - [min(repeats) for repeats in values]
            above = [max(repeats) for repeats in values] - middle
            axes.errorbar(sorted(points), middle, [below, above], marker="o", capsize=2, label=_literal(label))
        axes.set(xlabel="requests/s offered" if is_open else "clients", title=title)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    _plain_numbers(right.yaxis)
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    kind = "streams" if stream else "unary"
    figure.suptitle(f"{kind}; medians, bars from the least to the greatest of repeated runs", fontsize=10)
    return figure


def _merged(result: Result, name: str) -> dict[str, Any]:
    """Return a histogram for each load, of all its repeats."""
    loads: dict[str, Any] = {}
    for run in result["runs"]:
        if text := run["histograms"].get(name):
            load = load_name(run) + (", stream" if run["load"]["stream"] else "")
            if load in loads:
                loads[load].add(HdrHistogram.decode(text))
            else:
                loads[load] = HdrHistogram.decode(text)
    return loads


def _by_load(result: Result, stream: bool) -> dict[float, list[Run]]:
    points: dict[float, list[Run]] = defaultdict(list)
    for run in result["runs"]:
        if run["load"]["stream"] == stream and run["latency_ms"]:
            points[run["load"]["concurrency"] or run["load"]["rate_per_s"]].append(run)
    return points


def _literal(text: str) -> str:
    """Escape dollar signs, so that Matplotlib does not read a formula between them."""
    return text.replace("$", r"\$")


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, ..."""
    axis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
