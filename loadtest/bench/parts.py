"""Measure where the time of a decode step goes.

    python -m loadtest.bench.parts --out docs/results/parts.json

Each part of the compiled step runs alone, in all layers, on the arrays of a real batch: the same work in the same order
on the same memory as within a step. The result also says how much of the whole step is in no part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional

import numpy as np
import typer
from numba import njit
from rich.table import Table

from loadtest.options import integers
from tinylm.engine import Engine
from tinylm.kernels.numba import ops, simd
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.layout import aligned_zeros
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


@njit
def _matmuls(n, shape, weights, cache, scratch, batch, room):
    at = row = 0
    for _ in range(shape.layers):
        hidden, mlp, normed, wide = shape.hidden, shape.mlp, scratch.normed, scratch.wide
        at, row = ops.multiply(n, hidden, weights, at, row, 3 * hidden, wide, False, scratch)
        at, row = ops.multiply(n, hidden, weights, at, row, hidden, normed, False, scratch)
        at, row = ops.multiply(n, hidden, weights, at, row, mlp, wide, False, scratch)
        at, row = ops.multiply(n, mlp, weights, at, row, hidden, normed, False, scratch)
    ops.multiply(n, shape.hidden, weights, at, row, shape.vocab, batch.logits, False, scratch)


@njit
def _rounding(n, shape, weights, cache, scratch, batch, room):
    for _ in range(shape.layers):
        for _ in range(3):
            ops.round_rows(scratch.normed, n, shape.hidden, scratch)
        ops.round_rows(scratch.wide, n, shape.mlp, scratch)
    ops.round_rows(scratch.normed, n, shape.hidden, scratch)


@njit
def _attention(n, shape, weights, cache, scratch, batch, room):
    slots, positions = batch.slots, batch.positions
    for layer in range(shape.layers):
        slots_at = layer * cache.slots
        ops.attend_int8(scratch.wide, n, slots, positions, shape, cache, slots_at, scratch, scratch.normed)


@njit
def _storing(n, shape, weights, cache, scratch, batch, room):
    for layer in range(shape.layers):
        ops.rotate(scratch.wide, n, batch.positions, shape, weights.cos, weights.sin)
        ops.store_int8(scratch.wide, n, batch.slots, batch.positions, shape, cache, layer * cache.slots)


@njit
def _activations(n, shape, weights, cache, scratch, batch, room):  # room: repeated in place, GELU would reach 0
    norms, eps = weights.norms, shape.eps
    for which in range(2 * shape.layers + 1):
        ops.rms_norm(scratch.hidden, scratch.order, n, norms, which, shape.hidden, eps, scratch.normed)
    for _ in range(shape.layers):
        for t in range(n):
            simd.gelu(scratch.wide, t * scratch.wide.shape[1], shape.mlp // LANES, room)


@njit
def _sampling(n, shape, weights, cache, scratch, batch, room):
    choose_tokens(batch, n, scratch)


PARTS = {
    "matmuls": _matmuls,
    "attention": _attention,
    "rotating, rounding and storing keys and values": _storing,
    "rounding the inputs of matmuls": _rounding,
    "norms and GELU": _activations,
    "sampling": _sampling,
}


def _repeated(part: Any) -> Any:
    @njit(nogil=True)
    def repeated(n, repeats, shape, weights, cache, scratch, batch, room):
        for _ in range(repeats):
            part(n, shape, weights, cache, scratch, batch, room)

    return repeated


def _seconds(function: Callable[..., object], *arguments: Any) -> float:
    begin = time.thread_time()
    function(*arguments)
    return time.thread_time() - begin


def _filled(model: Model, n: int, ids: list[int], seed: int) -> Engine | None:
    """Return an engine that decodes n sequences of about LENGTH tokens, or None if one of them ended before."""
    engine = Engine(model, n_slots=n)
    for i in range(n):  # each begins with another token, so that they share no prefix
        engine.submit([2 + i, *ids[1:]], SamplingParams(max_tokens=200, seed=seed + i))
    while engine.n_running == n or engine.n_waiting:
        engine.step()
        if engine.n_running == n and min(len(s.tokens) for s in engine._unfinished) >= LENGTH - len(ids):
            return engine
    return None


def _full_engine(n: int) -> tuple[Model, Engine, float]:
    """Return a model, an engine that decodes n sequences of it, and the seconds of a whole step.

    Raises RuntimeError if sequences always end too early.
    """
    tokenizer, model = load(MODEL, "numba", "int8")
    text = "Once upon a time there was a little fox who lived in the woods. " * 5
    ids = tokenizer.encode_document(text)[: LENGTH - 4]
    for seed in range(0, 10_000, n):
        engine = _filled(model, n, ids, seed)
        if engine is not None:
            whole = median(_seconds(engine.step) for _ in range(8))
            if engine.n_running == n:
                return model, engine, whole
    raise RuntimeError(f"{n} sequences never lasted for {LENGTH} tokens")


def measure(n: int) -> dict[str, float]:
    """Return the microseconds of each part of a step with n sequences, of the rest, and of the whole."""
    model, engine, whole = _full_engine(n)
    runner = engine._runner
    compiled = median(_seconds(runner.step, n, n) for _ in range(50))
    parts = _measure_parts(model, runner, n)
    return {
        **parts,
        "the rest of the compiled step": 1e6 * compiled - sum(parts.values()),
        "Python: batch, sequences, results": 1e6 * (whole - compiled),
        "whole step": 1e6 * whole,
    }


def _measure_parts(model: Model, runner: ModelRunner, n: int) -> dict[str, float]:
    """Return the microseconds of each part. The inputs of every round are the same."""
    scratch, rng = runner._scratch, np.random.default_rng(0)
    arrays = (model.weights.shape, model.weights, runner._cache, scratch, runner.batch)
    room = aligned_zeros(scratch.wide.shape, np.float32)
    functions = {name: _repeated(part) for name, part in PARTS.items()}
    inputs = [(array, rng.standard_normal(array.shape)) for array in (scratch.normed, scratch.wide, scratch.hidden)]
    inputs.append((runner.batch.logits, runner.batch.logits.copy()))
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for i in range(ROUNDS + 1):
        for name, function in functions.items():
            for array, values in inputs:
                array[...] = values
            seconds = _seconds(function, n, REPEATS, *arrays, room) / REPEATS
            if i:  # the first round compiles
                times[name].append(seconds)
    return {name: 1e6 * median(values) for name, values in times.items()}


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")] = "1,16",
) -> None:
    """Measure where the time of a decode step goes."""
    with one_line_errors(ValueError, RuntimeError):
        sizes = integers("--batches", batches)
        if out:
            check_file(out)
        results = {n: measure(n) for n in sizes}
        PlainConsole().print(_table(results))
        if out:
            facts = {**describe(), "command": "python -m loadtest.bench.parts", "tokens_cached": LENGTH}
            micros = {str(n): {name: round(value, 1) for name, value in parts.items()} for n, parts in results.items()}
            write_file(out, json.dumps({**facts, "microseconds": micros}, indent=2) + "\n")


def _table(results: dict[int, dict[str, float]]) -> Table:
    """results: batch size -> part -> microseconds."""
    table = Table("part", *(f"batch {n}, us" for n in results), *(f"batch {n}" for n in results))
    for name in next(iter(results.values())):
        figures = [f"{parts[name]:.0f}" for parts in results.values()]
        shares = [f"{parts[name] / parts['whole step']:.0%}" for parts in results.values()]
        table.add_row(name, *figures, *shares)
    return table


if __name__ == "__main__":
    typer.run(main)
