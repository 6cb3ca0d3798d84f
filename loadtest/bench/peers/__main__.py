"""Compare TinyLM's engine with other engines: the same model shape on one core.

    python -m loadtest.bench.peers [--rounds 5] [--only tinylm,llama.cpp] [--out FILE.json] [--plot FILE.png]

Every engine decodes at temperature 0.8 and top_p 0.95, and the CPU time of all its threads counts, sampling included.
Each case runs with the settings that are fastest for it. Rounds alternate between engines, so that a slow moment of the
machine affects all of them. Three things differ: llama.cpp computes relu(x)^2 where the others compute GELU, only
TinyLM and llama.cpp keep track of sequences that begin and end, and CTranslate2's sequences share a prompt.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from matplotlib.figure import Figure
from rich.table import Table

from loadtest.bench.peers.comparison import OURS, PEERS, Comparison, rates_of
from loadtest.bench.peers.model import save_random_model
from loadtest.bench.peers.runner import PREFILL_TOKENS, Case
from loadtest.options import integers, names_that_begin, require_at_least
from loadtest.results.plots import check_picture
from tinylm.config import ModelConfig
from tinylm.system.files import as_png, check_file, write_file
from tinylm.system.machine import allowed_cores, describe
from tinylm.terminal.output import PlainConsole, one_line_errors

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
BATCHES = "1,2,4,8,16,32"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of measurements.")] = 5,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = BATCHES,
    only: Annotated[
        Optional[str],
        typer.Option(metavar="NAME,...", help=f"Beginnings of names of {', '.join(PEERS)}."),
    ] = None,
    core: Annotated[Optional[int], typer.Option(help="The core to use. Default: the last.")] = None,
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the result of all rounds.")] = None,
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE.png", help="Draw it. Default: beside --out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of a table.")] = False,
) -> None:
    """Compare TinyLM's engine with other engines: the same model shape on one core."""
    with one_line_errors(ValueError, RuntimeError):
        require_at_least(1, rounds=rounds)
        sizes = sorted(set(integers("--batches", batches)))
        if not 1 <= sizes[0] <= sizes[-1] <= 64:
            raise ValueError(f"--batches is {batches!r}: each must be between 1 and 64")
        cores = allowed_cores()
        chosen_core = cores[-1] if core is None else core
        if chosen_core not in cores:
            raise ValueError(f"--core is {core}: it must be one of {cores}")
        names = names_that_begin("--only", only, PEERS)
        plot = _checked_plot(out, plot)
        result = {
            "command": "python -m loadtest.bench.peers " + " ".join(sys.argv[1:]),
            **describe(),
            "core": chosen_core,
            "rounds": rounds,
            **_measure(names, [*(Case("decode", size) for size in sizes), Case("prefill", 1)], rounds, chosen_core),
        }
        text = json.dumps(result, indent=2)
        if out:
            write_file(out, text + "\n")
        if plot:
            save_plot(plot, result, sizes)
        if as_json:
            typer.echo(text)
        else:
            PlainConsole().print(make_table(result))


def _checked_plot(out: Path | None, plot: Path | None) -> Path | None:
    """Return where to draw the picture. Raises ValueError or OSError if a file cannot be written or would be lost."""
    if out:
        check_file(out)
    if plot:
        check_file(plot)
    elif out:
        plot = out.with_suffix(".png")
        check_picture(plot)
    if plot and plot.suffix != ".png":
        raise ValueError(f"--plot is {plot}: the name must end in .png")
    if out and plot and os.path.realpath(out) == os.path.realpath(plot):
        raise ValueError(f"--out and --plot are both {out}: choose two names")
    return plot


def _measure(names: list[str], cases: list[Case], rounds: int, core: int) -> dict[str, Any]:
    """Run the comparison on a random model. Raises RuntimeError if no peer works."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # for the processes of the peers
    with tempfile.TemporaryDirectory(prefix="tinylm-peers.") as temporary:
        directory = Path(temporary) / "model"
        save_random_model(directory, ModelConfig())
        entries = {name: PEERS[name] for name in names}
        comparison = Comparison(entries, directory, core, PlainConsole(stderr=True))
        try:
            found = comparison.run(cases, rounds)
        finally:
            comparison.close()
    if not found["peers"]:
        raise RuntimeError("no peer is left to measure")
    return found


def make_table(result: Mapping[str, Any]) -> Table:
    cases, rates = result["cases"], rates_of(result["peers"])
    best = {case: max(rate[case] for rate in rates.values()) for case in cases}
    title = f"tokens per CPU second on one core, and their share of the best; median of {result['rounds']} rounds"
    table = Table(title=title)
    table.add_column("peer", no_wrap=True)
    for case in cases:
        table.add_column(case, justify="right")
    for name, rate in rates.items():
        table.add_row(name, *(f"{rate[case]:.0f}\n{rate[case] / best[case]:.2f}" for case in cases))
    table.add_section()
    for label, values in result["ratios"].items():
        table.add_row(label, *(f"{values[case]:.2f}" for case in cases))
    return table


def save_plot(path: Path, result: Mapping[str, Any], batches: Sequence[int]) -> None:
    """Draw decoding against batch size, and the time of a prefill, for each peer."""
    rates = rates_of(result["peers"])
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


if __name__ == "__main__":
    typer.run(main)
