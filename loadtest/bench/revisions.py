"""Compare the engine's steps and texts with those of another revision, for each form of the compiled kernels.

    python -m loadtest.bench.revisions 267bb1e --out docs/results/leaner-step.json

The other revision gets a git worktree. Each round starts a new process of each revision, because the place of a
process's memory changes its times. The order is old, new, new, old. Both use this revision's model. The times are CPU
seconds of the thread, as in `tinylm bench`. The texts are sampled with the same seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Optional

import typer
from rich.table import Table

from loadtest.options import integers
from tinylm.kernels.numba import emitter
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

# The forms of the kernels, and the beginnings of the names of the CPU features that each does without.
FORMS = {"avx512-vnni+amx": (), "avx512-vnni": ("amx",), "avx2": ("amx", "avx512", "avx10", "avxvnni")}
TEXTS_PER_SEED = 50
MODEL = Path(__file__).resolve().parents[2] / "models" / "stories-8m"  # of both revisions
# A process of one revision. It reads a line of JSON with what to measure, and answers with a line. Both revisions have
# these functions.
WORKER = f"""
import json, sys
from dataclasses import asdict
from tinylm import LLM, SamplingParams, bench
llm = LLM(sys.argv[1], kernels="numba", precision="int8")
c = llm.config
layers = c.n_layers * c.hidden_size * (4 * c.hidden_size + 2 * c.mlp_size)
print(json.dumps([llm.model.arithmetic, layers, c.hidden_size * c.vocab_size]), flush=True)
words = ["Once", "The old fox said: ", "Lily and Ben played", "One day, a little bird", "In the garden, "]
for line in sys.stdin:
    task = json.loads(line)
    if "texts" in task:
        answer = []
        for seed in range(0, task["texts"], {TEXTS_PER_SEED}):
            n = min({TEXTS_PER_SEED}, task["texts"] - seed)
            prompts = [words[(seed + i) % 5] + " and then" * (i * i % 37) for i in range(n)]
            params = SamplingParams(max_tokens=64, temperature=0.5 + seed % 8 / 8, top_p=1 - seed % 3 / 20, seed=seed)
            answer += [completion.text for completion in llm.generate(prompts, params)]
    else:
        answer = asdict(bench.run(llm.model, task["batches"], task["prompts"]))
    print(json.dumps(answer), flush=True)
