"""The functions that every implementation of the model's arithmetic has.

`tinylm.model` calls these functions and nothing else. Each implementation is a module, and mypy checks it against this
protocol where `tinylm.kernels.choose` loads it. The types of weights, cache and scratch are the implementation's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from tinylm.config import ModelConfig
from tinylm.kernels.batch import Batch
from tinylm.weights import Tensor

Weights = TypeVar("Weights")
Cache = TypeVar("Cache")
Scratch = TypeVar("Scratch")


class Kernels(Protocol[Weights, Cache, Scratch]):
    """One implementation. T, R and S are the sizes of a `Batch`: tokens, rows of logits and slots of the cache."""

    def describe(self) -> str:
        """Return the implementation's name for people, such as "numba, avx512-vnni"."""

    def prepare(self, config: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> Weights:
        """Arrange a model's tensors for the other functions. Raise ValueError if the implementation can't use them."""

    def make_cache(self, config: ModelConfig, n_slots: int, precision: str) -> Cache:
        """Allocate the keys and values of `n_slots` sequences."""

    def make_scratch(self, config: ModelConfig, n_tokens: int, n_rows: int) -> Scratch:
        """Allocate the intermediate results of a step of at most `n_tokens` tokens and `n_rows` rows."""

    def warm_up(self, weights: Weights, cache: Cache, scratch: Scratch, batch: Batch) -> Callable[[int, int], None]:
        """Compile or load what `step` needs. Return `step` for these arrays: (n_tokens, n_rows) -> None."""

    def forward(
        self, weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int
    ) -> None:
        """Run the batch's first `n_tokens` tokens through the model and write `batch.logits` for its `n_rows` rows.

        The tokens' keys and values go into the cache.
        """

    def sample(self, scratch: Scratch, batch: Batch, n_rows: int) -> None:
        """Choose one token for each row of `batch.logits` and write it to `batch.chosen`."""

    def step(self, weights: Weights, cache: Cache, scratch: Scratch, batch: Batch, n_tokens: int, n_rows: int) -> None:
        """Call `forward`, then `sample`."""

    def copy_prefix(self, cache: Cache, source: int, target: int, n: int) -> None:
        """Copy the keys and values of the first `n` tokens of slot `source` to slot `target`."""

    def cache_bytes(self, cache: Cache) -> int:
        """Return the size of the cache in bytes."""

    def weight_bytes(self, weights: Weights) -> int:
        """Return how many bytes of weights one step reads."""

    def measure_peak(self) -> float:
        """Return the most multiply-adds that one core does per CPU second, as measured now."""
