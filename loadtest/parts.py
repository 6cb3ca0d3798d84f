"""Where the time of a decode step goes, part by part.

    python -m loadtest.parts --out docs/results/parts.json

Each part of the compiled step is run by itself, all layers of it, on the arrays of a real batch: the same work in the
same order on the same memory as within a step. What is left of the whole step is told too, so that nothing hides.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numba import njit
from rich.table import Table

from tinylm.engine import Engine
from tinylm.files import check_file, write_file
from tinylm.kernels.numba import ops, simd
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.layout import aligned_zeros
from tinylm.kernels.numba.sampling import choose_tokens
from tinylm.llm import load
from tinylm.machine import describe
from tinylm.model import Model
from tinylm.sampling import SamplingParams
from tinylm.terminal.output import PlainConsole, one_line_errors

MODEL = Path("models/stories-8m")
LENGTH = 64  # tokens that each sequence has cached
REPEATS = 20  # of a part within one call, so that calling it costs nothing
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
def _activations(n, shape, weights, cache, scratch, batch, room):  # room: GELU in place again and again would be 0
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


def _repeated(part: Any) -> Callable:
    @njit(nogil=True)
    def repeated(n, repeats, shape, weights, cache, scratch, batch, room):
        for _ in range(repeats):
            part(n, shape, weights, cache, scratch, batch, room)

    return repeated


def _seconds(function: Callable[[], object]) -> float:
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def _filled(model: Model, n: int, ids: list[int], seed: int) -> Engine | None:
    """An engine that decodes n sequences of about LENGTH tokens; None if one ended before."""
    engine = Engine(model, n_slots=n)
    for i in range(n):  # each begins with a token of its own, so that no prefix is shared
        engine.submit([2 + i, *ids[1:]], SamplingParams(max_tokens=200, seed=seed + i))
    while engine.n_running == n or engine.n_waiting:
        engine.step()
        if engine.n_running == n and min(len(s.tokens) for s in engine._unfinished) >= LENGTH - len(ids):
            return engine
    return None


def measure(n: int) -> dict[str, float]:
    """Microseconds of each part of a step with n sequences of LENGTH tokens, of the rest, and of the whole."""
    tokenizer, model = load(MODEL, "numba", "int8")
    ids = tokenizer.encode_document("Once upon a time there was a little fox who lived in the woods. " * 5)[
        : LENGTH - 4
    ]
    for seed in range(0, 10_000, n):
        engine = _filled(model, n, ids, seed)
        if engine is None:
            continue
        whole = median(_seconds(engine.step) for _ in range(8))
        if engine.n_running == n:
            break
    else:
        raise RuntimeError(f"{n} sequences never lasted for {LENGTH} tokens")
    runner = engine._runner
    compiled = median(_seconds(lambda: runner.step(n, n)) for _ in range(50))
    arrays = (model.weights.shape, model.weights, runner._cache, runner._scratch, runner.batch)
    room = aligned_zeros(runner._scratch.wide.shape, np.float32)
    functions = {name: _repeated(part) for name, part in PARTS.items()}
    scratch, rng = runner._scratch, np.random.default_rng(0)
    inputs = [(array, rng.standard_normal(array.shape)) for array in (scratch.normed, scratch.wide, scratch.hidden)]
    inputs.append((runner.batch.logits, runner.batch.logits.copy()))
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for i in range(ROUNDS + 1):
        for name, function in functions.items():
            for array, values in inputs:
                array[...] = values
            seconds = _seconds(lambda function=function: function(n, REPEATS, *arrays, room)) / REPEATS  # type: ignore[misc]
            if i:  # the first compiles
                times[name].append(seconds)
    parts = {name: 1e6 * median(values) for name, values in times.items()}
    rest = 1e6 * compiled - sum(parts.values())
    return {
        **parts,
        "the rest of the compiled step": rest,
        "Python: batch, sequences, results": 1e6 * (whole - compiled),
        "whole step": 1e6 * whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    with one_line_errors(ValueError):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure each batch size, print a table and write the figures."""
    if arguments.out:
        check_file(arguments.out)
    results = {n: measure(n) for n in arguments.batches}
    table = Table("part", *(f"batch {n}, us" for n in results), *(f"batch {n}" for n in results))
    for name in next(iter(results.values())):
        figures = [f"{parts[name]:.0f}" for parts in results.values()]
        shares = [f"{parts[name] / parts['whole step']:.0%}" for parts in results.values()]
        table.add_row(name, *figures, *shares)
    PlainConsole().print(table)
    if arguments.out:
        facts = {**describe(), "command": "python -m loadtest.parts", "tokens_cached": LENGTH}
        micros = {str(n): {name: round(value, 1) for name, value in parts.items()} for n, parts in results.items()}
        write_file(arguments.out, json.dumps({**facts, "microseconds": micros}, indent=2) + "\n")


if __name__ == "__main__":
    main()
