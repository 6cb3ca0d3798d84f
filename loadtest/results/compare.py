"""Compare two results: which figures changed, and which by more than repeated runs of one service differ.

Each run is one observation, because all requests of a run share its conditions.
For each load that both results have, Welch's t-test compares the mean logarithms of a figure. It gives a 95 %
confidence interval of the ratio. Holm's method corrects the p-values for the number of comparisons.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from scipy import stats

from loadtest.results.result_file import figure_of, point
from loadtest.results.table import make_table

LEVEL = 0.05
# Figure -> its place in a run, and whether a higher value is better.
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
    """One figure at one load. The means are geometric, and `ratio` is B to A.

    verdict: better, worse, "no difference seen", or "can't tell" if a side has fewer than two runs.
    """

    point: str
    figure: str
    before: float
    after: float
    n_before: int
    n_after: int
    ratio: float
    ratio_low: float | None  # of the 95 % confidence interval, without the correction
    ratio_high: float | None
    p_value: float | None  # corrected
    verdict: str


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return a change for each figure and each load. Raises ValueError if the results have no load in common."""
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
    """Return a figure of the runs that have it and in which it is not 0, which has no logarithm."""
    values = [figure_of(run, *path) for run in runs]
    return np.array([value for value in values if value], np.float64)


def _change(name: str, figure: str, old: np.ndarray, new: np.ndarray) -> Change:
    """Return a change without verdict and correction."""
    log_old, log_new = np.log(old), np.log(new)
    ratio = math.exp(log_new.mean() - log_old.mean())
    low = high = p_value = None
    if len(old) > 1 and len(new) > 1:
        if log_old.std() + log_new.std() == 0:  # the test would divide by it
            low = high = ratio
            p_value = 1.0 if ratio == 1 else 0.0
        else:
            test = stats.ttest_ind(log_new, log_old, equal_var=False)
            low, high = (math.exp(limit) for limit in test.confidence_interval(1 - LEVEL))
            p_value = float(test.pvalue)
    means = math.exp(log_old.mean()), math.exp(log_new.mean())
    return Change(name, figure, *means, len(old), len(new), ratio, low, high, p_value, "can't tell")


def _judged(changes: Sequence[Change]) -> list[Change]:
    """Correct the p-values by Holm's method, and add the verdicts."""
    tested = sorted((change.p_value, i) for i, change in enumerate(changes) if change.p_value is not None)
    judged, highest = list(changes), 0.0
    for rank, (p_value, i) in enumerate(tested):
        highest = max(highest, min(1.0, p_value * (len(tested) - rank)))
        change = changes[i]
        verdict = "no difference seen"
        if highest < LEVEL:
            _, more_is_better = FIGURES[change.figure]
            verdict = "better" if (change.ratio > 1) == more_is_better else "worse"
        judged[i] = replace(change, p_value=highest, verdict=verdict)
    return judged


def show(changes: Sequence[Change], before: str, after: str, console: Console) -> None:
    """Print the changes as a table. before, after: the names of the results."""
    columns = ("load", "figure", "before", "after", "change", "95 % interval", "verdict")
    table = make_table(f"{before} -> {after}", *columns)
    colours = {"better": "green", "worse": "red"}
    last = ""
    for change in changes:
        interval = "-"
        if change.ratio_low is not None and change.ratio_high is not None:
            interval = f"{change.ratio_low - 1:+.1%} to {change.ratio_high - 1:+.1%}"
        figures = (f"{change.before:.4g}", f"{change.after:.4g}", f"{change.ratio - 1:+.1%}", interval)
        name = change.point if change.point != last else ""
        verdict = Text(change.verdict, style=colours.get(change.verdict, "default"))
        table.add_row(name, change.figure, *figures, verdict)
        last = change.point
    console.print(table)
    if any(change.verdict == "can't tell" for change in changes):
        console.print("can't tell: a single run does not show the noise; measure both with --repeat 5 or more")
    elif min(min(change.n_before, change.n_after) for change in changes) < 4:
        console.print("fewer than four runs on a side: noise hides all but large differences")
