"""Matmuls, norms, rotation and attention, as compiled loops over tokens, tiles and heads.

Each token is computed by itself and in the same order in every batch, so that its numbers are the same bit for bit
whatever else is in the batch. The inner loops are in `tinylm.kernels.numba.simd`. Compiled functions don't check
indices.
"""

from __future__ import annotations

import numpy as np

from tinylm.kernels.numba import simd
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.jit import compiled
from tinylm.kernels.numba.layout import Float32Cache, Int8Cache, Scratch, Shape, Weights
from tinylm.kernels.numba.simd import NEVER, TILE

# --- matmuls; a matrix is given by `at`, the byte where its tiles begin, and `row`, its first row among all matrices'


@compiled
def linear(
    x: np.ndarray,
    n_tokens: int,
    n_in: int,
    weights: Weights,
    at: int,
    row: int,
    n_out: int,
    out: np.ndarray,
    add: bool,
    scratch: Scratch,
    exact: bool,
) -> tuple[int, int]:
    """Compute out = x @ matrix.T, or out += x @ matrix.T if `add`, for x (T, n_in) and out (T, n_out).

    exact: use x as it is. Otherwise round x to bytes, with one scale a token.
    Return `at` and `row` of the next matrix.
    """
    if exact:
        return multiply_exact(x, n_tokens, n_in, weights, at, row, n_out, out, add, scratch)
    round_rows(x, n_tokens, n_in, scratch)
    return multiply(n_tokens, n_in, weights, at, row, n_out, out, add, scratch)


@compiled
def round_rows(x: np.ndarray, n_tokens: int, n_columns: int, scratch: Scratch) -> None:
    """Round x (T, n_columns) to scratch.bytes and scratch.scales."""
    n_blocks = (n_columns + LANES - 1) // LANES
    for t in range(n_tokens):
        at, out_at = t * x.shape[1], t * scratch.bytes.shape[1]
        scratch.scales[t] = simd.round_to_bytes(x, at, n_blocks, scratch.bytes, out_at)


@compiled
def multiply(
    n_tokens: int,
    n_in: int,
    weights: Weights,
    at: int,
    row: int,
    n_out: int,
    out: np.ndarray,
    add: bool,
    scratch: Scratch,
) -> tuple[int, int]:
    """Multiply scratch.bytes (T, n_in) by a matrix, like `linear`. Each tile of weights is read once for all tokens."""
    n_steps = (n_in + 3) // 4
    packed, scales, corrections = weights.packed, weights.scales, weights.corrections
    x, x_scales = scratch.bytes, scratch.scales
    for column in range(0, n_out, TILE):
        t = 0
        while t + 4 <= n_tokens:
            simd.matmul_4(packed, at, n_steps, x, x_scales, t, scales, corrections, row, out, column, add)
            t += 4
        if t + 2 <= n_tokens:
            simd.matmul_2(packed, at, n_steps, x, x_scales, t, scales, corrections, row, out, column, add)
            t += 2
        if t < n_tokens:
            simd.matmul_1(packed, at, n_steps, x, x_scales, t, scales, corrections, row, out, column, add)
        at += TILE * 4 * n_steps
        row += TILE
    return at, row


@compiled
def multiply_exact(
    x: np.ndarray,
    n_tokens: int,
    n_in: int,
    weights: Weights,
    at: int,
    row: int,
    n_out: int,
    out: np.ndarray,
    add: bool,
    scratch: Scratch,
) -> tuple[int, int]:
    """Multiply x (T, n_in) by a matrix without rounding x, like `linear`."""
    n_steps = (n_in + 3) // 4
    packed, scales, corrections = weights.packed, weights.scales, weights.corrections
    for column in range(0, n_out, TILE):
        t = 0
        while t + 4 <= n_tokens:
            simd.matmul_exact_4(packed, at, n_steps, x, scratch.scales, t, scales, corrections, row, out, column, add)
            t += 4
        while t < n_tokens:
            simd.matmul_exact_1(packed, at, n_steps, x, scratch.scales, t, scales, corrections, row, out, column, add)
            t += 1
        at += TILE * 4 * n_steps
        row += TILE
    return at, row


# --- embedding and norm


