"""The transformer's arithmetic in plain NumPy: the reference for the compiled kernels.

Weights are float32, since NumPy multiplies integer matrices slowly. Precision "int8" rounds where the compiled kernels
round, to whole numbers that are stored as float32. Precision "float32" rounds nothing.

Shapes: T tokens and R rows of a batch, L tokens of one sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.kernels.batch import Batch
from tinylm.weights import QuantizedMatrix, Tensor

GELU_CUBIC = np.float32(0.044715)
GELU_SCALE = np.float32(np.sqrt(2 / np.pi))
LEAST_TEMPERATURE = 1e-30  # a lower temperature gives the same tokens


class Matrix(NamedTuple):
    """A matrix of weights: values * scale[:, None]."""

    values: np.ndarray  # (out, in) float32
    scale: np.ndarray  # (out,) float32


class Layer(NamedTuple):
    """The weights of one layer."""

    attention_norm: np.ndarray  # (hidden,)
    qkv: Matrix  # (3 * hidden, hidden)
    out: Matrix  # (hidden, hidden)
    mlp_norm: np.ndarray  # (hidden,)
    up: Matrix  # (mlp, hidden)
    down: Matrix  # (hidden, mlp)


class Weights(NamedTuple):
    """A model's weights, and whether its arithmetic rounds."""

    config: ModelConfig
    rounds: bool  # precision "int8"
    embedding: Matrix  # (vocab, hidden)
    layers: list[Layer]
    norm: np.ndarray  # (hidden,)
    cos: np.ndarray  # (context, head_dim)
    sin: np.ndarray  # (context, head_dim)


class LayerRun(NamedTuple):
    """What one layer computes for T tokens: the inputs of its four matmuls, its queries, keys and output."""

    qkv: np.ndarray  # (T, hidden): the input of the matmul with `Layer.qkv`; the same for `out`, `up` and `down`
    queries: np.ndarray  # (T, heads, head_dim): rotated; with precision "int8" also rounded; the same for `keys`
    keys: np.ndarray  # (T, heads, head_dim)
    out: np.ndarray  # (T, hidden)
    up: np.ndarray  # (T, hidden)
    down: np.ndarray  # (T, mlp)
    output: np.ndarray  # (T, hidden): the residual stream after the layer


class KVCache(NamedTuple):
    """Keys and values of all slots. The operating system allocates a slot's memory when the slot is first used."""

    keys: np.ndarray  # (layers, slots, heads, context, head_dim) float32
    values: np.ndarray  # (layers, slots, heads, context, head_dim) float32


# --- preparation


def describe() -> str:
    """Return the name of these kernels."""
    return "numpy"


def prepare(config: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> Weights:
    """Convert a model's tensors, int8 or float32, to float32 matrices."""

    def matrix(*names: str) -> Matrix:
        parts = [tensors[name] for name in names]
        values = [p.values if isinstance(p, QuantizedMatrix) else p for p in parts]  # (out_i, in) each
        scales = [p.scale if isinstance(p, QuantizedMatrix) else np.ones(len(p)) for p in parts]  # (out_i,) each
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
    """Return cos and sin of the rotary angles, (context, head_dim) float32 each (Su et al. 2021).

    The angle of position p and pair i is p / theta^(2 i / head_dim). Both halves of a head have the same angles.
    """
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,)
    angles = np.outer(np.arange(context), inverse)  # (context, head_dim / 2)
    angles = np.concatenate([angles, angles], axis=1)  # (context, head_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def make_cache(config: ModelConfig, n_slots: int, precision: str) -> KVCache:
    """Allocate the keys and values of `n_slots` sequences."""
    shape = (config.n_layers, n_slots, config.n_heads, config.context, config.head_dim)
    return KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def weight_bytes(weights: Weights) -> int:
    """Return how many bytes of weights one step reads."""
    matrices = [matrix for layer in weights.layers for matrix in (layer.qkv, layer.out, layer.up, layer.down)]
    return sum(matrix.values.nbytes for matrix in (*matrices, weights.embedding))


def cache_bytes(cache: KVCache) -> int:
    """Return the size of the cache in bytes."""
    return cache.keys.nbytes + cache.values.nbytes


def copy_prefix(cache: KVCache, source: int, target: int, n: int) -> None:
    """Copy the keys and values of the first `n` tokens of slot `source` to slot `target`."""
    for array in cache:  # (layers, slots, heads, context, head_dim)
        array[:, target, :, :n] = array[:, source, :, :n]


