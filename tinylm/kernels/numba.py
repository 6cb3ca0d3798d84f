"""The transformer's arithmetic compiled: `tinylm.kernels.numpy`'s functions, on packed int8 weights.

A step is one compiled call that allocates nothing and holds no lock of Python's. Each token's arithmetic is its own,
in the same order in any batch, so that a sequence's numbers are the same bit for bit whatever else runs.

Precision "int8" rounds what enters a matmul to 8 bits, one scale a token, and caches keys and values as 8 bits, one
scale a head and token; "float32" rounds nothing but the weights. The inner loops are in `tinylm.kernels.simd`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numba import njit

import tinylm.batch
from tinylm.batch import Batch
from tinylm.config import ModelConfig
from tinylm.kernels import emitter, simd
from tinylm.kernels.numpy import rope_tables
from tinylm.kernels.sharing import shared
from tinylm.weights import QuantizedMatrix, Tensor

LANES, TILE, NEVER = simd.LANES, simd.TILE, simd.NEVER
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
CACHE_LINE, HUGE_PAGE = 64, 2**21  # bytes
NOTHING = np.float32(1e-37)  # the mass of a token that is never drawn; the least that `Emitter.exp2` gives is below it
GREATEST_FACTOR = 1e30  # of scores: a temperature next to 0 divides by no less than its inverse


class Shape(NamedTuple):
    """The sizes of a model, as compiled code takes them."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float


class Weights(NamedTuple):
    """All matrices in the order in which a step reads them: each layer's qkv, out, up, down, then the embedding."""

    shape: Shape
    packed: np.ndarray  # (bytes,) int8 in tiles (see `simd`), rows and columns padded with zeros
    scales: np.ndarray  # (rows,) float32
    corrections: np.ndarray  # (rows,) int32: 128 times the sum of the row's weights
    norms: np.ndarray  # (2 * layers + 1, hidden) float32: before attention and MLP of each layer, and the last
    cos: np.ndarray  # (context, head_dim) float32
    sin: np.ndarray


class Int8Cache(NamedTuple):
    """Keys and values of S slots, C tokens each in blocks of LANES: (layers, S, C / LANES, heads, a block)."""

    keys: np.ndarray  # uint8, 1-D; a block is (D / 4, LANES, 4), D being head_dim padded to LANES
    key_scales: np.ndarray  # float32, 1-D; a block is (LANES,)
    values: np.ndarray  # int8, 1-D; a block is (LANES / 4, D, 4)
    value_scales: np.ndarray
    layers: int
    slots: int
    blocks: int  # of a slot and head: C / LANES


class Float32Cache(NamedTuple):
    """The same without rounding: a block of keys is (head_dim, LANES), of values (LANES, head_dim)."""

    keys: np.ndarray
    values: np.ndarray
    layers: int
    slots: int
    blocks: int


Cache = Int8Cache | Float32Cache


class Scratch(NamedTuple):
    """Room for what a step computes on its way, for T tokens. What is padding stays finite and meets zero weights."""

    hidden: np.ndarray  # (T, hidden) float32, columns padded to TILE, as in all of them
    normed: np.ndarray  # (T, hidden)
    wide: np.ndarray  # (T, 3 * hidden or mlp)
    bytes: np.ndarray  # (T, hidden or mlp) uint8: the input of a matmul
    scales: np.ndarray  # (T,) float32: of `bytes`
    order: np.ndarray  # (T,) int64: 0, 1, 2, ...
    query: np.ndarray  # (heads * head_dim,) int8: of one token, like the following
    factors: np.ndarray  # (heads,) float32
    offsets: np.ndarray  # (heads,) int32
    sums: np.ndarray  # (heads * 2 * head_dim,) int32, zeros between tokens
    scores: np.ndarray  # (heads * context,) float32
    high: np.ndarray  # (heads * context,) uint8
    low: np.ndarray
    penalized: np.ndarray  # (1, vocab) float32
    weights: np.ndarray  # (vocab,) float32, of tokens to draw from
    candidates: np.ndarray  # (vocab,) int32
    masses: np.ndarray  # (vocab,) float32


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def describe() -> str:
    """The instructions that dot products of bytes are compiled to, for people."""
    return f"numba, {emitter.dot_product()}"


