"""Log-probabilities of the chosen token and of the most likely tokens, from the model's own logits."""

from __future__ import annotations

import numpy as np

from tinylm.sampling import TokenLogprobs


def token_logprobs(logits: np.ndarray, token: int, n_top: int) -> TokenLogprobs:
    """Return the log-probabilities of `token` and of the `n_top` most likely tokens. logits: (vocab,) float32."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logs = shifted - np.log(np.exp(shifted).sum())
    top = np.argsort(-logits, kind="stable")[:n_top]
    return TokenLogprobs(float(logs[token]), tuple((int(t), float(logs[t])) for t in top))