def measure_peak() -> float:
    """Return the most float32 multiply-adds that one core does per CPU second, measured on a large matmul."""
    a = np.ones((768, 768), np.float32)
    best = 0.0
    for _ in range(10):
        begin = time.thread_time()
        a @ a
        best = max(best, a.shape[0] ** 3 / (time.thread_time() - begin))
    return best


def make_scratch(config: ModelConfig, n_tokens: int, n_rows: int) -> None:
    """Allocate nothing: NumPy allocates its intermediate results itself."""


def warm_up(weights: Weights, cache: KVCache, scratch: None, batch: Batch) -> Callable[[int, int], None]:
    """Return `step` for these arrays, (n_tokens, n_rows) -> None. There is nothing to compile."""
    return partial(step, weights, cache, scratch, batch)


# --- the forward pass


def forward(weights: Weights, cache: KVCache, scratch: None, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Run the batch's tokens through the model, and write the logits of its rows to batch.logits."""
    x = embed(weights, batch.ids[:n_tokens])  # (T, hidden)
    for layer in run_layers(weights, cache, batch, n_tokens, x):
        x = layer.output
    batch.logits[:n_rows, : weights.config.vocab_size] = unembed(weights, x[batch.rows[:n_rows]])


def embed(weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Return the embedding (T, hidden) of token ids (T,)."""
    return weights.embedding.values[ids] * weights.embedding.scale[ids, None]


def run_layers(weights: Weights, cache: KVCache, batch: Batch, n_tokens: int, x: np.ndarray) -> Iterator[LayerRun]:
    """Run the batch's tokens through the layers, and yield what each layer computes. `tinylm.explain` shows it.

    x: (T, hidden), the embedding of the tokens.
    """
    config, rounds = weights.config, weights.rounds
    slots, positions = batch.slots[:n_tokens], batch.positions[:n_tokens]  # (T,) each
    starts = [t for t in range(n_tokens) if t == 0 or slots[t] != slots[t - 1]]  # the first token of each sequence
    chunks = list(zip(starts, [*starts[1:], n_tokens], strict=True))
    cos, sin = weights.cos[positions], weights.sin[positions]  # (T, head_dim)
    for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
        qkv_input = rms_norm(x, layer.attention_norm, config.norm_eps)  # (T, hidden)
        qkv = linear(qkv_input, layer.qkv, rounds)  # (T, 3 * hidden)
        qkv = qkv.reshape(n_tokens, 3 * config.n_heads, config.head_dim)
        rotated = rotate(qkv[:, : 2 * config.n_heads], cos, sin)  # (T, 2 * heads, head_dim)
        q, k, v = rotated[:, : config.n_heads], rotated[:, config.n_heads :], qkv[:, 2 * config.n_heads :]
        if rounds:
            q, k, v = (rounded * scale for rounded, scale in map(round_to_int8, (q, k, v)))  # (T, heads, head_dim)
        attended = np.empty((n_tokens, config.n_heads, config.head_dim), np.float32)
        for first, last in chunks:
            slot, start, end = slots[first], positions[first], positions[last - 1] + 1
            keys[slot, :, start:end] = k[first:last].transpose(1, 0, 2)  # (heads, n, head_dim)
            values[slot, :, start:end] = v[first:last].transpose(1, 0, 2)
            attended[first:last] = attention(q[first:last], keys[slot, :, :end], values[slot, :, :end])
        out_input = attended.reshape(n_tokens, -1)  # (T, hidden)
        x = x + linear(out_input, layer.out, rounds)
        up_input = rms_norm(x, layer.mlp_norm, config.norm_eps)  # (T, hidden)
        down_input = gelu(linear(up_input, layer.up, rounds))  # (T, mlp)
        x = x + linear(down_input, layer.down, rounds)
        yield LayerRun(qkv_input, q, k, out_input, up_input, down_input, x)


def unembed(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Return the logits (R, vocab) of the token after each row of the residual stream x (R, hidden)."""
    return linear(rms_norm(x, weights.norm, weights.config.norm_eps), weights.embedding, weights.rounds)


def round_to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round x (..., n) to whole numbers from -127 to 127 times a scale (..., 1), which is max(abs(x)) / 127.

    Return the whole numbers as float32, and the scale.
    """
    largest = np.abs(x).max(axis=-1, keepdims=True)  # (..., 1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)  # (..., 1)
    return np.floor(x * inverse + np.float32(0.5)), largest * np.float32(1 / 127)


def linear(x: np.ndarray, weight: Matrix, rounds: bool) -> np.ndarray:
    """Return x (T, in) times the transpose of weight (out, in), which is (T, out).

    rounds: round x to 8 bits first, with one scale a token. float32 holds sums of up to 1,040 products of 8-bit numbers
    exactly, since they stay below 2^24.
    """
    if rounds:
        x, scale = round_to_int8(x)  # (T, in), (T, 1)
        return (x @ weight.values.T) * (weight.scale * scale)
    return (x @ weight.values.T) * weight.scale


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Return x / sqrt(mean(x^2) + eps) * weight for x (T, n) and weight (n,) (Zhang & Sennrich 2019)."""
    mean_square = np.einsum("th,th->t", x, x) / np.float32(x.shape[1])  # (T,)
    return x * (1 / np.sqrt(mean_square + np.float32(eps)))[:, None] * weight


def gelu(x: np.ndarray) -> np.ndarray:
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), element by element (Hendrycks & Gimpel 2016)."""
    return (np.tanh((x * x * GELU_CUBIC + 1) * x * GELU_SCALE) + 1) * x * np.float32(0.5)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x (T, heads, head_dim) by the angles of its tokens, given as cos and sin (T, head_dim) (Su et al. 2021).

    Element i of the first half and element i of the second half form a pair, as in GPT-NeoX.
    """
    half = x.shape[-1] // 2
    swapped = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)  # (T, heads, head_dim)
    return x * cos[:, None] + swapped * sin[:, None]


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the causal attention (n, heads, head_dim) of the last n of a sequence's L tokens.

    q (n, heads, head_dim); keys and values (heads, L, head_dim) (Vaswani et al. 2017).
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
    """Choose one token for each row of batch.logits and write it to batch.chosen.

    Apply in turn repetition penalty, bias, temperature, top_k, top_p and min_p, each to the result of the previous one.
    Then choose the first token, in the order of ids, at which the sum of the weights exceeds the row's uniform number
    times their total. Temperature 0 chooses the most likely token, and the lowest id of equal ones.
    """
    for row in range(n_rows):
        slot = batch.slots[batch.rows[row]]
        scores = batch.logits[row, : batch.seen.shape[1]]  # (vocab,)
        scores = penalize(scores, batch.seen[slot], batch.penalty[slot])
        if batch.biased[slot]:
            scores = scores + batch.bias[slot]
        if batch.temperature[slot] == 0:
            batch.chosen[row] = scores.argmax()
            continue
        weights = soften(scores, batch.temperature[slot])
        weights = keep(weights, batch.top_k[slot], batch.top_p[slot], batch.min_p[slot])
        batch.chosen[row] = draw(weights, batch.uniforms[row])


