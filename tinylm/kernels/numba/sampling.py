"""From logits to tokens: repetition penalty, bias, temperature, top_k, top_p and min_p, without sorting.

They choose by the rule of `tinylm.kernels.numpy.sample`, with probabilities in float32.
"""

from __future__ import annotations

import numpy as np

from tinylm.kernels.batch import Batch
from tinylm.kernels.numba import simd
from tinylm.kernels.numba.emitter import LANES
from tinylm.kernels.numba.jit import compiled
from tinylm.kernels.numba.layout import Scratch
from tinylm.kernels.numba.simd import NEVER

LEAST_WEIGHT = np.float32(1e-37)  # tokens with less weight are never drawn; the exponential of NEVER is less
MAX_FACTOR = 1e30  # the inverse of the least temperature: lower temperatures give the same tokens


@compiled
def choose_tokens(batch: Batch, n_rows: int, scratch: Scratch) -> None:
    """Choose one token for each row of batch.logits and write it to batch.chosen."""
    weights, candidates, masses = scratch.weights, scratch.candidates, scratch.masses
    n_vocab, n_columns = batch.seen.shape[1], batch.logits.shape[1]
    n_blocks = n_columns // LANES
    for r in range(n_rows):
        slot = batch.slots[batch.rows[r]]
        scores, at = batch.logits, r * n_columns
        for i in range(n_vocab, n_columns):  # the padding
            scores[r, i] = NEVER
        if batch.penalty[slot] != 1:
            _penalize(scores, r, batch.seen, slot, np.float32(batch.penalty[slot]), scratch.changed)
            scores, at = scratch.changed, 0
        if batch.biased[slot]:
            _add_bias(scores, at // n_columns, batch.bias, slot, scratch.changed)
            scores, at = scratch.changed, 0
        greatest = simd.largest(scores, at, n_blocks)
        if batch.temperature[slot] == 0:
            chosen = 0
            while chosen + 1 < n_vocab and scores[at // n_columns, chosen] != greatest:
                chosen += 1
        else:
            factor = np.float32(min(1 / batch.temperature[slot], MAX_FACTOR))
            total = simd.exponentials(scores, at, n_blocks, greatest, factor, weights)
            top_k, top_p, min_p = batch.top_k[slot], batch.top_p[slot], batch.min_p[slot]
            n = _keep_likeliest(weights, n_blocks, total, top_k, top_p, min_p, candidates, masses)
            chosen = _draw(candidates, masses, n, batch.uniforms[r])
        batch.chosen[r] = chosen


@compiled
def _penalize(scores: np.ndarray, row: int, seen: np.ndarray, slot: int, penalty: np.float32, out: np.ndarray) -> None:
    """Write a row of scores to out[0]. Divide positive scores of seen tokens by the penalty, multiply negative ones.

    scores (R, vocab), seen (S, vocab), out (1, vocab). See Keskar et al. 2019.
    """
    for i in range(seen.shape[1]):
        score = scores[row, i]
        if seen[slot, i]:
            score = score / penalty if score > 0 else score * penalty
        out[0, i] = score
    for i in range(seen.shape[1], scores.shape[1]):
        out[0, i] = NEVER


@compiled
def _add_bias(scores: np.ndarray, row: int, bias: np.ndarray, slot: int, out: np.ndarray) -> None:
    """Write a row of scores plus the slot's bias to out[0], which may be that row.

    scores (R, vocab), bias (S, vocab), out (1, vocab).
    """
    for i in range(bias.shape[1]):
        out[0, i] = scores[row, i] + bias[slot, i]
    for i in range(bias.shape[1], scores.shape[1]):
        out[0, i] = NEVER


@compiled
def _keep_likeliest(
    weights: np.ndarray,
    n_blocks: int,
    total: np.float32,
    top_k: int,
    top_p: float,
    min_p: float,
    candidates: np.ndarray,
    masses: np.ndarray,
) -> int:
    """Write the tokens that the settings keep to `candidates`, in the order of ids, and their weights to `masses`.

    weights (vocab,): the most likely token has 1, and the sum is `total`. The settings usually keep few tokens, so this
    gathers the tokens above a bound, and tries a lower bound if these are too few. Return the number of tokens kept.
    """
    truncates = top_k > 0 or top_p < 1 or min_p > 0
    bound = np.float32(1 / 64) if truncates else LEAST_WEIGHT
    while True:
        n = simd.gather(weights, n_blocks, bound, candidates, masses)
        mass = _total(masses, n)
        enough = n >= top_k if top_k > 0 else mass >= top_p * total
        if enough or bound == LEAST_WEIGHT or (bound <= min_p and (top_k == 0 or top_p == 1)):
            break
        bound = max(bound / np.float32(4096), LEAST_WEIGHT)
    if 0 < top_k < n:
        n = _keep(candidates, masses, n, np.float32(top_k), True)
    if top_p < 1:
        if top_k > 0:
            total = _total(masses, n)
        n = _keep(candidates, masses, n, np.float32(top_p) * total, False)
    if min_p > 0:
        n = simd.keep(candidates, masses, (n + LANES - 1) // LANES, np.float32(min_p))
        _total(masses, n)
    return n


@compiled
def _total(masses: np.ndarray, n: int) -> np.float32:
    """Return the sum of the first n masses. Set the masses after them to 0, up to the end of the vector."""
    n_blocks = (n + LANES - 1) // LANES
    for i in range(n, n_blocks * LANES):
        masses[i] = 0
    return simd.total(masses, 0, n_blocks)


@compiled
def _keep(candidates: np.ndarray, masses: np.ndarray, n: int, wanted: np.float32, counts: bool) -> int:
    """Keep the fewest of the most likely candidates whose masses reach `wanted`. Of equal ones keep the lower ids.

    counts: each candidate counts as 1 instead of its mass. Zeros follow the masses up to the end of the vector, before
    and after the call. Return the number of candidates kept.
    """
    n_blocks = (n + LANES - 1) // LANES
    bound = max(simd.threshold(masses, n_blocks, wanted, counts), LEAST_WEIGHT)
    n = simd.keep(candidates, masses, n_blocks, bound)
    mass = _total(masses, n)
    surplus = n - int(wanted) if counts else int((mass - wanted) / bound)
    if surplus > 0:  # this many candidates with the least mass are not needed
        equal = 0
        for i in range(n):
            equal += masses[i] == bound
        needed = equal - min(surplus, equal - 1)
        kept = 0
        for i in range(n):
            if masses[i] > bound or needed > 0:
                needed -= masses[i] == bound
                candidates[kept], masses[kept] = candidates[i], masses[i]
                kept += 1
        n = kept
        _total(masses, n)
    return n


@compiled
def _draw(candidates: np.ndarray, masses: np.ndarray, n: int, uniform: float) -> int:
    """Return the first candidate at which the running sum of the masses exceeds `uniform` times their total."""
    left = uniform * _total(masses, n)
    for first in range(0, n, LANES):
        block = simd.total(masses, first, 1)
        if block > left or first + LANES >= n:
            for i in range(first, min(first + LANES, n) - 1):
                left -= masses[i]
                if left < 0:
                    return candidates[i]
            return candidates[min(first + LANES, n) - 1]
        left -= block
    return candidates[n - 1]
