"""DRY ("don't repeat yourself"): a penalty for tokens that extend a repetition, as llama.cpp defines it.

If the text ends with "a b c" and contains "a b c d" earlier, then "d" would extend a repetition of length 3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tinylm.engine.word_tokens import Tails
from tinylm.sampling import SamplingParams

MAX_LOG = 88.7228391  # of the largest float32; llama.cpp limits the exponent by it
MAX_PENALTY = 1e20  # smaller than what forbids a token


def dry_penalties(ids: np.ndarray, params: SamplingParams, breakers: Tails) -> dict[int, float]:
    """Return the tokens that would extend a repetition of `ids` (n,), each with the penalty for its logit.

    The penalty is multiplier * base^(length - allowed_length) for the longest repetition that the token would extend. A
    repetition does not reach across a breaker. A token that contains a breaker has no penalty.
    """
    if params.dry_penalty_last_n >= 0:
        ids = ids[max(0, len(ids) - params.dry_penalty_last_n) :]
    allowed, base = params.dry_allowed_length, params.dry_base
    if len(ids) <= allowed:
        return {}
    newest_first = ids[::-1]
    limit = _tokens_after_breaker(newest_first.tolist(), breakers)
    if limit < allowed:
        return {}
    largest_exponent = int(MAX_LOG / math.log(base)) if base > 1.000001 else len(ids)
    return {
        token: min(params.dry_multiplier * base ** min(length - allowed, largest_exponent), MAX_PENALTY)
        for token, length in _longest_repetitions(newest_first, limit, allowed).items()
        if () not in breakers.get(token, ())
    }


def _tokens_after_breaker(newest_first: list[int], breakers: Tails) -> int:
    """Return the number of tokens after the last breaker. Without a breaker, return the number of all tokens.

    Of several breakers that begin at the same token, the longest counts.
    """
    for age, token in enumerate(newest_first):
        tails = breakers.get(token, ())
        lengths = [len(t) for t in tails if len(t) <= age and list(t) == newest_first[age - len(t) : age][::-1]]
        if lengths:
            return age - max(lengths)
    return len(newest_first)


def _longest_repetitions(newest_first: np.ndarray, limit: int, allowed: int) -> dict[int, int]:
    """Return the tokens that would extend a repetition of at least `allowed` tokens, each with the greatest length.

    No length is greater than `limit`.
    """
    n = len(newest_first)
    # A repetition that ended `age` tokens ago has the tokens newest_first[age :], and the token after it is age - 1.
    ages = np.flatnonzero(newest_first[1:] == newest_first[0]) + 1 if allowed > 0 else np.arange(1, n)
    padded = np.concatenate([newest_first, np.full(n, -1, newest_first.dtype)])
    lengths = (sliding_window_view(padded, n)[ages] == newest_first).argmin(axis=1)  # of each: the first difference
    longest: dict[int, int] = {}
    for age, length in zip(ages.tolist(), np.minimum(lengths, limit).tolist(), strict=True):
        if length >= allowed:
            token = int(newest_first[age - 1])
            longest[token] = max(length, longest.get(token, 0))
    return longest
