"""A whole step, forward pass and sampling, as one compiled call. It allocates nothing and releases the GIL."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tinylm.kernels.batch import Batch
from tinylm.kernels.numba import amx, emitter, ops, simd
from tinylm.kernels.numba.amx import HAS_TILES
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.jit import SOURCES, compile_or_load, compiled, kept_on_disk
from tinylm.kernels.numba.layout import Cache, Int8Cache, Scratch, Weights
from tinylm.kernels.numba.sampling import choose_tokens
from tinylm.kernels.numba.simd import TILE


def _make_pass(exact: bool) -> Callable[..., None]:
    """Make the forward pass for one type of cache.

    `exact` is a constant for the compiler, so that it compiles only the functions of this cache.
    """

    @compiled
    def forward_pass(weights: Weights, cache: Any, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
        shape = weights.shape
        hidden, width = shape.hidden, shape.heads * shape.head_dim
        x, normed, wide = scratch.hidden, scratch.normed, scratch.wide
        last_at = len(weights.packed) - (shape.vocab + TILE - 1) // TILE * TILE * ((hidden + 3) // 4 * 4)
        last_row = len(weights.scales) - (shape.vocab + TILE - 1) // TILE * TILE
        ops.embed(batch.ids, n_tokens, shape, weights, last_at, last_row, x)
        at = row = 0
        slots, positions = batch.slots, batch.positions
        for layer in range(shape.layers):
            slots_at = layer * cache.slots
            ops.rms_norm(x, scratch.order, n_tokens, weights.norms, 2 * layer, hidden, shape.eps, normed)
            at, row = ops.linear(normed, n_tokens, hidden, weights, at, row, 3 * width, wide, False, scratch, exact)
            ops.rotate(wide, n_tokens, positions, shape, weights.cos, weights.sin)
            if exact:
                ops.store_float32(wide, n_tokens, slots, positions, shape, cache, slots_at)
                ops.attend_float32(wide, n_tokens, slots, positions, shape, cache, slots_at, scratch, normed)
            else:
                ops.store_int8(wide, n_tokens, slots, positions, shape, cache, slots_at)
                ops.attend_int8(wide, n_tokens, slots, positions, shape, cache, slots_at, scratch, normed)
            at, row = ops.linear(normed, n_tokens, width, weights, at, row, hidden, x, True, scratch, exact)
            ops.rms_norm(x, scratch.order, n_tokens, weights.norms, 2 * layer + 1, hidden, shape.eps, normed)
            at, row = ops.linear(normed, n_tokens, hidden, weights, at, row, shape.mlp, wide, False, scratch, exact)
            for t in range(n_tokens):
                simd.gelu(wide, t * wide.shape[1], (shape.mlp + LANES - 1) // LANES, wide)
            at, row = ops.linear(wide, n_tokens, shape.mlp, weights, at, row, hidden, x, True, scratch, exact)
        ops.rms_norm(x, batch.rows, n_rows, weights.norms, 2 * shape.layers, hidden, shape.eps, normed)
        ops.linear(normed, n_rows, hidden, weights, at, row, shape.vocab, batch.logits, False, scratch, exact)

    return forward_pass


_pass_int8, _pass_float32 = _make_pass(exact=False), _make_pass(exact=True)


def _make_run(exact: bool, sources: str) -> Any:
    """Make the function that Python calls: the forward pass, and sampling if `samples`.

    The function uses `sources` only to make it a closure variable (see `tinylm.kernels.numba.jit`).
    """

    def run(
        samples: bool, weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int
    ) -> None:
        if sources:
            if exact:
                _pass_float32(weights, cache, scratch, batch, n_tokens, n_rows)
            else:
                _pass_int8(weights, cache, scratch, batch, n_tokens, n_rows)
            if samples:
                choose_tokens(batch, n_rows, scratch)

    return kept_on_disk(run)


_run_int8, _run_float32 = _make_run(False, SOURCES), _make_run(True, SOURCES)


def run_for(cache: Cache) -> Any:
    """Return Numba's dispatcher of the step for this type of cache."""
    return _run_int8 if isinstance(cache, Int8Cache) else _run_float32


def forward(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Run the batch's tokens through the model, and write the logits of its rows to batch.logits."""
    run_for(cache)(False, weights, cache, scratch, batch, n_tokens, n_rows)


def sample(scratch: Scratch, batch: Batch, n_rows: int) -> None:
    """Choose one token for each row of batch.logits and write it to batch.chosen."""
    choose_tokens(batch, n_rows, scratch)


def step(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Call `forward`, then `sample`, in one compiled call."""
    run_for(cache)(True, weights, cache, scratch, batch, n_tokens, n_rows)


def warm_up(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch) -> Callable[[int, int], None]:
    """Compile or load the step. Return it for these arrays: (n_tokens, n_rows) -> None."""
    arguments = (True, weights, cache, scratch, batch)
    return partial(compile_or_load(run_for(cache), *arguments, 0, 0), *arguments)


def describe() -> str:
    """Return "numba" and the instructions that compute dot products of bytes, such as "avx512-vnni+amx"."""
    return f"numba, {emitter.dot_product()}{'+amx' if amx.permitted() else ''}"


def measure_peak() -> float:
    """Return the most multiply-adds of bytes that one core does per CPU second."""
    sums = np.arange(LANES, dtype=np.int32)
    tiles = amx.permitted()
    _multiply_adds(1, sums, tiles)  # compiles
    n_rounds = 1_000_000
    best = 0.0
    for _ in range(5):
        begin = time.thread_time()
        n = n_rounds * _multiply_adds(n_rounds, sums, tiles)
        best = max(best, n / (time.thread_time() - begin))
    return best


@compiled
def _multiply_adds(n: int, sums: np.ndarray, tiles: bool) -> int:
    if HAS_TILES and tiles:
        amx.configure()
        per_round = amx.multiply_adds(n)
        amx.release()
        return per_round
    return simd.multiply_adds(n, sums)
