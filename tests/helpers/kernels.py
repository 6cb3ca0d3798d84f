"""Models of any shape, their logits, and Python processes, for the tests of the arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinylm import LLM, ModelConfig, SamplingParams
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


def sampled_stories(llm: LLM, n: int) -> list[str]:
    """Return n sampled stories of up to 64 tokens, with n different prompts of 2 to 110 tokens."""
    beginnings = ["Once", "The old fox said: ", "Lily and Ben " + "played in the garden and " * 14]
    prompts = [f"{i} {beginnings[i % 3]}" + " and then" * (i % 7) for i in range(n)]
    return [story.text for story in llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0.9, seed=5))]


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
    the greedy tokens of the committed model. "products": extreme bytes times the matrices of one layer.
    """
    from tinylm.kernels import numba

    layer = ModelConfig(n_layers=1)
    of_layer, _ = _one_step(layer, random_tensors(layer, seed=1))
    of_stories, chosen = _one_step(*load_model(ROOT / "models" / "stories-8m"))
    extreme = Products(layer, extreme_tensors(layer, seed=1))
    of_extremes = extreme.compute(*extreme.inputs(23, seed=1))
    return {
        "arithmetic": np.array(numba.describe()),
        "layer": of_layer,
        "stories": of_stories,
        "chosen": chosen,
        "products": np.concatenate(of_extremes, axis=1),
    }


def extreme_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return matrices of extreme bytes with rows of many scales. Half of the rows have the same byte everywhere."""
    rng, tensors = np.random.default_rng(seed), random_tensors(config, seed)
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedMatrix):
            values = rng.choice(np.array([-128, -127, -1, 0, 127], np.int8), tensor.values.shape)
            values[::2] = values[::2, :1]
            tensors[name] = QuantizedMatrix(values, tensor.scale)
    return tensors


class Products:
    """Products of rounded inputs and each matrix of a model with one layer, without the rest of a step."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        from tinylm.kernels.numba import prepare

        self.config, self.weights = config, prepare(config, tensors, "int8")
        names = [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.up_proj", "mlp.down_proj"]
        q, k, v, *others = (tensors[f"model.layers.0.{name}.weight"] for name in names)
        self.matrices = [[q, k, v], *([other] for other in [*others, tensors["model.embed_tokens.weight"]])]

    def inputs(self, n_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rounded inputs (T, columns) uint8 and their scales (T,). Half of the tokens are extreme."""
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 256, (n_tokens, max(self.config.hidden_size, self.config.mlp_size)), np.uint8)
        x[::2] = rng.choice(np.array([0, 1, 128, 255], np.uint8), x[::2].shape)
        x[::4] = x[::4, :1]
        return x, rng.uniform(0.01, 2, n_tokens).astype(np.float32)

    def compute(
        self, x: np.ndarray, scales: np.ndarray, tile_tokens: int | None = None, before: float | None = None
    ) -> list[np.ndarray]:
        """Return the product with each matrix, (T, rows) float32.

        tile_tokens: the fewest tokens for AMX tiles, by default as in a step. before: a number to add the product to.
        """
        from tinylm.kernels.numba import make_scratch, ops

        n, outs, at, row = len(x), [], 0, 0
        scratch = make_scratch(self.config, n, 1)
        if tile_tokens is not None:
            scratch = scratch._replace(tile_tokens=tile_tokens)
        scratch.bytes[:n, : x.shape[1]], scratch.scales[:n] = x, scales
        for parts in self.matrices:
            n_rows, n_in = sum(len(part.values) for part in parts), parts[0].values.shape[1]
            out = np.full((n, -(-n_rows // 64) * 64), np.float32(before or 0))
            at, row = ops.multiply(n, n_in, self.weights, at, row, n_rows, out, before is not None, scratch)
            outs.append(out[:, :n_rows])
        return outs

    def expected(self, x: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
        """Return what `compute` must return. The sums are exact in float64 and in float32."""
        outs = []
        for parts in self.matrices:
            values, row_scales = (
                np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scale")
            )
            sums = (x[:, : values.shape[1]].astype(float) - 128) @ values.T.astype(float)
            outs.append((sums * (row_scales * scales[:, None]).astype(float)).astype(np.float32))
        return outs


def _one_step(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    n = 256
    runner = ModelRunner(Model(config, tensors, "numba", "int8"), 1, n, n)
    batch = runner.batch
    batch.set_params(0, SamplingParams(temperature=0))
    batch.ids[:] = np.random.default_rng(1).integers(0, config.vocab_size, n)
    batch.positions[:] = batch.rows[:] = np.arange(n)
    runner.step(n, n)
    return batch.logits[:, : config.vocab_size], batch.chosen
