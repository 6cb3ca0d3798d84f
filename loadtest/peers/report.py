"""From measurements to figures: medians over rounds, ratios, the table and the picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtest.peers.peer import PREFILL_TOKENS, Case
from loadtest.peers.worker import Measurement
from tinylm.files import as_png, write_file

OURS, LLAMA = "tinylm", "llama.cpp"


def summarize(rounds: list[Measurement]) -> dict[str, Any]:
    """tokens_per_cpu_s and cpu_ms (of a step of the whole batch, or of a prompt) are medians over the rounds."""
    return {
        "tokens_per_cpu_s": round(median(m.tokens_per_cpu_s for m in rounds), 1),
        "cpu_ms": round(median(m.cpu_s / m.calls for m in rounds) * 1000, 4),
        "rounds": [{**asdict(m), "tokens_per_cpu_s": round(m.tokens_per_cpu_s, 1)} for m in rounds],
    }


def ratios(rates: dict[str, dict[str, float]], cases: list[str]) -> dict[str, dict[str, float]]:
    """rates: tokens per CPU second by peer and case -> what TinyLM makes of each case, over the best of the others."""
    found: dict[str, dict[str, float]] = {}
    for label, begins in ((f"{OURS} / best of the others", ""), (f"{OURS} / {LLAMA}", LLAMA)):
        others = [name for name in rates if name.startswith(begins) and not name.startswith(OURS)]
        if OURS in rates and others:
            found[label] = {c: round(rates[OURS][c] / max(rates[name][c] for name in others), 2) for c in cases}
    return found


def make_table(result: dict[str, Any]) -> Table:
    cases = result["cases"]
    rates = rates_of(result)
    best = {case: max(rate[case] for rate in rates.values()) for case in cases}
    title = f"tokens per CPU second on one core, and their share of the best; median of {result['rounds']} rounds"
    table = Table(title=title)
    table.add_column("peer", no_wrap=True)
    for case in cases:
        table.add_column(case, justify="right")
    for i, (name, rate) in enumerate(rates.items(), 1):
        cells = [f"{rate[case]:.0f}\n{rate[case] / best[case]:.2f}" for case in cases]
        table.add_row(name, *cells, end_section=i == len(rates))
    for label, values in result["ratios"].items():
        table.add_row(label, *(f"{values[case]:.2f}" for case in cases))
    return table


def rates_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Tokens per CPU second by peer and case."""
    return {
        name: {case: peer["cases"][case]["tokens_per_cpu_s"] for case in result["cases"]}
        for name, peer in result["peers"].items()
    }


def save_plot(path: Path, result: dict[str, Any], batches: list[int]) -> None:
    """Decode against batch size, a line a peer, and the time of a prefill, a bar a peer."""
    import matplotlib  # for this alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = rates_of(result)
    names = list(rates)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=[3, 2], layout="constrained")
    for name in names:
        decode = [rates[name][Case("decode", batch).label] for batch in batches]
        width = 2.5 if name == OURS else 1.4
        left.plot(batches, decode, marker="o", linewidth=width, color=colors[name], label=name)
    left.set(xscale="log", yscale="log", xlabel="sequences in the batch", title="decode: tokens per CPU second")
    left.set_xticks(batches, [str(batch) for batch in batches])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.set_ylim(top=3 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=8, loc="upper left", ncols=3)
    times = [result["peers"][name]["cases"][Case("prefill", 1).label]["cpu_ms"] for name in names]
    bars = right.barh(names, times, color=[colors[name] for name in names])
    right.bar_label(bars, [f"{t:.1f}" for t in times], padding=3)
    right.invert_yaxis()
    right.set(title=f"prefill of {PREFILL_TOKENS} tokens: CPU milliseconds")
    right.margins(x=0.12)
    figure.suptitle(f"{result['machine']['processor']}, one core, {result['date'][:10]}", fontsize=10)
    write_file(path, as_png(figure, 150))
    pyplot.close(figure)
