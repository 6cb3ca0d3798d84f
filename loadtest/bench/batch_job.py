"""Measure batch jobs: tokens per second with one process and with all cores, to compare with `tinylm bench`.

python -m loadtest.bench.batch_job --out docs/results/batch.json
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Optional

import typer

from loadtest.options import integers, require_at_least
from tinylm.batch import job, processes
from tinylm.batch.engine import EngineSettings
from tinylm.batch.lines import URL
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe, usable_cores
from tinylm.terminal.output import one_line_errors, say

MODEL = Path("models/stories-8m")
MAX_TOKENS = 64


def measure(n_requests: int, n_workers: int, model: Path) -> dict[str, Any]:
    """Run a job whose answers all have MAX_TOKENS tokens. Return what it did."""
    with TemporaryDirectory() as directory:
        source, target = Path(directory, "requests.jsonl"), Path(directory, "answers.jsonl")
        write_file(source, "".join(_line(number) + "\n" for number in range(n_requests)))
        answers = partial(processes.answers, settings=EngineSettings(model), n_workers=n_workers)
        done = job.run(source, target, answers, lambda progress: None)
    if done.n_failed:
        raise RuntimeError(f"{done.n_failed} of {n_requests} answers are errors")
    return {"workers": n_workers, **done.as_dict(), "answer_tokens_per_s": done.completion_tokens / done.seconds}


def _line(number: int) -> str:
    prompt = f"Once upon a time, there were {number} little dogs"
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": number}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": URL, "body": body})


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each job.")] = 2000,
    workers: Annotated[
        Optional[str], typer.Option(metavar="N,N,...", help="Numbers of processes; the default is 1 and one per core.")
    ] = None,
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model directory.")] = MODEL,
) -> None:
    """Measure batch jobs on an idle machine."""
    with one_line_errors(ValueError, RuntimeError):
        require_at_least(1, requests=requests)
        sizes = integers("--workers", workers or f"1,{usable_cores()}")
        if out:
            check_file(out)
        jobs = []
        for n_workers in sizes:
            jobs.append(measure(requests, n_workers, model))
            say(f"{n_workers} processes: {jobs[-1]['answer_tokens_per_s']:,.0f} tokens of answers per second")
        if out:
            facts = {**describe(), "command": "python -m loadtest.bench.batch_job", "max_tokens": MAX_TOKENS}
            write_file(out, json.dumps({**facts, "jobs": jobs}, indent=2) + "\n")


if __name__ == "__main__":  # the processes of a job import this module too
    typer.run(main)
