"""What a step hands to the kernels: plain arrays, made once and filled anew for each step.

The engine writes them, the kernels read them and write `logits` and `chosen`; nothing is allocated on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.sampling import SamplingParams

COLUMNS = 64  # of logits that kernels write at a time


class Batch(NamedTuple):
    """T tokens of any sequences, of which R want the logits that follow them, for S slots of the KV cache.

    A sequence's tokens stand in order, one after the other. The first n_tokens and n_rows entries count.
    """

    ids: np.ndarray  # (T,) int64
    slots: np.ndarray  # (T,) int64: whose token it is
    positions: np.ndarray  # (T,) int64: its place in that sequence, all earlier ones being in the cache or the batch
    rows: np.ndarray  # (R,) int64: the tokens that want logits
    logits: np.ndarray  # (R, vocab, rounded up to COLUMNS) float32, written by `forward`
    uniforms: np.ndarray  # (R,) float64 in [0, 1): the random number that each row draws its token with
    chosen: np.ndarray  # (R,) int64, written by `sample`
    temperature: np.ndarray  # (S,) float64; this and the following are the settings of the slot's sequence
    top_p: np.ndarray  # (S,) float64
    min_p: np.ndarray  # (S,) float64
    top_k: np.ndarray  # (S,) int64
    penalty: np.ndarray  # (S,) float64
    seen: np.ndarray  # (S, vocab) bool: tokens of the prompt and the answer, for the repetition penalty

    @classmethod
    def empty(cls, config: ModelConfig, n_slots: int, n_tokens: int, n_rows: int) -> Batch:
        whole = {name: np.zeros(n_tokens, np.int64) for name in ("ids", "slots", "positions")}
        settings = {name: np.zeros(n_slots) for name in ("temperature", "top_p", "min_p", "penalty")}
        return cls(
            **whole,
            rows=np.zeros(n_rows, np.int64),
            logits=np.zeros((n_rows, -(-config.vocab_size // COLUMNS) * COLUMNS), np.float32),
            uniforms=np.zeros(n_rows),
            chosen=np.zeros(n_rows, np.int64),
            **settings,
            top_k=np.zeros(n_slots, np.int64),
            seen=np.zeros((n_slots, config.vocab_size), bool),
        )

    def set_params(self, slot: int, params: SamplingParams) -> None:
        """The settings of the sequence that now has `slot`."""
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = min(params.top_k, self.seen.shape[1])
        self.penalty[slot] = params.repetition_penalty