"""


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check a revision out into a temporary directory. Raise RuntimeError if git refuses."""
    with TemporaryDirectory() as directory:
        tree = Path(directory) / "revision"
        added = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), revision], capture_output=True, text=True, check=False
        )
        if added.returncode:
            raise RuntimeError(f"git has no worktree of {revision}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def environment(without: tuple[str, ...]) -> dict[str, str]:
    """Return the environment of a process that does without CPU features whose names begin so, a value of FORMS."""
    if not without:
        return dict(os.environ)
    features = sorted(name for name in emitter.cpu_features() if not name.startswith(without))
    return {**os.environ, "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features)}


class Worker:
    """A process that measures one revision with one form of the kernels."""

    def __init__(self, tree: Path, without: tuple[str, ...]) -> None:
        """without: the instructions that the processor is treated as lacking, a value of FORMS."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(MODEL)],
            cwd=tree,
            env={**environment(without), "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # The multiply-adds of a token's matmuls in all layers, and those of its logits.
        self.arithmetic, self.of_layers, self.of_logits = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends the process

    def ask(self, **task: Any) -> Any:
        """Return the worker's answer to a task."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process ended before it answered: see its messages above")
        return json.loads(line)


def compare(
    trees: Mapping[str, Path], form: str, batches: list[int], prompts: list[int], rounds: int, texts: int
) -> dict[str, Any] | None:
    """Return the times of each case and round, the new revision's shares of the core's limits, and equal texts.

    trees: "old" and "new" -> the directory of that revision. Return None if this CPU does not have the form. The old
    revision may lack it, and then uses the best that it has.
    """
    cases: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name in sorted(trees, reverse=number % 2 == 0):
            with Worker(trees[name], FORMS[form]) as worker:
                if name == "new" and form not in worker.arithmetic.replace("numba, ", "").split(", "):
                    return None
                report = worker.ask(batches=batches, prompts=prompts)
            for case, figures in _figures(worker, report).items():
                lists = cases.setdefault(case, defaultdict(list))
                lists[name].append(figures.pop("step_ms"))
                if name == "new":
                    for key, share in figures.items():
                        lists[key].append(share)
    answers = []
    for tree in trees.values():
        with Worker(tree, FORMS[form]) as worker:
            answers.append(worker.ask(texts=texts))
    return {"cases": cases, "texts": texts, "equal_texts": sum(a == b for a, b in zip(*answers, strict=True))}


def _figures(worker: Worker, report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return by case the time of a step in ms, and its shares of the core's limits."""
    figures = {}
    for row in report["decode"]:
        shares = {"of_bandwidth": row["share_of_bandwidth"], "of_peak": row["share_of_peak"]}
        figures[f"decode {row['batch']}"] = {"step_ms": row["step_ms"], **shares}
    for row in report["prefill"]:
        multiply_adds = row["prompt_tokens"] * worker.of_layers + worker.of_logits
        of_peak = multiply_adds / row["first_token_ms"] / report["peak_gmac_per_s"] / 1e6
        figures[f"prompt of {row['prompt_tokens']}"] = {"step_ms": row["first_token_ms"], "of_peak": of_peak}
    return figures


def summary(cases: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return each case's median times, the median of the rounds' ratios, and the median shares of the limits."""
    rows = {}
    for name, case in cases.items():
        ratio = median(old / new for old, new in zip(case["old"], case["new"], strict=True))
        row = {"old_ms": median(case["old"]), "new_ms": median(case["new"]), "ratio": ratio}
        row |= {key: median(case[key]) for key in ("of_bandwidth", "of_peak") if key in case}
        rows[name] = {key: round(value, 4) for key, value in row.items()}
    return rows


def main(
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="The other revision, as git names it.")],
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = "1,4,16,32",
    prompts: Annotated[str, typer.Option(metavar="N,N,...", help="Prompt lengths.")] = "64,192",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each revision.")] = 5,
    texts: Annotated[int, typer.Option(min=1, help="Texts to compare.")] = 1000,
    forms: Annotated[str, typer.Option(metavar="FORM,...", help="Forms of the kernels.")] = ",".join(FORMS),
) -> None:
    """Compare the engine's steps and texts with those of another revision."""
    with one_line_errors(ValueError, RuntimeError):
        sizes, lengths = integers("--batches", batches), integers("--prompts", prompts)
        if unknown := set(forms.split(",")) - set(FORMS):
            raise ValueError(f"--forms has {', '.join(sorted(unknown))}: it must be some of {', '.join(FORMS)}")
        if out:
            check_file(out)
        results: dict[str, dict[str, Any]] = {}
        with worktree(revision) as tree:
            trees = {"old": tree, "new": Path.cwd()}
            for form in forms.split(","):
                if result := compare(trees, form, sizes, lengths, rounds, texts):
                    results[form] = result
                    _show(form, result)
    if out:
        command = f"python -m loadtest.bench.revisions {revision} --out docs/results/leaner-step.json"
        facts = {**describe(), "command": command, "other_revision": revision, "load_average": os.getloadavg()[0]}
        summaries = {form: {**result, "cases": summary(result["cases"])} for form, result in results.items()}
        rounds_ms = {form: result["cases"] for form, result in results.items()}
        write_file(out, json.dumps({**facts, "forms": summaries, "rounds_ms": rounds_ms}, indent=2) + "\n")


def _show(form: str, result: dict[str, Any]) -> None:
    table = Table("step", "old, ms", "new, ms", "ratio", "of bandwidth", "of peak", title=form)
    for case, row in summary(result["cases"]).items():
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("of_bandwidth", "of_peak")]
        table.add_row(case, f"{row['old_ms']:.3f}", f"{row['new_ms']:.3f}", f"{row['ratio']:.2f}", *shares)
    console = PlainConsole()
    console.print(table)
    console.print(f"{result['equal_texts']} of {result['texts']} texts are equal")


if __name__ == "__main__":
    typer.run(main)
