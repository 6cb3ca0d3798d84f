"""From measurements to figures: medians over rounds, ratios, the table and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from loadtest.bench.peers.peer import PREFILL_TOKENS, Case
from loadtest.bench.peers.worker import Measurement
from tinylm.system.files import as_png, write_file

OURS, LLAMA = "tinylm", "llama.cpp"
Rates = Mapping[str, Mapping[str, float]]  # tokens per CPU second by peer and case


def summarize(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """Return the rounds, and the medians of tokens_per_cpu_s and of cpu_ms, that of a step or of a prompt."""
    return {
        "tokens_per_cpu_s": round(median(m.tokens_per_cpu_s for m in rounds), 1),
        "cpu_ms": round(median(m.cpu_s / m.calls for m in rounds) * 1000, 4),
        "rounds": [{**asdict(m), "tokens_per_cpu_s": round(m.tokens_per_cpu_s, 1)} for m in rounds],
    }


def rates_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {case: peer["cases"][case]["tokens_per_cpu_s"] for case in result["cases"]}
        for name, peer in result["peers"].items()
    }


def ratios(rates: Rates, cases: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the rate of TinyLM over the best rate of the others, and over the best of llama.cpp, by case."""
    found: dict[str, dict[str, float]] = {}
    for label, prefix in ((f"{OURS} / best of the others", ""), (f"{OURS} / best of {LLAMA}", LLAMA)):
        others = [name for name in rates if name.startswith(prefix) and not name.startswith(OURS)]
        if OURS in rates and others:
            found[label] = {c: round(rates[OURS][c] / max(rates[name][c] for name in others), 2) for c in cases}
    return found


def make_table(result: Mapping[str, Any]) -> Table:
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


def save_plot(path: Path, result: Mapping[str, Any], batches: Sequence[int]) -> None:
    """Draw decoding against batch size, a line a peer, and the time of a prefill, a bar a peer."""
    rates = rates_of(result)
    figure = Figure((13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, rate in rates.items():
        decode = [rate[Case("decode", batch).label] for batch in batches]
        left.plot(batches, decode, marker="o", linewidth=2.5 if name == OURS else 1.4, label=name)
    left.set(xscale="log", yscale="log", xlabel="sequences in the batch", title="decode: tokens per CPU second")
    left.set_xticks(batches, [str(batch) for batch in batches])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.set_ylim(top=3 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=8, loc="upper left", ncols=3)
    times = [result["peers"][name]["cases"][Case("prefill", 1).label]["cpu_ms"] for name in rates]
    bars = right.barh(list(rates), times, color=[f"C{i}" for i in range(len(rates))])
    right.bar_label(bars, [f"{t:.1f}" for t in times], padding=3)
    right.invert_yaxis()
    right.set(title=f"prefill of {PREFILL_TOKENS} tokens: CPU milliseconds")
    right.margins(x=0.12)
    figure.suptitle(f"{result['machine']['processor']}, one core, {result['date'][:10]}", fontsize=10)
    write_file(path, as_png(figure, dpi=150))
