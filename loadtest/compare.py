"""What changed between two results, and whether by more than repeated runs of one service differ among themselves.

Each run is one observation, whatever the number of its requests: requests of a run share its luck. For every load that
both results have, the means of each figure's logarithm are compared by Welch's t-test, which gives the ratio a 95 %
confidence interval; p-values are corrected for the number of comparisons by Holm's method.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.result import point

LEVEL = 0.05
# A figure's place in a run, and whether more of it is better.
FIGURES = {
    "requests/s": (("requests_per_s",), True),
    "tokens/s": (("tokens_per_s",), True),
    "latency p50": (("latency_ms", "p50"), False),
    "latency p99": (("latency_ms", "p99"), False),
    "ttft p50": (("ttft_ms", "p50"), False),
    "ttft p99": (("ttft_ms", "p99"), False),
    "itl p50": (("itl_ms", "p50"), False),
    "itl p99": (("itl_ms", "p99"), False),
    "server cores": (("server", "cores"), False),
}


@dataclass(frozen=True)
class Change:
    """One figure at one load. ratio: of the (geometric) means, B to A; verdict: better, worse, "no difference seen"
    or "can't tell" (fewer than two runs on a side)."""

    point: str
    figure: str
    before: float
    after: float
    n_before: int
    n_after: int
    ratio: float
    ratio_low: float | None  # of the 95 % confidence interval, before the correction
    ratio_high: float | None
    p_value: float | None  # corrected
    verdict: str


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Raises ValueError when the results have no load in common."""
    a, b = _by_point(before), _by_point(after)
    common = [name for name in a if name in b]
    if not common:
        raise ValueError(f"the results have no load in common: {', '.join(a)} and {', '.join(b)}")
    changes = []
    for name in common:
        for figure, (path, _) in FIGURES.items():
            old, new = _values(a[name], path), _values(b[name], path)
            if len(old) and len(new):
                changes.append(_change(name, figure, old, new))
    return _judged(changes)


def _by_point(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    points: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in result["runs"]:
        points[point(run)].append(run)
    return points


def _values(runs: Sequence[Mapping[str, Any]], path: Sequence[str]) -> np.ndarray:
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = (value or {}).get(key)
        if value:  # neither missing nor 0, of which there is no logarithm
            values.append(value)
    return np.array(values, np.float64)


def _change(name: str, figure: str, old: np.ndarray, new: np.ndarray) -> Change:
    from scipy import stats

    log_old, log_new = np.log(old), np.log(new)
    ratio = math.exp(log_new.mean() - log_old.mean())
    low = high = p_value = None
    if len(old) > 1 and len(new) > 1:
        if log_old.std() + log_new.std() == 0:  # the test divides by it
            low = high = ratio
            p_value = 1.0 if ratio == 1 else 0.0
        else:
            test = stats.ttest_ind(log_new, log_old, equal_var=False)
            low, high = (math.exp(limit) for limit in test.confidence_interval(1 - LEVEL))
            p_value = float(test.pvalue)
    means = math.exp(log_old.mean()), math.exp(log_new.mean())
    return Change(name, figure, *means, len(old), len(new), ratio, low, high, p_value, "can't tell")


def _judged(changes: list[Change]) -> list[Change]:
    """With Holm's correction over all figures that have a p-value, and the verdict that follows."""
    tested = sorted((change.p_value, i) for i, change in enumerate(changes) if change.p_value is not None)
    judged, highest = list(changes), 0.0
    for rank, (p_value, i) in enumerate(tested):
        highest = max(highest, min(1.0, p_value * (len(tested) - rank)))
        change = changes[i]
        verdict = "no difference seen"
        if highest < LEVEL:
            verdict = "better" if (change.ratio > 1) == FIGURES[change.figure][1] else "worse"
        judged[i] = replace(change, p_value=highest, verdict=verdict)
    return judged


def show(changes: Sequence[Change], before: str, after: str, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{before} -> {after}", title_justify="left")
    for number, column in enumerate(("load", "figure", "before", "after", "change", "95 % interval", "verdict")):
        table.add_column(column, justify="right" if 1 < number < 6 else "left", no_wrap=number != 0)
    colours = {"better": "green", "worse": "red"}
    last = ""
    for change in changes:
        interval = "-"
        if change.ratio_low is not None and change.ratio_high is not None:
            interval = f"{change.ratio_low - 1:+.1%} to {change.ratio_high - 1:+.1%}"
        colour = colours.get(change.verdict, "default")
        figures = (f"{change.before:.4g}", f"{change.after:.4g}", f"{change.ratio - 1:+.1%}", interval)
        name = change.point if change.point != last else ""
        table.add_row(name, change.figure, *figures, Text(change.verdict, style=colour))
        last = change.point
    console.print(table)
    if any(change.verdict == "can't tell" for change in changes):
        console.print("can't tell: one run says nothing of the noise; measure both with --repeat 5 or so")
    elif min(min(change.n_before, change.n_after) for change in changes) < 4:
        console.print("fewer than four runs on a side: only large differences can be told from noise")
