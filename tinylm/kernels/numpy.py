"""The transformer's arithmetic in plain NumPy: the reference that any faster kernel must equal.

Weights are held as float32 (NumPy's integer matmul is not BLAS, so int8 would be slower). Precision "int8" rounds
where the compiled kernels do, to 8-bit numbers held as float32, and so tells what they compute; "float32" rounds
nothing. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from tinylm.batch import Batch
from tinylm.config import ModelConfig
from tinylm.weights import QuantizedMatrix, Tensor

GELU_CUBIC = np.float32(0.044715)
GELU_SCALE = np.float32(np.sqrt(2 / np.pi))
LEAST_TEMPERATURE = 1e-30  # anything lower draws as this does
FEW = 256  # the likeliest tokens, looked at first


class Matrix(NamedTuple):
    """A matrix of weights: values (out, in) times a scale (out,) a row."""

    values: np.ndarray
    scale: np.ndarray


class Layer(NamedTuple):
    attention_norm: np.ndarray  # (hidden,)
    qkv: Matrix  # (3 * hidden, hidden)
    out: Matrix  # (hidden, hidden)
    mlp_norm: np.ndarray  # (hidden,)
    up: Matrix  # (mlp, hidden)
    down: Matrix  # (hidden, mlp)


class Weights(NamedTuple):
    config: ModelConfig
    rounds: bool  # precision "int8"
    embedding: Matrix  # (vocab, hidden)
    layers: list[Layer]
    norm: np.ndarray  # (hidden,)
    cos: np.ndarray  # (context, head_dim)
    sin: np.ndarray


class KVCache(NamedTuple):
    """Memory is touched as sequences grow into it: an unused slot costs address space only."""

    keys: np.ndarray  # (layers, slots, heads, context, head_dim) float32
    values: np.ndarray


def describe() -> str:
    """How it computes, for people."""
    return "numpy"


# --- made once


def prepare(config: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> Weights:
    def matrix(*names: str) -> Matrix:
        parts = [tensors[name] for name in names]
        values = [p.values if isinstance(p, QuantizedMatrix) else p for p in parts]
        scales = [p.scale if isinstance(p, QuantizedMatrix) else np.ones(len(p)) for p in parts]
        return Matrix(np.concatenate(values).astype(np.float32), np.concatenate(scales).astype(np.float32))

    def norm(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float32)

    layers = [
        Layer(
            norm(f"model.layers.{i}.input_layernorm.weight"),
            matrix(*(f"model.layers.{i}.self_attn.{name}_proj.weight" for name in "qkv")),
            matrix(f"model.layers.{i}.self_attn.o_proj.weight"),
            norm(f"model.layers.{i}.post_attention_layernorm.weight"),
            matrix(f"model.layers.{i}.mlp.up_proj.weight"),
            matrix(f"model.layers.{i}.mlp.down_proj.weight"),
        )
        for i in range(config.n_layers)
    ]
    cos, sin = rope_tables(config.context, config.head_dim, config.rope_theta)
    embedding = matrix("model.embed_tokens.weight")
    return Weights(config, precision == "int8", embedding, layers, norm("model.norm.weight"), cos, sin)


def rope_tables(context: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, (context, head_dim) each; the two halves of a head share their angles."""
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(context), inverse)  # (context, head_dim / 2)
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def make_cache(config: ModelConfig, n_slots: int, precision: str) -> KVCache:
    shape = (config.n_layers, n_slots, config.n_heads, config.context, config.head_dim)
    return KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def weight_bytes(weights: Weights) -> int:
    """What a step reads of the weights."""
    matrices = [matrix for layer in weights.layers for matrix in (layer.qkv, layer.out, layer.up, layer.down)]
    return sum(matrix.values.nbytes for matrix in (*matrices, weights.embedding))


