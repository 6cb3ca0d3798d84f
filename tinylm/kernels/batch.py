"""The input and output arrays of one step: what the engine gives to the kernels, and what they give back.

The engine writes the inputs. The kernels read them and write `logits` and `chosen`. Every step uses the same arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.sampling import SamplingParams

COLUMNS = 64  # the width of `logits` is a multiple of this, since compiled kernels write 64 logits at a time
FORBIDDEN = -1e30  # the bias of a token that must not be chosen; finite, because infinities give NaN in softmax


class Batch(NamedTuple):
    """Arrays for T tokens and R rows of logits, and for the settings of the S slots of a KV cache.

    The tokens of one sequence stand next to each other, in order. A step uses the first n_tokens and n_rows entries.
    """

    ids: np.ndarray  # (T,) int64
    slots: np.ndarray  # (T,) int64: the slot of each token's sequence
    positions: np.ndarray  # (T,) int64: each token's position; earlier ones are in the cache or in this batch
    rows: np.ndarray  # (R,) int64: the indices of the tokens that need logits
    logits: np.ndarray  # (R, vocab rounded up to COLUMNS) float32: an output of `forward`
    uniforms: np.ndarray  # (R,) float64 in [0, 1): the random number that selects each row's token
    chosen: np.ndarray  # (R,) int64: an output of `sample`, one token id per row
    temperature: np.ndarray  # (S,) float64: like the arrays below, the setting of the slot's sequence
    top_p: np.ndarray  # (S,) float64
    min_p: np.ndarray  # (S,) float64
    top_k: np.ndarray  # (S,) int64
    penalty: np.ndarray  # (S,) float64
    seen: np.ndarray  # (S, vocab) bool: the tokens of prompt and answer, for the repetition penalty
    biased: np.ndarray  # (S,) bool: whether the sequence uses its row of `bias`
    bias: np.ndarray  # (S, vocab) float32: added to the logits after the repetition penalty

    @classmethod
    def empty(cls, config: ModelConfig, n_slots: int, n_tokens: int, n_rows: int) -> Batch:
        """Allocate a batch of zeros with S = n_slots, T = n_tokens and R = n_rows."""
        return cls(
            ids=np.zeros(n_tokens, np.int64),
            slots=np.zeros(n_tokens, np.int64),
            positions=np.zeros(n_tokens, np.int64),
            rows=np.zeros(n_rows, np.int64),
            logits=np.zeros((n_rows, -(-config.vocab_size // COLUMNS) * COLUMNS), np.float32),
            uniforms=np.zeros(n_rows),
            chosen=np.zeros(n_rows, np.int64),
            temperature=np.zeros(n_slots),
            top_p=np.zeros(n_slots),
            min_p=np.zeros(n_slots),
            top_k=np.zeros(n_slots, np.int64),
            penalty=np.zeros(n_slots),
            seen=np.zeros((n_slots, config.vocab_size), bool),
            biased=np.zeros(n_slots, bool),
            bias=np.zeros((n_slots, config.vocab_size), np.float32),
        )

    def set_params(self, slot: int, params: SamplingParams) -> None:
        """Set the sampling settings of a slot to those of the sequence that it now holds."""
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = min(params.top_k, self.seen.shape[1])
        self.penalty[slot] = params.repetition_penalty
