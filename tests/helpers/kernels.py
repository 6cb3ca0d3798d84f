"""Models of any shape, their logits, and Python processes, for the tests of the arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinylm import ModelConfig, SamplingParams
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.weights import QuantizedMatrix, Tensor, load_model, quantize_rows, tensor_shapes

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [("numba", "int8"), ("numba", "float32"), ("numpy", "int8"), ("numpy", "float32")]


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return random int8 matrices with rows of many scales, and norms far from 1. Every weight matters."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = rng.uniform(0.3, 2.0, shape).astype(np.float32)
        else:
            columns = config.hidden_size if "embed_tokens" in name else shape[1]
            rows = rng.normal(0, columns**-0.5, shape) * np.exp(rng.normal(0, 0.5, (shape[0], 1)))
            tensors[name] = quantize_rows(rows.astype(np.float32))
    return tensors


def quantized(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Quantize float32 tensors as `save_model` does."""
    return {name: quantize_rows(t) if t.ndim == 2 else t for name, t in tensors.items()}


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the tensors as float32."""
    return {name: t.dequantize() if isinstance(t, QuantizedMatrix) else t for name, t in tensors.items()}


def logits_of(model: Model, ids: list[int]) -> np.ndarray:
    """Return the logits after each of the ids, (T, vocab), computed in one step with an empty cache."""
    runner = ModelRunner(model, 1, len(ids), len(ids))
    return runner.forward(np.array(ids), [Chunk(0, 0, len(ids))], np.arange(len(ids))).copy()


def scale_of(logits: np.ndarray) -> float:
    """Return the root mean square of logits."""
    return float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))


def row_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the root mean square of each row's difference as a share of the logits' scale, (R,).

    Independent logits give 1.4.
    """
    return np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64), axis=1)) / scale_of(expected)


def start_python(code: str, *arguments: str, **env: str) -> subprocess.Popen:
    """Start `python -c CODE ARGUMENTS` in the repository's root with these environment variables."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen, timeout_s: float = 600) -> tuple[str, str]:
    """Wait for a process, which must succeed. Return its stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


def computed_here() -> dict[str, np.ndarray]:
    """Compute logits of 256 random tokens with the int8 step that this process compiles.

    "layer": the logits of one random layer of the real shape. "stories": the logits of the committed model. "chosen":
    the greedy tokens of the committed model.
    """
    from tinylm.kernels import numba

    layer = ModelConfig(n_layers=1)
    of_layer, _ = _one_step(layer, random_tensors(layer, seed=1))
    of_stories, chosen = _one_step(*load_model(ROOT / "models" / "stories-8m"))
    return {"arithmetic": np.array(numba.describe()), "layer": of_layer, "stories": of_stories, "chosen": chosen}


def _one_step(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    n = 256
    runner = ModelRunner(Model(config, tensors, "numba", "int8"), 1, n, n)
    batch = runner.batch
    batch.set_params(0, SamplingParams(temperature=0))
    batch.ids[:] = np.random.default_rng(1).integers(0, config.vocab_size, n)
    batch.positions[:] = batch.rows[:] = np.arange(n)
    runner.step(n, n)
    return batch.logits[:, : config.vocab_size], batch.chosen
