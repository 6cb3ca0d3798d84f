"""The model and the room it runs in: token ids to logits or to next tokens, by kernels that are chosen once.

Prefill and decode are the same call. Schedules nothing: `tinylm.engine` says which tokens go in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinylm.batch import Batch
from tinylm.config import ModelConfig
from tinylm.kernels import choose
from tinylm.weights import QuantizedMatrix, Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of the sequence in `slot`, which has `start` tokens cached already."""

    slot: int
    start: int
    count: int


class Model:
    """A loaded model: its weights, in the form that its kernels want. Shared by any number of runners."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], kernels: str = "auto", precision: str = "auto"
    ) -> None:
        """kernels: "numba", "numpy"; precision: "int8" (what enters a matmul, keys and values), "float32"; or "auto".

        Raises ValueError when they don't exist, or don't go together with the weights.
        """
        quantized = isinstance(tensors["model.embed_tokens.weight"], QuantizedMatrix)
        self.config = config
        self.weight_type = "int8" if quantized else "float32"
        self.kernels, self.precision = choose(kernels, precision, quantized)
        self.weights = self.kernels.prepare(config, tensors, self.precision)

    @property
    def arithmetic(self) -> str:
        """For people: the kernels, the instructions they use, and what they round to."""
        return f"{self.kernels.describe()}, {self.precision}"


class ModelRunner:
    """A model with room to run in: a KV cache of `n_slots` sequences, and the arrays of a step.

    A step takes at most `n_tokens` tokens and gives at most `n_rows` rows of logits. The caller writes the first of
    each into `batch`; between steps it may read `batch.logits`, (n_rows, vocab and padding), and `batch.chosen`.
    """

    def __init__(self, model: Model, n_slots: int, n_tokens: int, n_rows: int) -> None:
        self.model = model
        self.batch = Batch.empty(model.config, n_slots, n_tokens, n_rows)
        self._kernels = model.kernels
        self._cache = model.kernels.make_cache(model.config, n_slots, model.precision)
        self._scratch = model.kernels.make_scratch(model.config, n_tokens, n_rows)
        self.step = model.kernels.warm_up(model.weights, self._cache, self._scratch, self.batch)
        """(n_tokens, n_rows): put the batch's first tokens through the model and choose one for each of its rows."""

    @property
    def cache_bytes(self) -> int:
        """What the KV cache holds when it is full."""
        return self._kernels.cache_bytes(self._cache)

    def forward(self, ids: np.ndarray, chunks: Sequence[Chunk], rows: np.ndarray) -> np.ndarray:
        """Put the chunks' tokens through the model and into the cache.

        ids: (T,) the tokens of all chunks, end to end. rows: (R,) which of the T positions want logits.
        Returns (R, vocab) float32, valid until the next call: for each such position the scores of the token after it.
        """
        n_tokens, n_rows, batch = len(ids), len(rows), self.batch
        batch.ids[:n_tokens] = ids
        batch.slots[:n_tokens] = np.concatenate([np.full(c.count, c.slot) for c in chunks])
        batch.positions[:n_tokens] = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
        batch.rows[:n_rows] = np.asarray(rows, int) % n_tokens
        self._kernels.forward(self.model.weights, self._cache, self._scratch, batch, n_tokens, n_rows)
        return batch.logits[:n_rows, : self.model.config.vocab_size]

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        """Give slot `target` the keys and values of the first `n_tokens` tokens of slot `source`."""
        self._kernels.copy_prefix(self._cache, source, target, n_tokens)
