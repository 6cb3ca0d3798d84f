"""A sampler in NumPy for the engines that only compute logits."""

from __future__ import annotations

import numpy as np

from loadtest.bench.peers.runner import TEMPERATURE, TOP_P

LIKELIEST = 64  # tokens of a row that the sampler looks at first: a nucleus is rarely larger


def sample(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return tokens (B, 1) drawn from logits (B, vocab) by temperature and top_p over the whole vocabulary."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / TEMPERATURE)
    wanted = TOP_P * weights.sum(axis=1, keepdims=True)
    n, n_vocab = LIKELIEST, weights.shape[1]
    while True:
        ids = np.argpartition(weights, n_vocab - n, axis=1)[:, n_vocab - n :]  # the n likeliest, in any order
        likeliest = np.take_along_axis(weights, ids, axis=1)
        order = np.argsort(-likeliest, axis=1)
        reached = np.take_along_axis(likeliest, order, axis=1).cumsum(axis=1)
        if n == n_vocab or (reached[:, -1:] >= wanted).all():
            break
        n = min(8 * n, n_vocab)
    last = np.minimum((reached < wanted).sum(axis=1, keepdims=True), n - 1)  # of the nucleus
    mass = np.take_along_axis(reached, last, axis=1) * rng.random((len(logits), 1), np.float32)
    place = np.minimum((reached <= mass).sum(axis=1, keepdims=True), last)
    return np.take_along_axis(ids, np.take_along_axis(order, place, axis=1), axis=1)
