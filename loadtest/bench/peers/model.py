"""The model that all engines run: TinyLM's shape with random weights, which cost the same as trained ones.

Its logits spread as widely as those of a trained model, so samplers find a nucleus of the usual size (about 16 tokens
at temperature 0.8 and top_p 0.95). The embedding of the boundary token is zero, so its logit is 0. All tokens of a
nucleus have far higher logits, so no sequence ends.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np

from tinylm.config import ModelConfig
from tinylm.kernels import numpy as kernels
from tinylm.model import Chunk, Model, ModelRunner
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


def reference_logits(directory: Path, ids: np.ndarray, activation: str) -> np.ndarray:
    """Return the scores (B, vocab) of the tokens after ids (B, T), computed by TinyLM's NumPy kernels in float32.

    activation: "gelu", or "relu2" for relu(x)^2.
    """
    batch, length = ids.shape
    runner = ModelRunner(Model(*load_model(directory), "numpy", "float32"), batch, batch * length, batch)
    chunks = [Chunk(i, 0, length) for i in range(batch)]
    last = np.arange(1, batch + 1) * length - 1
    used = kernels.gelu if activation == "gelu" else _squared_relu
    with patch.object(kernels, "gelu", used):  # TinyLM itself has no other activation
        return runner.forward(ids.reshape(-1), chunks, last).copy()


def _squared_relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) ** 2