def cache_bytes(cache: KVCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes


def copy_prefix(cache: KVCache, source: int, target: int, n: int) -> None:
    """Give one slot the keys and values of another's first `n` tokens."""
    for array in cache:
        array[:, target, :, :n] = array[:, source, :, :n]


def measure_peak() -> float:
    """float32 products that this core adds up in a second of CPU time, at most: those of a large matrix product."""
    a = np.ones((768, 768), np.float32)
    best = 0.0
    for _ in range(10):
        begin = time.thread_time()
        a @ a
        best = max(best, a.shape[0] ** 3 / (time.thread_time() - begin))
    return best


def make_scratch(config: ModelConfig, n_tokens: int, n_rows: int) -> None:
    """NumPy makes its own."""


def warm_up(weights: Weights, cache: KVCache, scratch: None, batch: Batch) -> Callable[[int, int], None]:
    """Nothing to compile. Returns `step` for these arrays, (n_tokens, n_rows) -> None."""
    return partial(step, weights, cache, scratch, batch)


# --- the forward pass


def forward(weights: Weights, cache: KVCache, scratch: None, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Put the batch's tokens through the model and into the cache; batch.logits gets the scores of its rows."""
    config, rounds = weights.config, weights.rounds
    slots, positions = batch.slots[:n_tokens], batch.positions[:n_tokens]
    starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])  # a sequence's tokens stand one after the other
    chunks = list(zip(starts, np.r_[starts[1:], n_tokens], strict=True))
    cos, sin = weights.cos[positions], weights.sin[positions]  # (T, head_dim)
    ids = batch.ids[:n_tokens]
    x = weights.embedding.values[ids] * weights.embedding.scale[ids, None]  # (T, hidden)
    attended = np.empty((n_tokens, config.n_heads, config.head_dim), np.float32)
    for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
        qkv = linear(rms_norm(x, layer.attention_norm, config.norm_eps), layer.qkv, rounds)
        qkv = qkv.reshape(n_tokens, 3 * config.n_heads, config.head_dim)
        rotated = rotate(qkv[:, : 2 * config.n_heads], cos, sin)
        q, k, v = rotated[:, : config.n_heads], rotated[:, config.n_heads :], qkv[:, 2 * config.n_heads :]
        if rounds:
            q, k, v = (rounded * scale for rounded, scale in map(round_to_int8, (q, k, v)))
        for first, last in chunks:
            slot, start, end = slots[first], positions[first], positions[last - 1] + 1
            keys[slot, :, start:end] = k[first:last].transpose(1, 0, 2)
            values[slot, :, start:end] = v[first:last].transpose(1, 0, 2)
            attended[first:last] = attention(q[first:last], keys[slot, :, :end], values[slot, :, :end])
        x = x + linear(attended.reshape(n_tokens, -1), layer.out, rounds)
        hidden = gelu(linear(rms_norm(x, layer.mlp_norm, config.norm_eps), layer.up, rounds))
        x = x + linear(hidden, layer.down, rounds)
    last = rms_norm(x[batch.rows[:n_rows]], weights.norm, config.norm_eps)
    batch.logits[:n_rows, : config.vocab_size] = linear(last, weights.embedding, rounds)


def round_to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (..., n) -> whole numbers of at most 127 (as float32) and a scale (..., 1), whose product is nearly x."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.floor(x * inverse + np.float32(0.5)), largest * np.float32(1 / 127)


def linear(x: np.ndarray, weight: Matrix, rounds: bool) -> np.ndarray:
    """x (T, in) times the transpose of weight (out, in) -> (T, out); `rounds`: of 8-bit x, one scale a token.

    Sums of up to 1,040 products of 8-bit numbers stay below 2^24, so that float32 holds them exactly.
    """
    if rounds:
        x, scale = round_to_int8(x)
        return (x @ weight.values.T) * (weight.scale * scale)
    return (x @ weight.values.T) * weight.scale


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    mean_square = np.einsum("th,th->t", x, x) / np.float32(x.shape[1])
    return x * (1 / np.sqrt(mean_square + np.float32(eps)))[:, None] * weight


