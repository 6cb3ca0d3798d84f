"""TinyLM's engine against llama.cpp, ONNX Runtime and PyTorch: the same model shape on one core, sampling included.

    python -m loadtest.peers [--rounds 5] [--only tinylm,llama.cpp] [--out FILE.json] [--plot FILE.png]

Every engine decodes at temperature 0.8 and top_p 0.95 and is charged the CPU time of all its threads. Each runs with
the settings that prove fastest for a case; rounds are interleaved, so that the machine's moods fall on all alike.
What can't be made equal: llama.cpp computes relu(x)^2 where the others compute GELU, and TinyLM and llama.cpp carry the
bookkeeping of sequences that come and go, while the loops around ONNX Runtime and PyTorch need none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.peers import peer as work
from loadtest.peers.model import float32_tensors, reference_logits, save_random_model
from loadtest.peers.peer import Case
from loadtest.peers.report import make_table, rates_of, ratios, save_plot, summarize
from loadtest.peers.worker import PEERS, Entry, Measurement, PeerError, Worker
from loadtest.report import check_picture
from tinylm.config import ModelConfig
from tinylm.files import check_file, write_file
from tinylm.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
INSTALL = "pip install -e '.[peers]'"

console = PlainConsole(stderr=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="sequences decoded at once; default: %(default)s")
    parser.add_argument("--only", metavar="NAME,...", help=f"peers whose names begin so, of {', '.join(PEERS)}")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="default: the last")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result, with every round")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="default: beside --out")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: it must be at least 1")
    if arguments.core not in os.sched_getaffinity(0):
        parser.error(f"--core is {arguments.core}: it must be one of {sorted(os.sched_getaffinity(0))}")
    try:
        arguments.batches = sorted({int(batch) for batch in arguments.batches.split(",")})
    except ValueError:
        parser.error(f"--batches is {arguments.batches!r}: it must be whole numbers, separated by commas")
    if not 1 <= arguments.batches[0] <= arguments.batches[-1] <= 64:
        parser.error(f"--batches is {arguments.batches}: each must lie in 1..64")
    prefixes = tuple(arguments.only.split(",")) if arguments.only else ("",)
    arguments.peers = {name: entry for name, entry in PEERS.items() if name.startswith(prefixes)}
    if unknown := [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in PEERS)]:
        parser.error(f"--only names {unknown[0]!r}: the peers are {', '.join(PEERS)}")
    try:
        if arguments.out:
            check_file(arguments.out)
        if arguments.plot:
            check_file(arguments.plot)
        elif arguments.out:
            arguments.plot = arguments.out.with_suffix(".png")
            check_picture(arguments.plot)
    except OSError as error:
        parser.error(str(error))
    if arguments.plot and arguments.plot.suffix != ".png":
        parser.error(f"--plot is {arguments.plot}: the name must end in .png")
    if arguments.out and arguments.plot and os.path.realpath(arguments.out) == os.path.realpath(arguments.plot):
        parser.error(f"--out and --plot are both {arguments.out}: choose two names")
    return arguments


class Comparison:
    """The peers that work so far, and what has been measured of them; one that fails is left out from then on."""

    def __init__(self, entries: dict[str, Entry], directory: Path, core: int) -> None:
        self._entries, self._directory, self._core = entries, directory, core
        self.workers: dict[str, Worker] = {}
        self.checks: dict[str, dict[str, float]] = {}
        self.settings: dict[str, dict[Case, dict]] = {}
        self.measured: dict[str, dict[Case, list[Measurement]]] = {}
        self.left_out: dict[str, str] = {}  # why

    def start(self, name: str) -> None:
        """Start a peer's process and check its logits."""
        entry = self._entries[name]
        if missing := entry.missing():
            self._leave_out(name, f"no package {missing[0]}: {INSTALL}")
            return
        self._guard(name, lambda: self._check(name, entry))

    def _check(self, name: str, entry: Entry) -> None:
        worker = self.workers[name] = Worker(entry, self._directory, self._core)
        config, tensors = float32_tensors(self._directory)
        ids = np.random.default_rng(0).integers(config.boundary_id + 1, config.vocab_size, (2, 40))
        wanted = np.array([reference_logits(config, tensors, row, entry.activation) for row in ids])
        error, correlation = 0.0, 1.0
        for settings, logits in worker.check(ids[:, :32], ids[:, 32:]):
            error = max(error, float(np.abs(logits - wanted).max()))  # NaN fails below
            correlation = min(correlation, float(np.corrcoef(logits.ravel(), wanted.ravel())[0, 1]))
            if not (np.isfinite(logits).all() and error <= entry.greatest_error):
                raise PeerError(f"with {settings} its logits are off by {error:.2g}")
            if correlation < entry.least_correlation:
                raise PeerError(f"with {settings} its logits correlate with the reference by {correlation:.3f} only")
        self.checks[name] = {"greatest_error": round(error, 6), "least_correlation": round(correlation, 6)}

    def tune(self, name: str, case: Case) -> None:
        if name in self.workers:
            settings = self.settings.setdefault(name, {})
            self._guard(name, lambda: settings.update({case: self.workers[name].tune(case)}))

    def measure(self, name: str, case: Case) -> None:
        if name in self.workers:
            rounds = self.measured.setdefault(name, {}).setdefault(case, [])
            self._guard(name, lambda: rounds.append(self.workers[name].measure(case)))

    def _guard(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except PeerError as error:
            self.workers.pop(name, None)
            self._leave_out(name, str(error))

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        console.print(f"{name} is left out: {why}", style="yellow")


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Check, tune and measure behind a progress bar; the result with the machine and the command that gave it."""
    cases = [*(Case("decode", batch) for batch in arguments.batches), Case("prefill", 1)]
    names = list(arguments.peers)
    comparison = Comparison(arguments.peers, directory, arguments.core)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(names) * (1 + len(cases) * (1 + arguments.rounds)))

        def advance(text: str, act: Callable[..., None], *what: Any) -> None:
            bar.update(task, description=text)
            act(*what)
            bar.advance(task)

        for name in names:
            advance(f"start {name}", comparison.start, name)
        for name in names:
            for case in cases:
                advance(f"tune {name}, {case.label}", comparison.tune, name, case)
        for i in range(1, arguments.rounds + 1):
            for name in names:
                for case in cases:
                    advance(f"round {i}: {name}, {case.label}", comparison.measure, name, case)
    result = {
        "command": "python -m loadtest.peers " + " ".join(sys.argv[1:]),
        **describe(),
        "core": arguments.core,
        "rounds": arguments.rounds,
        "work": {
            "model": f"{ModelConfig().n_parameters} random weights",
            "temperature": work.TEMPERATURE,
            "top_p": work.TOP_P,
            "prompt_tokens": work.PROMPT_TOKENS,
            "decode_steps": work.DECODE_STEPS,
            "prefill_tokens": work.PREFILL_TOKENS,
        },
        "cases": [case.label for case in cases],
        "left_out": comparison.left_out,
        "peers": {
            name: {
                "version": worker.version,
                "check": comparison.checks[name],
                "cases": {
                    case.label: {"settings": comparison.settings[name][case], **summarize(rounds)}
                    for case, rounds in comparison.measured[name].items()
                },
            }
            for name, worker in comparison.workers.items()
        },
    }
    result["ratios"] = ratios(rates_of(result), result["cases"])
    for worker in comparison.workers.values():
        worker.close()
    return result


def main() -> None:
    with one_line_errors():
        run(parse())


def run(arguments: argparse.Namespace) -> None:
    """Compare the peers, and write and print the result."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # for the peers' processes
    with tempfile.TemporaryDirectory(prefix="tinylm-peers.") as temporary:
        directory = Path(temporary) / "model"
        save_random_model(directory, ModelConfig())
        result = compare(arguments, directory)
    if not result["peers"]:
        sys.exit("error: no peer is left to measure")
    text = json.dumps(result, indent=2)
    if arguments.out:
        write_file(arguments.out, text + "\n")
    if arguments.plot:
        save_plot(arguments.plot, result, arguments.batches)
    if arguments.json:
        print(text)
    else:
        PlainConsole().print(make_table(result))


if __name__ == "__main__":
    main()
