"""The model that all engines run: TinyLM's shape with random weights, which cost the same as trained ones.

Its logits spread as widely as those of a trained model, so samplers find a nucleus of the usual size (about 16 tokens
at temperature 0.8 and top_p 0.95). The embedding of the boundary token is zero, so its logit is 0. All tokens of a
nucleus have far higher logits, so no sequence ends.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinylm.config import ModelConfig
from tinylm.weights import as_float32, load_model, quantize_rows, save_model, tensor_shapes

LOGIT_STD = 4.5
EMBEDDING_STD = 0.5
Tensors = dict[str, np.ndarray]


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Return float32 tensors by name. Their matrices are int8 multiples of a scale, so saving them loses nothing."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
            continue
        std = EMBEDDING_STD if "embed_tokens" in name else shape[1] ** -0.5
        matrix = rng.normal(0, std, shape).astype(np.float32)
        if "embed_tokens" in name:
            matrix[config.boundary_id] = 0
        tensors[name] = quantize_rows(matrix).dequantize()
    tensors["model.norm.weight"] *= LOGIT_STD / (EMBEDDING_STD * config.hidden_size**0.5)
    return tensors


def save_random_model(directory: Path, config: ModelConfig) -> None:
    """Write a model directory whose tokenizer is an empty file: the peers exchange token ids only."""
    save_model(directory, config, random_tensors(config), tokenizer=b"")


def float32_tensors(directory: Path) -> tuple[ModelConfig, Tensors]:
    """Return the config and the float32 tensors of a model directory."""
    config, tensors = load_model(directory)
    return config, {name: as_float32(tensor) for name, tensor in tensors.items()}


def fused_qkv(tensors: Tensors, layer: int) -> np.ndarray:
    """Return (3 * hidden, hidden): the query, key and value projections of a layer as one matrix."""
    return np.concatenate([tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"])


def reference_logits(config: ModelConfig, tensors: Tensors, ids: np.ndarray, activation: str) -> np.ndarray:
    """Return the scores (vocab,) of the token after ids (T,): slowly, in float64, without a cache.

    activation: "gelu" or "relu2".
    """

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        normed: np.ndarray = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_eps)
        return normed * tensors[name]

    x = tensors["model.embed_tokens.weight"][ids].astype(np.float64)  # (T, hidden)
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        qkv = norm(x, layer + "input_layernorm.weight") @ fused_qkv(tensors, i).T
        x = x + _attended(qkv, config) @ tensors[layer + "self_attn.o_proj.weight"].T
        wide = norm(x, layer + "post_attention_layernorm.weight") @ tensors[layer + "mlp.up_proj.weight"].T
        if activation == "gelu":
            wide = 0.5 * wide * (1 + np.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
        else:
            wide = np.maximum(wide, 0) ** 2
        x = x + wide @ tensors[layer + "mlp.down_proj.weight"].T
    logits: np.ndarray = norm(x[-1], "model.norm.weight") @ tensors["model.embed_tokens.weight"].T
    return logits


def _attended(qkv: np.ndarray, config: ModelConfig) -> np.ndarray:
    """(T, 3 * hidden) -> (T, hidden): causal attention with rotary positions."""
    n, half = len(qkv), config.head_dim // 2
    turns = np.exp(1j * np.outer(np.arange(n), config.rope_theta ** (-np.arange(half) / half)))  # (T, head_dim / 2)

    def rotated(x: np.ndarray) -> np.ndarray:  # (n_heads, T, head_dim)
        pairs = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    q, k, v = qkv.reshape(n, 3, config.n_heads, config.head_dim).transpose(1, 2, 0, 3)
    scores = rotated(q) @ rotated(k).swapaxes(1, 2) / config.head_dim**0.5  # (n_heads, T, T)
    scores += np.triu(np.full((n, n), -np.inf), 1)  # nothing attends to later tokens
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended: np.ndarray = shares / shares.sum(axis=-1, keepdims=True) @ v
    return attended.swapaxes(0, 1).reshape(n, config.hidden_size)