def gelu(x: np.ndarray) -> np.ndarray:
    """x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    inner = x * x
    inner *= GELU_CUBIC
    inner += 1
    inner *= x
    inner *= GELU_SCALE
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x (T, heads, head_dim) by its tokens' tables (T, head_dim) (Su et al. 2021, halves as in GPT-NeoX)."""
    half = x.shape[-1] // 2
    swapped = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None] + swapped * sin[:, None]


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence's newest tokens over all that it has cached.

    q (n, heads, head_dim): the last n of the sequence's L tokens. keys, values (heads, L, head_dim).
    Returns (n, heads, head_dim).
    """
    n, _, head_dim = q.shape
    length = keys.shape[1]
    scores = np.matmul(q.transpose(1, 0, 2), keys.transpose(0, 2, 1))  # (heads, n, L)
    scores *= np.float32(head_dim**-0.5)
    if n > 1:
        later = np.arange(length) > np.arange(length - n, length)[:, None]  # (n, L)
        scores[:, later] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, values).transpose(1, 0, 2)


# --- sampling


def sample(scratch: None, batch: Batch, n_rows: int) -> None:
    """batch.chosen: for each row the likeliest token at temperature 0 (the lower id on a tie), else one that is drawn.

    In turn: repetition penalty, temperature, top_k, top_p, min_p, each on what the last left; then the first of the
    tokens that are kept, in the order of their ids, up to which their probabilities exceed the row's uniform number.
    """
    slots = batch.slots[batch.rows[:n_rows]]
    scores = batch.logits[:n_rows, : batch.seen.shape[1]]
    scores = penalize(scores, batch.seen[slots], batch.penalty[slots, None])
    temperature = batch.temperature[slots]
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    weights = np.exp(shifted / np.maximum(temperature, LEAST_TEMPERATURE)[:, None])  # (R, vocab), the likeliest's 1
    keep(weights, batch.top_k[slots], batch.top_p[slots], batch.min_p[slots])
    cumulative = np.cumsum(weights, axis=1)
    drawn = (cumulative <= (batch.uniforms[:n_rows] * cumulative[:, -1])[:, None]).sum(axis=1)
    batch.chosen[:n_rows] = np.where(temperature == 0, scores.argmax(axis=1), drawn)


def penalize(scores: np.ndarray, seen: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Repetition penalty (Keskar et al. 2019): scores of seen tokens are divided by it if positive, else multiplied.

    scores (R, vocab); seen (R, vocab) bool; penalty (R, 1).
    """
    penalty = penalty.astype(np.float32)
    return np.where(seen, np.where(scores > 0, scores / penalty, scores * penalty), scores)


def keep(weights: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> None:
    """Zero the weights (R, vocab) of tokens that the settings (R,) leave out; of equal ones the lower ids are kept.

    top_k: so many of the likeliest, 0 for all. top_p (Holtzman et al. 2019): the fewest of the likeliest that reach
    this share. min_p (Nguyen et al. 2024): those at least this share as likely as the likeliest.
    """
    n = weights.shape[1]
    for row, k, p, least in zip(weights, top_k, top_p, min_p, strict=True):
        if k or p < 1:
            for few in (min(max(FEW, k), n), n):  # the likeliest few are enough, but for flat distributions
                likeliest = np.argpartition(-row, few - 1)[:few] if few < n else np.arange(n)
                bound = row[likeliest].min()
                if few < n and np.count_nonzero(row >= bound) > few:
                    continue  # equal ones were left out, and with them perhaps a lower id
                order = likeliest[np.lexsort((likeliest, -row[likeliest]))]
                if k:
                    order = order[:k]
                reached = np.cumsum(row[order])
                wanted = p * (reached[-1] if k else row.sum())
                if p < 1 and reached[-1] >= wanted:
                    order = order[: np.searchsorted(reached, wanted) + 1]
                    break
                if k:
                    break
            kept = np.zeros(n, bool)
            kept[order] = True
            row[~kept] = 0
        row[row < least] = 0


def step(weights: Weights, cache: KVCache, scratch: None, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """`forward`, then `sample`."""
    forward(weights, cache, scratch, batch, n_tokens, n_rows)
    sample(scratch, batch, n_rows)
