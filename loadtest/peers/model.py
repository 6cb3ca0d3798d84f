"""The model that all engines run: TinyLM's shape with random weights, which costs what a trained one costs.

Its logits spread as far as a trained model's do, so that samplers find a nucleus of the usual size (about 16 tokens at
temperature 0.8 and top_p 0.95). The boundary token's embedding is zero: its logit is 0 in a model whose nucleus begins
far above, so that no sequence ever draws it, and no engine needs to be told to go on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinylm.config import ModelConfig
from tinylm.weights import as_float32, load_model, quantize_rows, save_model, tensor_shapes

LOGIT_STD = 4.5
EMBEDDING_STD = 0.5


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by name, the matrices already on the grid of their int8 form: saving loses nothing more."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
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
    """A model directory, whole but for its tokenizer, which is an empty file: everything here is token ids."""
    save_model(directory, config, random_tensors(config), tokenizer=b"")


def float32_tensors(directory: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A model directory's config and tensors, all in float32."""
    config, tensors = load_model(directory)
    return config, {name: as_float32(tensor) for name, tensor in tensors.items()}


def fused_qkv(tensors: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """(3 * hidden, hidden): a layer's query, key and value projections, which one matmul makes."""
    return np.concatenate([tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"])


def reference_logits(
    config: ModelConfig, tensors: dict[str, np.ndarray], ids: np.ndarray, activation: str
) -> np.ndarray:
    """Scores (vocab,) of the token after ids (T,): slow, float64, no cache. activation: "gelu" or "relu2"."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_eps) * tensors[name]

    def rotated(x: np.ndarray) -> np.ndarray:  # (n_heads, T, head_dim)
        half = config.head_dim // 2
        angles = np.outer(np.arange(len(ids)), config.rope_theta ** (-np.arange(half) / half))  # (T, head_dim / 2)
        pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = tensors["model.embed_tokens.weight"][ids].astype(np.float64)  # (T, hidden)
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        qkv = norm(x, layer + "input_layernorm.weight") @ fused_qkv(tensors, i).T
        q, k, v = qkv.reshape(len(ids), 3, config.n_heads, config.head_dim).transpose(1, 2, 0, 3)
        scores = rotated(q) @ rotated(k).swapaxes(1, 2) / config.head_dim**0.5 + future  # (n_heads, T, T)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = shares / shares.sum(axis=-1, keepdims=True) @ v
        x = x + attended.swapaxes(0, 1).reshape(x.shape) @ tensors[layer + "self_attn.o_proj.weight"].T
        wide = norm(x, layer + "post_attention_layernorm.weight") @ tensors[layer + "mlp.up_proj.weight"].T
        if activation == "gelu":
            wide = 0.5 * wide * (1 + np.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
        else:
            wide = np.maximum(wide, 0) ** 2
        x = x + wide @ tensors[layer + "mlp.down_proj.weight"].T
    return norm(x[-1], "model.norm.weight") @ tensors["model.embed_tokens.weight"].T
