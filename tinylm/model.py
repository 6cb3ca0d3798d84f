"""A loaded model, and a runner with its KV cache and the arrays of a step. Prefill and decode are the same call.

`tinylm.kernels` computes. `tinylm.engine` decides which tokens go into a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.config import ModelConfig
from tinylm.kernels import choose
from tinylm.kernels.batch import Batch
from tinylm.weights import QuantizedMatrix, Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of the sequence in `slot`. The cache holds the first `start` tokens of it."""

    slot: int
    start: int
    count: int


class Model:
    """A loaded model: its config, its kernels, and its weights in their layout. Several runners can share it."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], kernels: str = "auto", precision: str = "auto"
    ) -> None:
        """Prepare the tensors for the kernels.

        kernels: "numba" (compiled), "numpy" or "auto". precision: "int8" (rounds the inputs of matmuls, keys and
        values), "float32" or "auto".
        Raise ValueError for unknown kernels or precision, or if they don't work with these weights.
        """
        quantized = isinstance(tensors["model.embed_tokens.weight"], QuantizedMatrix)
        self.config = config
        self.weight_type = "int8" if quantized else "float32"
        self.kernels, self.precision = choose(kernels, precision, quantized)
        self.weights = self.kernels.prepare(config, tensors, self.precision)

    @property
    def arithmetic(self) -> str:
        """Return the names of the kernels, of their instructions and of the precision, for people."""
        return f"{self.kernels.describe()}, {self.precision}"


class ModelRunner:
    """Runs a model in a KV cache of `n_slots` sequences, with at most `n_tokens` tokens and `n_rows` rows a step.

    To run a step, write its tokens to the beginning of the arrays of `batch` and call `step(n_tokens, n_rows)`: it
    writes the rows' logits to `batch.logits` and the tokens that it chose to `batch.chosen`.
    """

    def __init__(self, model: Model, n_slots: int, n_tokens: int, n_rows: int) -> None:
        self.model = model
        self.batch = Batch.empty(model.config, n_slots, n_tokens, n_rows)
        self._cache = model.kernels.make_cache(model.config, n_slots, model.precision)
        self._scratch = model.kernels.make_scratch(model.config, n_tokens, n_rows)
        self.step = model.kernels.warm_up(model.weights, self._cache, self._scratch, self.batch)

    @property
    def cache_bytes(self) -> int:
        """Return the size of the KV cache in bytes."""
        return self.model.kernels.cache_bytes(self._cache)

    def compute(self, n_tokens: int, n_rows: int) -> None:
        """Run a step without choosing tokens."""
        self.model.kernels.forward(self.model.weights, self._cache, self._scratch, self.batch, n_tokens, n_rows)

    def forward(self, ids: np.ndarray, chunks: Sequence[Chunk], rows: np.ndarray) -> np.ndarray:
        """Run the chunks' tokens through the model, write their keys and values to the cache, and return logits.

        ids: (T,) the tokens of all chunks, in their order. rows: (R,) the indices into `ids` that need logits.
        Return (R, vocab) float32, the scores of the token after each of these. The next call overwrites them.
        """
        n_tokens, n_rows, batch = len(ids), len(rows), self.batch
        batch.ids[:n_tokens] = ids
        batch.slots[:n_tokens] = np.concatenate([np.full(c.count, c.slot) for c in chunks])
        batch.positions[:n_tokens] = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        batch.rows[:n_rows] = np.asarray(rows, int) % n_tokens
        self.compute(n_tokens, n_rows)
        return batch.logits[:n_rows, : self.model.config.vocab_size]

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the keys and values of the first `n_tokens` tokens of slot `source` to slot `target`."""
        self.model.kernels.copy_prefix(self._cache, source, target, n_tokens)
