"""Matmuls, norms, rotation and attention: compiled loops over tokens, tiles and heads.

The numbers of a token are computed in the same order in every batch, so they have the same bits in every batch. The
inner loops are in `tinylm.kernels.numba.simd`. Compiled functions don't check indices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinylm.kernels.numba import amx, simd
from tinylm.kernels.numba.amx import HAS_TILES, WIDTH
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.jit import compiled
from tinylm.kernels.numba.layout import Float32Cache, Int8Cache, Scratch, Shape, Weights
from tinylm.kernels.numba.simd import NEVER, TILE

# --- matmuls; a matrix's tiles begin at byte `at` of weights.packed, and its first row is `row` of weights.scales


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

    exact: don't round x. Otherwise round x to bytes, with one scale per token.
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
    if HAS_TILES and n_tokens >= scratch.tile_tokens and n_in % amx.INPUTS == 0:
        return multiply_tiles(n_tokens, n_steps, weights, at, row, n_out, out, add, scratch)
    for column in range(0, n_out, TILE):
        t = 0
        while t + 6 <= n_tokens:
            simd.matmul_6(weights, at, row, n_steps, scratch.bytes, scratch, t, out, column, add)
            t += 6
        if t + 4 <= n_tokens:
            simd.matmul_4(weights, at, row, n_steps, scratch.bytes, scratch, t, out, column, add)
            t += 4
        if t + 2 <= n_tokens:
            simd.matmul_2(weights, at, row, n_steps, scratch.bytes, scratch, t, out, column, add)
            t += 2
        if t < n_tokens:
            simd.matmul_1(weights, at, row, n_steps, scratch.bytes, scratch, t, out, column, add)
        at += TILE * 4 * n_steps
        row += TILE
    return at, row


@compiled
def multiply_tiles(
    n_tokens: int,
    n_steps: int,
    weights: Weights,
    at: int,
    row: int,
    n_out: int,
    out: np.ndarray,
    add: bool,
    scratch: Scratch,
) -> tuple[int, int]:
    """Multiply like `multiply`, with AMX tiles."""
    amx.configure()
    for column in range(0, n_out, TILE):
        for t in range(0, n_tokens, amx.ROWS):
            n = min(amx.ROWS, n_tokens - t)
            amx.matmul(weights, at, row, n_steps, scratch, t, n, out, column, add)
        at += TILE * 4 * n_steps
        row += TILE
    amx.release()
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
    for column in range(0, n_out, TILE):
        t = 0
        while t + 4 <= n_tokens:
            simd.matmul_exact_4(weights, at, row, n_steps, x, scratch, t, out, column, add)
            t += 4
        while t < n_tokens:
            simd.matmul_exact_1(weights, at, row, n_steps, x, scratch, t, out, column, add)
            t += 1
        at += TILE * 4 * n_steps
        row += TILE
    return at, row


# --- embedding and norm


@compiled
def embed(ids: np.ndarray, n_tokens: int, shape: Shape, weights: Weights, at: int, row: int, out: np.ndarray) -> None:
    """Write the embedding of each token to out (T, hidden). `at` and `row` belong to the embedding matrix."""
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
    for t in range(n_tokens):
        row, block, lane = t * qkv.shape[1], positions[t] // LANES, positions[t] % LANES
        first = ((slots_at + slots[t]) * cache.blocks + block) * heads
        for h in range(heads):
            key_at, value_at = row + hidden + h * size, row + 2 * hidden + h * size
            simd.put_key(qkv, key_at, size, width, cache, (first + h) * LANES, lane)
            simd.put_value(qkv, value_at, size, width, cache, (first + h) * LANES, lane)


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
    """Write to out (T, hidden) each token's attention over its sequence up to itself."""
    width = (shape.head_dim + LANES - 1) // LANES * LANES
    slot_size = cache.blocks * shape.heads * LANES
    configured = False
    t = 0
    while t < n_tokens:
        n = 1  # tokens of the same block of the cache
        while t + n < n_tokens and slots[t + n] == slots[t] and positions[t + n] // LANES == positions[t] // LANES:
            n += 1
        first = (slots_at + slots[t]) * slot_size
        if HAS_TILES and width == WIDTH and n >= scratch.tile_tokens:
            if not configured:
                amx.configure_attention()
                configured = True
            attend_tiles(qkv, t, n, first, positions[t], shape, cache, scratch, out)
        else:
            for i in range(t, t + n):  # the token after the last one is the first one, in the next layer
                next_slot = slots_at + slots[i + 1] if i + 1 < n_tokens else slots_at + cache.slots + slots[0]
                next_first = next_slot * slot_size
                if width == WIDTH:
                    attend_token(qkv, i, first, next_first, positions[i], shape, cache, scratch, out)
                else:
                    attend_token_any_width(qkv, i, first, next_first, positions[i], shape, cache, scratch, out)
        t += n
    if HAS_TILES and configured:
        amx.release()