@compiled
def embed(ids: np.ndarray, n_tokens: int, shape: Shape, weights: Weights, at: int, row: int, out: np.ndarray) -> None:
    """Write the embedding of each token to out (T, hidden). `at` and `row` are those of the embedding matrix."""
    n_steps = (shape.hidden + 3) // 4
    for t in range(n_tokens):
        tile, lane = ids[t] // TILE, ids[t] % TILE
        first = at + tile * TILE * 4 * n_steps + lane * 4
        scale = weights.scales[row + ids[t]]
        for k in range(shape.hidden):
            out[t, k] = weights.packed[first + k // 4 * (4 * TILE) + k % 4] * scale


@compiled
def rms_norm(
    x: np.ndarray,
    sources: np.ndarray,
    n_rows: int,
    norms: np.ndarray,
    which: int,
    n: int,
    eps: float,
    out: np.ndarray,
) -> None:
    """Compute out[i] = x[j] / sqrt(mean(x[j]^2) + eps) * norms[which] for each i, with j = sources[i].

    x and out have n columns, and sources (n_rows,) are row numbers. See Zhang & Sennrich 2019.
    """
    n_blocks = (n + LANES - 1) // LANES
    for i in range(n_rows):
        row = sources[i] * x.shape[1]
        mean = simd.sum_of_squares(x, row, n_blocks) / np.float32(n)
        factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
        simd.scale_by(x, row, factor, norms, which * norms.shape[1], out, i * out.shape[1], n_blocks)


# --- attention; qkv is (T, 3 * hidden): queries, keys, values. `slots_at` is the layer's first slot among all layers'


@compiled
def rotate(
    qkv: np.ndarray, n_tokens: int, positions: np.ndarray, shape: Shape, cos: np.ndarray, sin: np.ndarray
) -> None:
    """Rotate queries and keys in place by the tokens' positions (T,). cos and sin are (context, head_dim).

    See Su et al. 2021. The two halves of a head form the pairs, as in GPT-NeoX.
    """
    half = shape.head_dim // 2
    for t in range(n_tokens):
        position = positions[t]
        for head in range(2 * shape.heads):
            column = head * shape.head_dim
            simd.rotate(qkv, t * qkv.shape[1] + column, half, cos, sin, position * cos.shape[1], half // LANES)
            for i in range(half // LANES * LANES, half):
                a, b = qkv[t, column + i], qkv[t, column + half + i]
                qkv[t, column + i] = a * cos[position, i] - b * sin[position, i]
                qkv[t, column + half + i] = b * cos[position, i] + a * sin[position, i]


@compiled
def store_int8(
    qkv: np.ndarray,
    n_tokens: int,
    slots: np.ndarray,
    positions: np.ndarray,
    shape: Shape,
    cache: Int8Cache,
    slots_at: int,
) -> None:
    """Round the tokens' keys and values to bytes and write them to the cache at their slots and positions (T,)."""
    size, heads, hidden = shape.head_dim, shape.heads, shape.heads * shape.head_dim
    width = (size + LANES - 1) // LANES * LANES
    keys, key_scales, values, value_scales = cache.keys, cache.key_scales, cache.values, cache.value_scales
    for t in range(n_tokens):
        row, block, lane = t * qkv.shape[1], positions[t] // LANES, positions[t] % LANES
        first = ((slots_at + slots[t]) * cache.blocks + block) * heads
        for h in range(heads):
            scale_at = (first + h) * LANES + lane
            key_at, value_at = row + hidden + h * size, row + 2 * hidden + h * size
            block_at = (first + h) * LANES * width
            simd.put_key(qkv, key_at, size, width, keys, block_at, lane, key_scales, scale_at)
            quad_at = block_at + lane // 4 * 4 * width
            simd.put_value(qkv, value_at, size, width, values, quad_at, lane % 4, value_scales, scale_at)


@compiled
def attend_int8(
    qkv: np.ndarray,
    n_tokens: int,
    slots: np.ndarray,
    positions: np.ndarray,
    shape: Shape,
    cache: Int8Cache,
    slots_at: int,
    scratch: Scratch,
    out: np.ndarray,
) -> None:
    """Write to out (T, hidden) each token's attention over its sequence up to itself.

    The loops read keys and values in the order of the cache: block by block, and all heads of a block.
    """
    size, heads, context = shape.head_dim, shape.heads, cache.blocks * LANES
    width = (size + LANES - 1) // LANES * LANES
    keys, key_scales, values, value_scales = cache.keys, cache.key_scales, cache.values, cache.value_scales
    query, factors, offsets, sums = scratch.query, scratch.factors, scratch.offsets, scratch.sums
    scores, high, low = scratch.scores, scratch.high, scratch.low
    for t in range(n_tokens):
        row, length = t * qkv.shape[1], positions[t] + 1
        n_blocks = (length + LANES - 1) // LANES
        first = (slots_at + slots[t]) * cache.blocks * heads
        for h in range(heads):
            simd.round_query(qkv, row + h * size, size, width, query, h * width, factors, offsets, h)
        for block in range(n_blocks):
            for h in range(heads):
                at = (first + block * heads + h) * LANES
                simd.key_scores(
                    query, h * width, width, factors, offsets, h,
                    keys, at * width, key_scales, at, length - block * LANES, scores, h * context + block * LANES,
                )  # fmt: skip
        for h in range(heads):
            simd.soften(
                scores, h * context, length, value_scales, (first + h) * LANES, heads * LANES, high, low, factors, h
            )
        for block in range(n_blocks):
            for h in range(heads):
                at = (first + block * heads + h) * LANES
                simd.weigh_values(
                    high, low, h * context + block * LANES, values, at * width, width, sums, 2 * h * width
                )
        for h in range(heads):
            simd.put_sums(sums, 2 * h * width, width, factors, h, out, t * out.shape[1] + h * size)


@compiled
def store_float32(
    qkv: np.ndarray,
    n_tokens: int,
    slots: np.ndarray,
    positions: np.ndarray,
    shape: Shape,
    cache: Float32Cache,
    slots_at: int,
) -> None:
    """Write the tokens' keys and values to the cache at their slots and positions (T,)."""
    size, heads, hidden = shape.head_dim, shape.heads, shape.heads * shape.head_dim
    for t in range(n_tokens):
        block, lane = positions[t] // LANES, positions[t] % LANES
        first = ((slots_at + slots[t]) * cache.blocks + block) * heads
        for h in range(heads):
            at = (first + h) * LANES * size
            for i in range(size):
                cache.keys[at + i * LANES + lane] = qkv[t, hidden + h * size + i]
                cache.values[at + lane * size + i] = qkv[t, 2 * hidden + h * size + i]


@compiled
def attend_float32(
    qkv: np.ndarray,
    n_tokens: int,
    slots: np.ndarray,
    positions: np.ndarray,
    shape: Shape,
    cache: Float32Cache,
    slots_at: int,
    scratch: Scratch,
    out: np.ndarray,
) -> None:
    """Write to out (T, hidden) each token's attention over its sequence up to itself."""
    size, heads = shape.head_dim, shape.heads
    keys, values, scores = cache.keys, cache.values, scratch.scores
    factor = np.float32(1) / np.sqrt(np.float32(size))
    for t in range(n_tokens):
        length = positions[t] + 1
        n_blocks = (length + LANES - 1) // LANES
        first = (slots_at + slots[t]) * cache.blocks * heads
        for h in range(heads):
            for block in range(n_blocks):
                at, token = (first + block * heads + h) * LANES * size, block * LANES
                for lane in range(LANES):
                    scores[token + lane] = np.float32(0)
                for i in range(size):
                    value = qkv[t, h * size + i] * factor
                    for lane in range(LANES):
                        scores[token + lane] += value * keys[at + i * LANES + lane]
            total = _exponentials(scores, length)
            for i in range(size):
                out[t, h * size + i] = np.float32(0)
            for block in range(n_blocks):
                at = (first + block * heads + h) * LANES * size
                for lane in range(min(LANES, length - block * LANES)):
                    weight = scores[block * LANES + lane] / total
                    for i in range(size):
                        out[t, h * size + i] += weight * values[at + lane * size + i]


@compiled
def _exponentials(scores: np.ndarray, length: int) -> float:
    """Replace the first `length` scores by exp(score - largest score), and return the sum of these."""
    greatest = scores[0]
    for i in range(1, length):
        greatest = max(greatest, scores[i])
    n_blocks = (length + LANES - 1) // LANES
    for i in range(length, n_blocks * LANES):
        scores[i] = NEVER
    return simd.exponentials(scores, 0, n_blocks, greatest, np.float32(1), scores)
