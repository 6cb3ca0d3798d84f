"""What tests of the arithmetic share: models of any shape, their logits from nothing cached, and other processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinylm import ModelConfig, SamplingParams
from tinylm.kernels.batch import Batch
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.weights import QuantizedMatrix, Tensor, load_model, quantize_rows, tensor_shapes

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [("numba", "int8"), ("numba", "float32"), ("numpy", "int8"), ("numpy", "float32")]


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """int8 matrices in which every weight matters, of rows of many sizes, and norms far from one."""
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
    """float32 tensors as `save_model` would store them."""
    return {name: quantize_rows(t) if t.ndim == 2 else t for name, t in tensors.items()}


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.dequantize() if isinstance(t, QuantizedMatrix) else t for name, t in tensors.items()}


def logits_of(model: Model, ids: list[int]) -> np.ndarray:
    """Scores after each of the ids, (T, vocab), all at once and from nothing cached."""
    runner = ModelRunner(model, 1, len(ids), len(ids))
    return runner.forward(np.array(ids), [Chunk(0, 0, len(ids))], np.arange(len(ids))).copy()


def start_python(code: str, *arguments: str, **env: str) -> subprocess.Popen:
    """Run `python -c CODE ARGUMENTS` in the repository's root, these variables set; output as text."""
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
    """stdout and stderr of a process that must end well."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


def computed_here() -> dict[str, np.ndarray]:
    """What this CPU's code gives for one layer of the real width and for the committed model, at 256 random tokens.

    By `step` of the compiled int8 kernels: logits, of the committed model also the greedy tokens.
    """
    layer = ModelConfig(n_layers=1)
    of_layer, _ = _one_step(layer, random_tensors(layer, seed=1))
    of_stories, chosen = _one_step(*load_model(ROOT / "models" / "stories-8m"))
    return {
        "arithmetic": np.array(importlib.import_module("tinylm.kernels.numba").describe()),
        "layer": of_layer,
        "stories": of_stories,
        "chosen": chosen,
    }


def _one_step(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    kernels, n = importlib.import_module("tinylm.kernels.numba"), 256
    weights, cache = kernels.prepare(config, tensors, "int8"), kernels.make_cache(config, 1, "int8")
    scratch, batch = kernels.make_scratch(config, n, n), Batch.empty(config, 1, n, n)
    batch.set_params(0, SamplingParams(temperature=0))
    batch.ids[:] = np.random.default_rng(1).integers(0, config.vocab_size, n)
    batch.positions[:] = batch.rows[:] = np.arange(n)
    kernels.step(weights, cache, scratch, batch, n, n)
    return batch.logits[:, : config.vocab_size], batch.chosen