# --- made once


def prepare(config: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> Weights:
    """Pack a model's int8 matrices. Raises ValueError when they are not int8."""

    def matrix(*names: str) -> list[QuantizedMatrix]:
        parts = [tensors[name] for name in names]
        quantized = [part for part in parts if isinstance(part, QuantizedMatrix)]
        if len(quantized) < len(parts):
            raise ValueError("the weights are float32: the numba kernels need int8 ones, the numpy kernels take both")
        return quantized

    matrices, norms = [], []
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        matrices.append(matrix(*(f"{layer}self_attn.{name}_proj.weight" for name in "qkv")))
        matrices.append(matrix(layer + "self_attn.o_proj.weight"))
        matrices.append(matrix(layer + "mlp.up_proj.weight"))
        matrices.append(matrix(layer + "mlp.down_proj.weight"))
        norms += [tensors[layer + "input_layernorm.weight"], tensors[layer + "post_attention_layernorm.weight"]]
    matrices.append(matrix("model.embed_tokens.weight"))
    norms.append(tensors["model.norm.weight"])
    sizes = [(sum(len(part.values) for part in parts), parts[0].values.shape[1]) for parts in matrices]
    packed = _aligned_zeros((sum(_padded(n, TILE) * _padded(width, 4) for n, width in sizes),), np.int8)
    scales: list[np.ndarray] = []
    corrections: list[np.ndarray] = []
    at = 0
    for parts, (n, width) in zip(matrices, sizes, strict=True):
        end = at + _padded(n, TILE) * _padded(width, 4)
        tiles = packed[at:end].reshape(-1, _padded(width, 4) // 4, TILE, 4)
        for of_matrix, of_all in zip(_pack(parts, tiles), (scales, corrections), strict=True):
            of_all.append(of_matrix)
        at = end
    cos, sin = rope_tables(config.context, config.head_dim, config.rope_theta)
    return Weights(
        Shape(
            config.hidden_size,
            config.n_layers,
            config.n_heads,
            config.head_dim,
            config.mlp_size,
            config.vocab_size,
            config.norm_eps,
        ),
        shared(packed),
        np.concatenate(scales),
        np.concatenate(corrections),
        np.pad(np.array(norms, np.float32), ((0, 0), (0, _padded(config.hidden_size, LANES) - config.hidden_size))),
        cos,
        sin,
    )


def _pack(parts: list[QuantizedMatrix], tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (out_i, in), stacked along their rows, into their tiles; returns scales and corrections (rows,)."""
    n_tiles, n_steps, _, _ = tiles.shape
    values = np.zeros((n_tiles * TILE, n_steps * 4), np.int8)
    scales = np.zeros(len(values), np.float32)
    row = 0
    for part in parts:
        n, width = part.values.shape
        values[row : row + n, :width], scales[row : row + n] = part.values, part.scale
        row += n
    tiles[...] = values.reshape(n_tiles, TILE, n_steps, 4).transpose(0, 2, 1, 3)
    return scales, 128 * values.sum(axis=1, dtype=np.int32)


def _aligned_zeros(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Zeros that begin on a cache line, in memory that is not touched yet; large arrays in huge pages, where there are.

    The addresses of a KV cache in pages of 4 KB don't fit into the processor's tables: looking them up takes longer
    than the attention's arithmetic.
    """
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        room, boundary = np.zeros(size + CACHE_LINE, np.uint8), CACHE_LINE
    else:
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them says so
            pages.madvise(mmap.MADV_HUGEPAGE)
        room, boundary = np.frombuffer(pages, np.uint8), HUGE_PAGE
    start = -room.ctypes.data % boundary
    return room[start : start + size].view(kind).reshape(shape)


def make_cache(config: ModelConfig, n_slots: int, precision: str) -> Int8Cache | Float32Cache:
    n_blocks = -(-config.context // LANES)
    tokens = config.n_layers * n_slots * config.n_heads * n_blocks * LANES
    if precision == "float32":
        keys, values = (_aligned_zeros((tokens * config.head_dim,), np.float32) for _ in range(2))
        return Float32Cache(keys, values, config.n_layers, n_slots, n_blocks)
    size = tokens * _padded(config.head_dim, LANES)
    key_scales, value_scales = (_aligned_zeros((tokens,), np.float32) for _ in range(2))
    return Int8Cache(
        keys=_aligned_zeros((size,), np.uint8),
        key_scales=key_scales,
        values=_aligned_zeros((size,), np.int8),
        value_scales=value_scales,
        layers=config.n_layers,
        slots=n_slots,
        blocks=n_blocks,
    )


def make_scratch(config: ModelConfig, n_tokens: int, n_rows: int) -> Scratch:
    hidden, mlp = _padded(config.hidden_size + LANES, TILE), _padded(config.mlp_size, TILE)  # a head may overhang
    wide = max(_padded(3 * config.hidden_size + LANES, TILE), mlp)
    vocab, context = _padded(config.vocab_size, TILE), _padded(config.context, LANES)

    def floats(*shape: int) -> np.ndarray:
        return _aligned_zeros(shape, np.float32)

    return Scratch(
        hidden=floats(n_tokens, hidden),
        normed=floats(n_tokens, hidden),
        wide=floats(n_tokens, wide),
        bytes=_aligned_zeros((n_tokens, max(hidden, mlp)), np.uint8),
        scales=floats(n_tokens),
        order=np.arange(n_tokens),
        query=np.zeros(config.n_heads * _padded(config.head_dim, LANES), np.int8),
        factors=floats(config.n_heads),
        offsets=np.zeros(config.n_heads, np.int32),
        sums=np.zeros(2 * config.n_heads * _padded(config.head_dim, LANES), np.int32),
        scores=floats(config.n_heads * context),
        high=np.zeros(config.n_heads * context, np.uint8),
        low=np.zeros(config.n_heads * context, np.uint8),
        penalized=floats(1, vocab),
        weights=floats(vocab),
        candidates=np.zeros(vocab, np.int32),
        masses=floats(vocab),
    )


# --- matmuls


@njit(**OPTIONS)
def _linear(x, n_tokens, n_in, weights, at, row, n_out, out, add, scratch, exact):
    """out[:n_tokens, :n_out] (+)= x (T, n_in) times the matrix whose tiles begin at byte `at` and whose rows at `row`.

    Returns where the next matrix begins: at, row.
    """
    if exact:
        return _multiply_exact(x, n_tokens, n_in, weights, at, row, n_out, out, add, scratch)
    _round(x, n_tokens, n_in, scratch)
    return _multiply(n_tokens, n_in, weights, at, row, n_out, out, add, scratch)


@njit(**OPTIONS)
def _round(x, n_tokens, n_columns, scratch):
    """x (T, n_columns) to bytes and a scale a token, in `scratch`."""
    n_blocks = (n_columns + LANES - 1) // LANES
    for t in range(n_tokens):
        at, out_at = t * x.shape[1], t * scratch.bytes.shape[1]
        scratch.scales[t] = simd.round_to_bytes(x, at, n_blocks, scratch.bytes, out_at)


@njit(**OPTIONS)
def _multiply(n_tokens, n_in, weights, at, row, n_out, out, add, scratch):
    """The bytes in `scratch` times a matrix. A tile of weights is read once, for all tokens."""
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


@njit(**OPTIONS)
def _multiply_exact(x, n_tokens, n_in, weights, at, row, n_out, out, add, scratch):
    """x (T, n_in), not rounded, times a matrix."""
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


@njit(**OPTIONS)
def _embed(ids, n_tokens, shape, weights, at, row, out):
    """out (T, hidden): rows of the matrix whose tiles begin at byte `at`."""
    n_steps = (shape.hidden + 3) // 4
    for t in range(n_tokens):
        tile, lane = ids[t] // TILE, ids[t] % TILE
        first = at + tile * TILE * 4 * n_steps + lane * 4
        scale = weights.scales[row + ids[t]]
        for k in range(shape.hidden):
            out[t, k] = weights.packed[first + k // 4 * (4 * TILE) + k % 4] * scale


@njit(**OPTIONS)
def _rms_norm(x, sources, n_rows, norms, which, n, eps, out):
    """out[i] = x[j] / sqrt(mean(x[j]^2) + eps) * norms[which] (Zhang & Sennrich 2019), j being sources[i]."""
    n_blocks = (n + LANES - 1) // LANES
    for i in range(n_rows):
        row = sources[i] * x.shape[1]
        mean = simd.sum_of_squares(x, row, n_blocks) / np.float32(n)
        factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
        simd.scale_by(x, row, factor, norms, which * norms.shape[1], out, i * out.shape[1], n_blocks)


# --- attention; `slots_at` is a layer's first slot among all layers' slots


@njit(**OPTIONS)
def _rotate(x, n_tokens, positions, shape, cos, sin):
    """Rotate queries and keys in x (T, ...) by their positions (Su et al. 2021, halves as in GPT-NeoX)."""
    half = shape.head_dim // 2
    for t in range(n_tokens):
        position = positions[t]
        for head in range(2 * shape.heads):
            column = head * shape.head_dim
            simd.rotate(x, t * x.shape[1] + column, half, cos, sin, position * cos.shape[1], half // LANES)
            for i in range(half // LANES * LANES, half):
                a, b = x[t, column + i], x[t, column + half + i]
                x[t, column + i] = a * cos[position, i] - b * sin[position, i]
                x[t, column + half + i] = b * cos[position, i] + a * sin[position, i]


@njit(**OPTIONS)
def _store_int8(qkv, n_tokens, slots, positions, shape, cache, slots_at):
    """Round the tokens' keys and values and put them into the cache."""
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


@njit(**OPTIONS)
def _attend_int8(qkv, n_tokens, slots, positions, shape, cache, slots_at, scratch, out):
    """out (T, hidden): attention of each token's queries over its sequence's tokens up to itself.

    Keys and values are read in the order in which they lie in the cache, all heads of a block of tokens at a time.
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


@njit(**OPTIONS)
def _store_float32(qkv, n_tokens, slots, positions, shape, cache, slots_at):
    size, heads, hidden = shape.head_dim, shape.heads, shape.heads * shape.head_dim
    for t in range(n_tokens):
        block, lane = positions[t] // LANES, positions[t] % LANES
        first = ((slots_at + slots[t]) * cache.blocks + block) * heads
        for h in range(heads):
            at = (first + h) * LANES * size
            for i in range(size):
                cache.keys[at + i * LANES + lane] = qkv[t, hidden + h * size + i]
                cache.values[at + lane * size + i] = qkv[t, 2 * hidden + h * size + i]


@njit(**OPTIONS)
def _attend_float32(qkv, n_tokens, slots, positions, shape, cache, slots_at, scratch, out):
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
            total = _soften(scores, length)
            for i in range(size):
                out[t, h * size + i] = np.float32(0)
            for block in range(n_blocks):
                at = (first + block * heads + h) * LANES * size
                for lane in range(min(LANES, length - block * LANES)):
                    weight = scores[block * LANES + lane] / total
                    for i in range(size):
                        out[t, h * size + i] += weight * values[at + lane * size + i]


@njit(**OPTIONS)
def _soften(scores, length):
    """exp(scores - their maximum) in place, up to the end of the vector; returns the sum."""
    greatest = scores[0]
    for i in range(1, length):
        greatest = max(greatest, scores[i])
    n_blocks = (length + LANES - 1) // LANES
    for i in range(length, n_blocks * LANES):
        scores[i] = NEVER
    return simd.exponentials(scores, 0, n_blocks, greatest, np.float32(1), scores)


# --- sampling


@njit(**OPTIONS)
def _sample(batch, n_rows, scratch):
    """The next token of each row: `tinylm.kernels.numpy.sample`, with probabilities in float32."""
    weights, candidates, masses = scratch.weights, scratch.candidates, scratch.masses
    n_vocab, n_columns = batch.seen.shape[1], batch.logits.shape[1]
    n_blocks = n_columns // LANES
    for r in range(n_rows):
        slot = batch.slots[batch.rows[r]]
        scores, at = batch.logits, r * n_columns
        for i in range(n_vocab, n_columns):  # padding, which becomes 0 below
            scores[r, i] = NEVER
        if batch.penalty[slot] != 1:
            _penalize(scores, r, batch.seen, slot, np.float32(batch.penalty[slot]), scratch.penalized)
            scores, at = scratch.penalized, 0
        greatest = simd.largest(scores, at, n_blocks)
        if batch.temperature[slot] == 0:
            chosen = 0
            while chosen + 1 < n_vocab and scores[at // n_columns, chosen] != greatest:
                chosen += 1
        else:
            factor = np.float32(min(1 / batch.temperature[slot], GREATEST_FACTOR))
            total = simd.exponentials(scores, at, n_blocks, greatest, factor, weights)
            top_k, top_p, min_p = batch.top_k[slot], batch.top_p[slot], batch.min_p[slot]
            n = _likeliest(weights, n_blocks, total, top_k, top_p, min_p, candidates, masses)
            chosen = _draw(candidates, masses, n, batch.uniforms[r])
        batch.chosen[r] = chosen


@njit(**OPTIONS)
def _penalize(scores, row, seen, slot, penalty, out):
    """out[0] = scores[row], those of seen tokens divided by the penalty if positive, else multiplied."""
    for i in range(seen.shape[1]):
        score = scores[row, i]
        if seen[slot, i]:
            score = score / penalty if score > 0 else score * penalty
        out[0, i] = score
    for i in range(seen.shape[1], scores.shape[1]):
        out[0, i] = NEVER


@njit(**OPTIONS)
def _likeliest(weights, n_blocks, total, top_k, top_p, min_p, candidates, masses):
    """The tokens that the settings keep, in the order of their ids: how many; they fill `candidates` and `masses`.

    weights: of all tokens, the likeliest's 1, adding up to `total`. Those above a bound are gathered first, a lower
    bound being tried when they are too few: a nucleus is small, and so nothing is ever sorted.
    """
    truncates = top_k > 0 or top_p < 1 or min_p > 0
    bound = np.float32(1 / 64) if truncates else NOTHING
    while True:
        n = simd.gather(weights, n_blocks, bound, candidates, masses)
        mass = _total(masses, n)
        enough = n >= top_k if top_k > 0 else mass >= top_p * total
        if enough or bound == NOTHING or (bound <= min_p and (top_k == 0 or top_p == 1)):
            break
        bound = max(bound / np.float32(4096), NOTHING)
    if 0 < top_k < n:
        n = _keep(candidates, masses, n, np.float32(top_k), True)
    if top_p < 1:
        if top_k > 0:
            total = _total(masses, n)
        n = _keep(candidates, masses, n, np.float32(top_p) * total, False)
    if min_p > 0:
        n = simd.keep(candidates, masses, (n + LANES - 1) // LANES, np.float32(min_p))
        _total(masses, n)
    return n


@njit(**OPTIONS)
def _total(masses, n):
    """The sum of the first n; zeros are written behind them, to the end of the vector."""
    n_blocks = (n + LANES - 1) // LANES
    for i in range(n, n_blocks * LANES):
        masses[i] = 0
    return simd.total(masses, 0, n_blocks)


@njit(**OPTIONS)
def _keep(candidates, masses, n, wanted, counts):
    """Keep the fewest of the likeliest whose masses (or numbers, if `counts`) reach `wanted`; of equal ones the first.

    Behind the n masses are zeros, to the end of the vector, and so they are afterwards. Returns how many are kept.
    """
    n_blocks = (n + LANES - 1) // LANES
    bound = max(simd.threshold(masses, n_blocks, wanted, counts), NOTHING)
    n = simd.keep(candidates, masses, n_blocks, bound)
    mass = _total(masses, n)
    surplus = n - int(wanted) if counts else int((mass - wanted) / bound)
    if surplus > 0:  # as many of those at the bound are not needed
        equal = 0
        for i in range(n):
            equal += masses[i] == bound
        needed = equal - min(surplus, equal - 1)
        kept = 0
        for i in range(n):
            if masses[i] > bound or needed > 0:
                needed -= masses[i] == bound
                candidates[kept], masses[kept] = candidates[i], masses[i]
                kept += 1
        n = kept
        _total(masses, n)
    return n


@njit(**OPTIONS)
def _draw(candidates, masses, n, uniform):
    """The first candidate up to which the masses exceed this share of them all."""
    left = uniform * _total(masses, n)
    for first in range(0, n, LANES):
        block = simd.total(masses, first, 1)
        if block > left or first + LANES >= n:
            for i in range(first, min(first + LANES, n) - 1):
                left -= masses[i]
                if left < 0:
                    return candidates[i]
            return candidates[min(first + LANES, n) - 1]
        left -= block
    return candidates[n - 1]


# --- a step


def _make_pass(exact):
    """The forward pass; `exact` is settled when it is compiled, so that each cache meets its own functions only."""

    @njit(**OPTIONS)
    def forward_pass(weights, cache, scratch, batch, n_tokens, n_rows):
        shape = weights.shape
        hidden, width = shape.hidden, shape.heads * shape.head_dim
        x, normed, wide = scratch.hidden, scratch.normed, scratch.wide
        last_at = len(weights.packed) - (shape.vocab + TILE - 1) // TILE * TILE * ((hidden + 3) // 4 * 4)
        last_row = len(weights.scales) - (shape.vocab + TILE - 1) // TILE * TILE
        _embed(batch.ids, n_tokens, shape, weights, last_at, last_row, x)
        at = row = 0
        slots, positions = batch.slots, batch.positions
        for layer in range(shape.layers):
            slots_at = layer * cache.slots
            _rms_norm(x, scratch.order, n_tokens, weights.norms, 2 * layer, hidden, shape.eps, normed)
            at, row = _linear(normed, n_tokens, hidden, weights, at, row, 3 * width, wide, False, scratch, exact)
            _rotate(wide, n_tokens, positions, shape, weights.cos, weights.sin)
            if exact:
                _store_float32(wide, n_tokens, slots, positions, shape, cache, slots_at)
                _attend_float32(wide, n_tokens, slots, positions, shape, cache, slots_at, scratch, normed)
            else:
                _store_int8(wide, n_tokens, slots, positions, shape, cache, slots_at)
                _attend_int8(wide, n_tokens, slots, positions, shape, cache, slots_at, scratch, normed)
            at, row = _linear(normed, n_tokens, width, weights, at, row, hidden, x, True, scratch, exact)
            _rms_norm(x, scratch.order, n_tokens, weights.norms, 2 * layer + 1, hidden, shape.eps, normed)
            at, row = _linear(normed, n_tokens, hidden, weights, at, row, shape.mlp, wide, False, scratch, exact)
            for t in range(n_tokens):
                simd.gelu(wide, t * wide.shape[1], (shape.mlp + LANES - 1) // LANES, wide)
            at, row = _linear(wide, n_tokens, shape.mlp, weights, at, row, hidden, x, True, scratch, exact)
        _rms_norm(x, batch.rows, n_rows, weights.norms, 2 * shape.layers, hidden, shape.eps, normed)
        _linear(normed, n_rows, hidden, weights, at, row, shape.vocab, batch.logits, False, scratch, exact)

    return forward_pass


_pass_int8, _pass_float32 = _make_pass(exact=False), _make_pass(exact=True)


def _make_run(exact, source):
    """What Python calls, kept on disk by Numba: the forward pass, and if `samples`, the choice of tokens.

    Numba takes a kept file for stale when this module has changed or what the function closes over; `source`, a hash
    of the modules below, is closed over for that alone.
    """

    def run(samples, weights, cache, scratch, batch, n_tokens, n_rows):
        if source:
            if exact:
                _pass_float32(weights, cache, scratch, batch, n_tokens, n_rows)
            else:
                _pass_int8(weights, cache, scratch, batch, n_tokens, n_rows)
            if samples:
                _sample(batch, n_rows, scratch)

    try:
        return njit(cache=True, **OPTIONS)(run)
    except RuntimeError:  # there is no place to keep anything: each process compiles for itself
        return njit(**OPTIONS)(run)


# What Numba does not look at, and compiles in all the same: it would run old code after a change there.
_SOURCE = hashlib.sha256(
    b"".join(Path(str(m.__file__)).read_bytes() for m in (tinylm.batch, simd, emitter))
).hexdigest()
_RUN_INT8, _RUN_FLOAT32 = _make_run(exact=False, source=_SOURCE), _make_run(exact=True, source=_SOURCE)


def _run_for(cache: Cache):
    return _RUN_INT8 if isinstance(cache, Int8Cache) else _RUN_FLOAT32


def forward(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Put the batch's tokens through the model and into the cache; batch.logits gets the scores of its rows."""
    _run_for(cache)(False, weights, cache, scratch, batch, n_tokens, n_rows)


def step(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """`forward`, then `sample`, in one compiled call."""
    _run_for(cache)(True, weights, cache, scratch, batch, n_tokens, n_rows)


def sample(scratch: Scratch, batch: Batch, n_rows: int) -> None:
    """batch.chosen: a token for each row of batch.logits, as `tinylm.kernels.numpy.sample` chooses it."""
    _sample(batch, n_rows, scratch)


def warm_up(weights: Weights, cache: Cache, scratch: Scratch, batch: Batch) -> Callable[[int, int], None]:
    """Compile all that a step needs, or load what was compiled before: seconds the first time, then a moment.

    Processes that start together take turns, so that the first compiles and the others load. Returns `step` for these
    arrays, (n_tokens, n_rows) -> None, which is called without looking at their types again: that takes 10 us.
    """
    run = _run_for(cache)
    arguments = (True, weights, cache, scratch, batch)
    kept_in = run.stats.cache_path
    with FileLock(Path(kept_in) / "tinylm.lock") if kept_in else nullcontext():
        run(*arguments, 0, 0)
    types = tuple(map(run.typeof_pyval, (*arguments, 0, 0)))
    return partial(run.overloads[types].entry_point, *arguments)


def measure_peak() -> float:
    """Products of bytes that this core adds up in a second of CPU time, at most."""
    sums = np.arange(LANES, dtype=np.int32)
    _multiply_adds(1, sums)
    rounds = 1_000_000
    best = 0.0
    for _ in range(5):
        begin = time.thread_time()
        n = rounds * _multiply_adds(rounds, sums)
        best = max(best, n / (time.thread_time() - begin))
    return best


@njit(**OPTIONS)
def _multiply_adds(n, sums):
    return simd.multiply_adds(n, sums)


def copy_prefix(cache: Cache, source: int, target: int, n: int) -> None:
    """Give one slot the keys and values of another's first `n` tokens (and of those that share their last block)."""
    n_blocks = -(-n // LANES)
    for array in cache:
        if isinstance(array, np.ndarray):
            blocks = array.reshape(
                -1, cache.slots, cache.blocks, array.size // (cache.layers * cache.slots * cache.blocks)
            )
            blocks[:, target, :n_blocks] = blocks[:, source, :n_blocks]


def weight_bytes(weights: Weights) -> int:
    """What a step reads of the weights."""
    return sum(array.nbytes for array in (weights.packed, weights.scales, weights.corrections, weights.norms))


def cache_bytes(cache: Cache) -> int:
    return sum(array.nbytes for array in cache if isinstance(array, np.ndarray))
