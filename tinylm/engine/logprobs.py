"""Log-probabilities of tokens and of the most likely tokens, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinylm.sampling import TokenLogprobs


def token_logprobs(logits: np.ndarray, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of one token per row, and of the row's `n_top` most likely tokens.

    logits: (len(tokens), vocab) float32.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    top = np.argsort(-logits, axis=1, kind="stable")[:, :n_top] if n_top else np.zeros((len(tokens), 0), int)
    return [
        TokenLogprobs(float(of_row[token]), tuple((t, float(of_row[t])) for t in best))
        for of_row, token, best in zip(logs, tokens, top.tolist(), strict=True)
    ]