def penalize(scores: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide the positive scores of seen tokens by the penalty, multiply the negative ones (Keskar et al. 2019).

    scores (vocab,), seen (vocab,) bool. Return the new scores (vocab,).
    """
    factor = np.float32(penalty)
    return np.where(seen, np.where(scores > 0, scores / factor, scores * factor), scores)


def soften(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return e^(score / temperature), divided by the largest of these. scores (vocab,); the result is float64.

    temperature: above 0. These weights are proportional to probabilities.
    """
    shifted = scores.astype(np.float64) - scores.max()
    return np.exp(shifted / max(temperature, LEAST_TEMPERATURE))


def keep(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Return the weights (vocab,), with zeros for the tokens that the settings remove.

    The most likely token has weight 1. Of equal tokens the lower ids are kept.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    top_p: keep the fewest of the most likely tokens whose share is at least this (Holtzman et al. 2019).
    min_p: keep the tokens with at least this weight (Nguyen et al. 2024).
    """
    order = np.argsort(-weights, kind="stable")  # (vocab,): token ids, the most likely first
    ranked = weights[order]  # (vocab,): descending
    if top_k > 0:
        ranked[top_k:] = 0
    if top_p < 1:
        cumulative = np.cumsum(ranked)
        n_below = np.searchsorted(cumulative, top_p * cumulative[-1])  # how many leading sums are too small
        ranked[n_below + 1 :] = 0
    ranked[ranked < min_p] = 0
    kept = np.empty_like(weights)
    kept[order] = ranked
    return kept


def draw(weights: np.ndarray, uniform: float) -> int:
    """Return the first token at which the sum of the weights (vocab,) exceeds `uniform`, in [0, 1), times their total.

    The sum goes in the order of the ids.
    """
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def step(weights: Weights, cache: KVCache, scratch: None, batch: Batch, n_tokens: int, n_rows: int) -> None:
    """Call `forward`, then `sample`."""
    forward(weights, cache, scratch, batch, n_tokens, n_rows)
    sample(scratch, batch, n_rows)
