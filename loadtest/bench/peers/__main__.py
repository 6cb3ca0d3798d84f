"""Compare TinyLM's engine with llama.cpp, ONNX Runtime and PyTorch: the same model shape on one core.

    python -m loadtest.bench.peers [--rounds 5] [--only tinylm,llama.cpp] [--out FILE.json] [--plot FILE.png]

Every engine decodes at temperature 0.8 and top_p 0.95, and the CPU time of all its threads counts, sampling included.
Each case runs with the settings that are fastest for it. Rounds alternate between engines, so that a slow moment of the
machine affects all of them. Two things differ: llama.cpp computes relu(x)^2 where the others compute GELU, and only
TinyLM and llama.cpp keep track of sequences that begin and end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer

from loadtest.bench.peers.comparison import Comparison
from loadtest.bench.peers.figures import make_table, save_plot
from loadtest.bench.peers.model import save_random_model
from loadtest.bench.peers.peer import Case
from loadtest.bench.peers.worker import PEERS, Entry
from loadtest.options import integers, require_at_least
from loadtest.results.plots import check_picture
from tinylm.config import ModelConfig
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
BATCHES = "1,2,4,8,16,32"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of measurements.")] = 5,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = BATCHES,
    only: Annotated[
        Optional[str], typer.Option(metavar="NAME,...", help=f"Peers whose names begin so, of {', '.join(PEERS)}.")
    ] = None,
    core: Annotated[Optional[int], typer.Option(help="The core to use. Default: the last.")] = None,
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the result of all rounds.")] = None,
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE.png", help="Draw it. Default: beside --out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of a table.")] = False,
) -> None:
    """Compare TinyLM's engine with llama.cpp, ONNX Runtime and PyTorch: the same model shape on one core."""
    with one_line_errors(ValueError, RuntimeError):
        require_at_least(1, rounds=rounds)
        sizes = _batch_sizes(batches)
        chosen_core = _core(core)
        plot = _checked_plot(out, plot)
        about = {"command": "python -m loadtest.bench.peers " + " ".join(sys.argv[1:]), **describe()}
        cases = [*(Case("decode", size) for size in sizes), Case("prefill", 1)]
        found = _measured(_peers(only), cases, rounds, chosen_core)
        result = {**about, "core": chosen_core, "rounds": rounds, **found}
        text = json.dumps(result, indent=2)
        if out:
            write_file(out, text + "\n")
        if plot:
            save_plot(plot, result, sizes)
        if as_json:
            typer.echo(text)
        else:
            PlainConsole().print(make_table(result))


def _measured(peers: dict[str, Entry], cases: list[Case], rounds: int, core: int) -> dict[str, object]:
    """Run the comparison on a random model. Raises RuntimeError if no peer works."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # for the processes of the peers
    with tempfile.TemporaryDirectory(prefix="tinylm-peers.") as temporary:
        directory = Path(temporary) / "model"
        save_random_model(directory, ModelConfig())
        comparison = Comparison(peers, directory, core, PlainConsole(stderr=True))
        try:
            found = comparison.run(cases, rounds)
        finally:
            comparison.close()
    if not found["peers"]:
        raise RuntimeError("no peer is left to measure")
    return found


def _batch_sizes(text: str) -> list[int]:
    sizes = sorted(set(integers("--batches", text)))
    if not 1 <= sizes[0] <= sizes[-1] <= 64:
        raise ValueError(f"--batches is {text!r}: each must be between 1 and 64")
    return sizes


def _core(core: int | None) -> int:
    cores = sorted(os.sched_getaffinity(0))
    if core is not None and core not in cores:
        raise ValueError(f"--core is {core}: it must be one of {cores}")
    return cores[-1] if core is None else core


def _peers(only: str | None) -> dict[str, Entry]:
    prefixes = tuple(only.split(",")) if only else ("",)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in PEERS):
            raise ValueError(f"--only names {prefix!r}: the peers are {', '.join(PEERS)}")
    return {name: entry for name, entry in PEERS.items() if name.startswith(prefixes)}


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


if __name__ == "__main__":
    typer.run(main)
