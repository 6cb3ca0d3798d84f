"""Measure steps with and without AMX tiles, in alternating rounds of one process.

    python -m loadtest.bench.tiles --out docs/results/tiles.json

Both forms run the same compiled code. Only the fewest tokens for which a matmul uses tiles differ. The times are CPU
seconds of the thread, as in `tinylm bench`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional
from unittest.mock import patch

import typer
from rich.table import Table

from loadtest.options import integers
from tinylm import bench
from tinylm.kernels.numba import amx
from tinylm.llm import load
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

MODEL = Path("models/stories-8m")
FORMS = {"vectors": amx.NEVER, "tiles": amx.FEWEST_TOKENS}  # the fewest tokens of a matmul with tiles


def measure(batches: list[int], prompts: list[int], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each case in each form and round: {case: {form: [...]}}.

    A case is a decode step with that many sequences, or the step of a prompt. Raise RuntimeError without AMX.
    """
    if not amx.permitted():
        raise RuntimeError("this CPU has no AMX tiles, or Linux refuses them: there is nothing to compare")
    _, model = load(MODEL, "numba", "int8")
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for form, fewest in FORMS.items():
            with patch.object(amx, "FEWEST_TOKENS", fewest):
                report = bench.run(model, batches, prompts)
            found = {f"decode {row.batch}": row.step_ms for row in report.decode}
            found |= {f"prompt of {row.prompt_tokens}": row.first_token_ms for row in report.prefill}
            for case, ms in found.items():
                times.setdefault(case, {}).setdefault(form, []).append(ms)
    return times


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return each case's median times, and the median of the rounds' ratios."""
    rows = {}
    for case, forms in times.items():
        ratio = median(vectors / tiles for vectors, tiles in zip(*forms.values(), strict=True))
        rows[case] = {**{f"{form}_ms": round(median(ms), 4) for form, ms in forms.items()}, "ratio": round(ratio, 3)}
    return rows


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = "1,4,8,16,32",
    prompts: Annotated[str, typer.Option(metavar="N,N,...", help="Prompt lengths.")] = "16,64,192",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each form.")] = 5,
) -> None:
    """Measure steps with and without AMX tiles."""
    with one_line_errors(ValueError, RuntimeError):
        sizes, lengths = integers("--batches", batches), integers("--prompts", prompts)
        if out:
            check_file(out)
        times = measure(sizes, lengths, rounds)
    table = Table("step", *(f"{form}, ms" for form in FORMS), "ratio")
    for case, row in summary(times).items():
        table.add_row(case, *(f"{value:.3f}" for value in row.values()))
    PlainConsole().print(table)
    if out:
        command = "python -m loadtest.bench.tiles --out docs/results/tiles.json"
        facts = {**describe(), "command": command, "load_average": round(os.getloadavg()[0], 1)}  # 0: an idle machine
        write_file(out, json.dumps({**facts, "cases": summary(times), "rounds_ms": times}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