def _make_attend_token(constant_width: int) -> Callable[..., None]:
    """Make the attention of one token for heads of this width, which the compiler then knows, or 0 for any width."""

    @compiled
    def attend_token(
        qkv: np.ndarray,
        t: int,
        first: int,
        next_first: int,
        position: int,
        shape: Shape,
        cache: Int8Cache,
        scratch: Scratch,
        out: np.ndarray,
    ) -> None:
        """Compute the attention of token t, whose slot begins at token `first` of the cache.

        While it computes two heads, it prefetches the keys and values of the next two. The last heads prefetch for the
        next token, whose slot begins at `next_first`: a batch has too many keys and values for the processor's caches.
        Each loop prefetches a part, since a core can wait for only about a dozen cache lines at a time.
        """
        size, heads, block_size = shape.head_dim, shape.heads, shape.heads * LANES
        width = constant_width or (size + LANES - 1) // LANES * LANES
        length = position + 1
        n_blocks, columns = (length + LANES - 1) // LANES, (cache.blocks + 1) * LANES
        for pair in range(0, heads, 2):
            end = min(pair + 2, heads)
            ahead = 2 * LANES if end < heads else next_first - first - pair * LANES
            for h in range(pair, end):
                query = (h - pair) * amx.ROWS
                simd.round_query(qkv, t * qkv.shape[1] + h * size, size, width, scratch, query)
            for block in range(n_blocks):
                for h in range(pair, end):
                    query, at, token = (h - pair) * amx.ROWS, first + block * block_size + h * LANES, block * LANES
                    simd.prefetch_scales(cache, at + ahead)
                    simd.prefetch_keys(cache, at + ahead, width, 0)
                    simd.key_scores(scratch, query, width, cache, at, length - token, query * columns + token)
            for h in range(pair, end):
                query, at = (h - pair) * amx.ROWS, first + h * LANES
                for block in range(n_blocks):
                    simd.prefetch_keys(cache, at + ahead + block * block_size, width, 1)
                    simd.prefetch_values(cache, at + ahead + block * block_size, width, 0)
                simd.soften(scratch, query, query * columns, length, cache, at, block_size)
            for block in range(n_blocks):
                for h in range(pair, end):
                    query, at = (h - pair) * amx.ROWS, first + block * block_size + h * LANES
                    simd.prefetch_values(cache, at + ahead, width, 1)
                    simd.weigh_values(scratch, query, query * columns + block * LANES, cache, at, width)
            for h in range(pair, end):
                query = (h - pair) * amx.ROWS
                simd.put_sums(scratch, query, width, out, t * out.shape[1] + h * size)

    return attend_token


attend_token, attend_token_any_width = _make_attend_token(WIDTH), _make_attend_token(0)


@compiled
def attend_tiles(
    qkv: np.ndarray,
    t: int,
    n: int,
    first: int,
    position: int,
    shape: Shape,
    cache: Int8Cache,
    scratch: Scratch,
    out: np.ndarray,
) -> None:
    """Compute the attention of tokens t to t + n with AMX. They belong to one block of a slot.

    first: where their slot begins in the cache. position: of token t. These tokens share the keys and values that a
    tile holds. Each loop finishes one part of two heads, since a tile waits for numbers that were just stored.
    """
    size, block_size, n_blocks = shape.head_dim, shape.heads * LANES, position // LANES + 1
    columns = (cache.blocks + 1) * LANES  # of scratch; rows that are a power of 2 apart evict each other from L1
    for pair in range(0, shape.heads, 2):
        end = min(pair + 2, shape.heads)
        for h in range(pair, end):
            for i in range(n):
                x_at, query = (t + i) * qkv.shape[1] + h * size, (h - pair) * amx.ROWS + i
                simd.round_query(qkv, x_at, size, WIDTH, scratch, query)
        for h in range(pair, end):
            amx.key_sums(scratch, h - pair, cache, first + h * LANES, block_size, n_blocks, columns)
        for h in range(pair, end):
            for i in range(n):
                query, length, at = (h - pair) * amx.ROWS + i, position + i + 1, first + h * LANES
                simd.scores_of_sums(scratch, query, query * columns, length, cache, at, block_size)
                simd.soften(scratch, query, query * columns, length, cache, at, block_size)
        for h in range(pair, end):
            amx.value_sums(scratch, h - pair, cache, first + h * LANES, block_size, n_blocks, columns)
        for h in range(pair, end):
            for i in range(n):
                simd.put_sums(scratch, (h - pair) * amx.ROWS + i, WIDTH, out, (t + i) * out.shape[1] + h * size)


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
    """Replace the first `length` scores by exp(score - largest score), and return the sum."""
    greatest = scores[0]
    for i in range(1, length):
        greatest = max(greatest, scores[i])
    n_blocks = (length + LANES - 1) // LANES
    for i in range(length, n_blocks * LANES):
        scores[i] = NEVER
    return simd.exponentials(scores, 0, n_blocks, greatest, np.float32(1), scores)
