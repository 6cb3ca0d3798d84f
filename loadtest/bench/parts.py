"""Measure where the time of a decode step goes.

    python -m loadtest.bench.parts --out docs/results/parts.json

Each part of the compiled step runs alone, in all layers, on the arrays of a real batch: the same work in the same order
on the same memory as within a step. The result also says how much of the whole step is in no part, and how long the two
largest parts take at least. Each form of the kernels runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple, Optional
from unittest.mock import patch

import numpy as np
import typer
from rich.table import Table

from loadtest.bench.revisions import FORMS, environment
from loadtest.options import integers
from tinylm.bench import matmul_multiply_adds, measure_bandwidth
from tinylm.engine import Engine
from tinylm.kernels.batch import Batch
from tinylm.kernels.numba import ops, simd, steps
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.jit import compiled
from tinylm.kernels.numba.layout import Int8Cache, Scratch, Shape, Weights, aligned_zeros
from tinylm.kernels.numba.sampling import choose_tokens
from tinylm.llm import load
from tinylm.model import Model, ModelRunner
from tinylm.sampling import SamplingParams
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

MODEL = Path("models/stories-8m")
LENGTH = 64  # tokens that each sequence has cached
REPEATS = 20  # of a part within one call, so that the call itself costs nothing
ROUNDS = 15


class Step(NamedTuple):
    """What a compiled part works on."""

    n: int  # sequences
    shape: Shape
    weights: Weights
    cache: Int8Cache
    scratch: Scratch
    batch: Batch
    room: np.ndarray  # for the output of GELU: repeated in place, its values would reach 0


@compiled
def _matmuls(step: Step) -> None:
    n, shape, weights, scratch = step.n, step.shape, step.weights, step.scratch
    hidden, mlp, normed, wide = shape.hidden, shape.mlp, scratch.normed, scratch.wide
    at = row = 0
    for _ in range(shape.layers):
        at, row = ops.multiply(n, hidden, weights, at, row, 3 * hidden, wide, False, scratch)
        at, row = ops.multiply(n, hidden, weights, at, row, hidden, normed, False, scratch)
        at, row = ops.multiply(n, hidden, weights, at, row, mlp, wide, False, scratch)
        at, row = ops.multiply(n, mlp, weights, at, row, hidden, normed, False, scratch)
    ops.multiply(n, hidden, weights, at, row, shape.vocab, step.batch.logits, False, scratch)


@compiled
def _rounding(step: Step) -> None:
    n, shape, scratch = step.n, step.shape, step.scratch
    for _ in range(shape.layers):
        for _ in range(3):
            ops.round_rows(scratch.normed, n, shape.hidden, scratch)
        ops.round_rows(scratch.wide, n, shape.mlp, scratch)
    ops.round_rows(scratch.normed, n, shape.hidden, scratch)


@compiled
def _attention(step: Step) -> None:
    n, shape, cache, scratch, batch = step.n, step.shape, step.cache, step.scratch, step.batch
    for layer in range(shape.layers):
        at = layer * cache.slots
        ops.attend_int8(scratch.wide, n, batch.slots, batch.positions, shape, cache, at, scratch, scratch.normed)


@compiled
def _storing(step: Step) -> None:
    n, shape, weights, cache, batch, wide = step.n, step.shape, step.weights, step.cache, step.batch, step.scratch.wide
    for layer in range(shape.layers):
        ops.rotate(wide, n, batch.positions, shape, weights.cos, weights.sin)
        ops.store_int8(wide, n, batch.slots, batch.positions, shape, cache, layer * cache.slots)


@compiled
def _activations(step: Step) -> None:
    n, shape, scratch, norms = step.n, step.shape, step.scratch, step.weights.norms
    for which in range(2 * shape.layers + 1):
        ops.rms_norm(scratch.hidden, scratch.order, n, norms, which, shape.hidden, shape.eps, scratch.normed)
    for _ in range(shape.layers):
        for t in range(n):
            simd.gelu(scratch.wide, t * scratch.wide.shape[1], shape.mlp // LANES, step.room)


@compiled
def _sampling(step: Step) -> None:
    choose_tokens(step.batch, step.n, step.scratch)


PARTS = {
    "matmuls": _matmuls,
    "attention": _attention,
    "rotating, rounding and storing keys and values": _storing,
    "rounding the inputs of matmuls": _rounding,
    "norms and GELU": _activations,
    "sampling": _sampling,
}


def _repeated(part: Callable[[Step], None]) -> Callable[[Step], None]:
    @compiled
    def repeated(step: Step) -> None:
        for _ in range(REPEATS):
            part(step)

    return repeated


def _seconds(function: Callable[..., object], *arguments: Any) -> float:
    begin = time.thread_time()
    function(*arguments)
    return time.thread_time() - begin


def _full_engine(n: int) -> tuple[Model, Engine, float]:
    """Return a model, an engine that decodes n sequences of it, and the seconds of a step outside of compiled code.

    Raises RuntimeError if sequences always end too early.
    """
    tokenizer, model = load(MODEL, "numba", "int8")
    text = "Once upon a time there was a little fox who lived in the woods. " * 5
    ids = tokenizer.encode_document(text)[:LENGTH]
    for seed in range(0, 10_000, n):
        engine = Engine(model, n_slots=n)
        # Each sequence begins with another token, so that they share no prefix.
        params = [SamplingParams(max_tokens=100, seed=seed + i) for i in range(n)]
        requests = [engine.submit([2 + i, *ids[1:]], params[i]) for i in range(n)]
        while engine.has_work and not all(request.tokens for request in requests):
            engine.step()
        outside = median(_seconds_outside(engine) for _ in range(8))
        if engine.n_running == n:
            return model, engine, outside
    raise RuntimeError(f"{n} sequences never lasted for a few steps")


def _seconds_outside(engine: Engine) -> float:
    """Return the seconds that a step of the engine takes outside of the compiled step."""
    compiled_step, inside = engine._runner.step, 0.0

    def timed(*arguments: Any) -> None:
        nonlocal inside
        inside += _seconds(compiled_step, *arguments)

    with patch.object(engine._runner, "step", timed):
        return _seconds(engine.step) - inside


def measure(n: int) -> dict[str, dict[str, float]]:
    """Return what each part of a step with n sequences takes, the rest, the whole, and the limits, in microseconds."""
    model, engine, outside = _full_engine(n)
    compiled, parts = _measure_parts(model, engine._runner, n)
    times = {
        **parts,
        "the rest of the compiled step": compiled - sum(parts.values()),
        "Python: batch, sequences, results": 1e6 * outside,
        "whole step": compiled + 1e6 * outside,
    }
    return {"microseconds": times, "least_microseconds": _least(model, engine, n)}


def _least(model: Model, engine: Engine, n: int) -> dict[str, float]:
    """Return the microseconds that this core needs at least to load what a part reads, and for its multiply-adds."""
    config, weight_bytes = model.config, model.kernels.weight_bytes(model.weights)
    bandwidth, peak = measure_bandwidth(weight_bytes), model.kernels.measure_peak()
    cached = n * LENGTH * engine.cache_bytes / (engine.n_slots * config.context)
    return {
        "matmuls": 1e6 * max(weight_bytes / bandwidth, n * matmul_multiply_adds(config) / peak),
        "attention": 1e6 * cached / bandwidth,
    }


def _measure_parts(model: Model, runner: ModelRunner, n: int) -> tuple[float, dict[str, float]]:
    """Return what the compiled step and each part take, in microseconds. All rounds have the same inputs."""
    scratch, logits = runner._scratch, runner.batch.logits
    room = aligned_zeros(scratch.wide.shape, np.float32)
    step = Step(n, model.weights.shape, model.weights, runner._cache, scratch, runner.batch, room)
    rng = np.random.default_rng(0)
    inputs = [(array, rng.standard_normal(array.shape)) for array in (scratch.normed, scratch.wide, scratch.hidden)]
    inputs.append((logits, logits.copy()))
    functions = {name: _repeated(part) for name, part in PARTS.items()}
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    whole: list[float] = []
    for i in range(ROUNDS + 1):
        of_steps = median(_seconds(runner.step, n, n) for _ in range(REPEATS))
        for name, function in functions.items():
            for array, values in inputs:
                array[...] = values
            seconds = _seconds(function, step) / REPEATS
            if i:  # the first round compiles
                times[name].append(seconds)
        if i:
            whole.append(of_steps)
    return 1e6 * median(whole), {name: 1e6 * median(values) for name, values in times.items()}


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = "1,16",
    forms: Annotated[str, typer.Option(metavar="FORM,...", help="Forms of the kernels.")] = ",".join(FORMS),
    here: Annotated[bool, typer.Option("--here", help="Measure this process's form alone, and print JSON.")] = False,
) -> None:
    """Measure where the time of a decode step goes."""
    with one_line_errors(ValueError, RuntimeError):
        sizes = integers("--batches", batches)
        if here:
            print(json.dumps({"form": steps.describe(), "batches": {str(n): measure(n) for n in sizes}}))
            return
        if unknown := set(forms.split(",")) - set(FORMS):
            raise ValueError(f"--forms has {', '.join(sorted(unknown))}: it must be some of {', '.join(FORMS)}")
        if out:
            check_file(out)
        results = {}
        for form in forms.split(","):
            if result := _of_form(form, batches):
                results[form] = result
                PlainConsole().print(_table(form, result))
        if out:
            facts = {**describe(), "command": "python -m loadtest.bench.parts", "tokens_cached": LENGTH}
            write_file(out, json.dumps({**facts, "forms": results}, indent=2) + "\n")


def _of_form(form: str, batches: str) -> dict[str, Any] | None:
    """Return what `measure` returns in a process of that form, by batch size; None if this CPU lacks the form."""
    command = [sys.executable, "-m", "loadtest.bench.parts", "--here", "--batches", batches]
    process = subprocess.run(command, env=environment(FORMS[form]), stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the process of {form} failed: see its messages above")
    result = json.loads(process.stdout)
    if form not in result["form"].split(", "):
        return None
    return {
        n: {kind: {name: round(value, 1) for name, value in times.items()} for kind, times in of_batch.items()}
        for n, of_batch in result["batches"].items()
    }


def _table(form: str, result: dict[str, Any]) -> Table:
    """result: batch size -> the microseconds of each part, and their limits."""
    table = Table("part", title=form)
    for n in result:
        table.add_column(f"batch {n}, us", justify="right")
        table.add_column("at least", justify="right")
    for name in next(iter(result.values()))["microseconds"]:
        figures = []
        for of_batch in result.values():
            least = of_batch["least_microseconds"].get(name)
            figures += [f"{of_batch['microseconds'][name]:.0f}", f"{least:.0f}" if least else ""]
        table.add_row(name, *figures)
    return table


if __name__ == "__main__":
    typer.run(main)
