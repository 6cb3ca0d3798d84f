"""DRY ("don't repeat yourself"): a penalty for tokens that extend a repetition, as llama.cpp defines it.

If the text ends with "a b c" and contains "a b c d" earlier, then "d" would extend a repetition of length 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinylm.engine.word_tokens import Tails
from tinylm.sampling import SamplingParams

MAX_LOG = 88.7228391  # of the largest float32; llama.cpp limits the exponent by it
MAX_PENALTY = 1e20  # smaller than what forbids a token


class Dry:
    """The DRY penalties of one text, which grows by single tokens."""

    def __init__(self, params: SamplingParams, breakers: Tails, context: int) -> None:
        """context: the most tokens of the text."""
        self._params, self._breakers = params, breakers
        base = params.dry_base
        self._largest_exponent = int(MAX_LOG / math.log(base)) if base > 1.000001 else context
        self._n = 0  # tokens of the text
        self._ids = np.zeros(context, np.int32)
        # How many of the last tokens before place p are also the last tokens of the text, (context + 1,).
        self._lengths = np.zeros(context + 1, np.int32)

    def begin(self, prompt: Sequence[int]) -> None:
        """Start with the text of these tokens."""
        self._n = 0
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """Add a token to the text."""
        n = self._n
        # A repetition before place p becomes longer if the token at p is this one, and ends otherwise.
        self._lengths[1 : n + 1] = (self._lengths[:n] + 1) * (self._ids[:n] == token)
        self._ids[n] = token
        self._n = n + 1

    def penalties(self) -> dict[int, float]:
        """Return the tokens that would extend a repetition, each with the penalty for its logit.

        The penalty is multiplier * base^(length - allowed_length) for the longest repetition that the token would
        extend. A repetition does not reach across a breaker. A token that contains a breaker has no penalty.
        """
        allowed, last_n = self._params.dry_allowed_length, self._params.dry_penalty_last_n
        begin = 0 if last_n < 0 else max(0, self._n - last_n)
        places = begin + 1 + np.flatnonzero(self._lengths[begin + 1 : self._n] >= allowed)
        if not len(places):
            return {}
        limits = np.minimum(places - begin, self._tokens_after_breaker(begin))
        lengths = np.minimum(self._lengths[places], limits).tolist()
        longest: dict[int, int] = {}
        for token, length in zip(self._ids[places].tolist(), lengths, strict=True):
            if length >= allowed:
                longest[token] = max(length, longest.get(token, 0))
        return {
            token: self._penalty(length - allowed)
            for token, length in longest.items()
            if () not in self._breakers.get(token, ())
        }

    def _penalty(self, exponent: int) -> float:
        params = self._params
        return min(params.dry_multiplier * params.dry_base ** min(exponent, self._largest_exponent), MAX_PENALTY)

    def _tokens_after_breaker(self, begin: int) -> int:
        """Return the number of tokens after the last breaker. Without one, return the number of tokens from `begin`.

        Of several breakers that begin at the same token, the longest counts.
        """
        ids = self._ids[begin : self._n].tolist()
        for place in range(len(ids) - 1, -1, -1):
            if tails := self._breakers.get(ids[place]):
                rest = ids[place + 1 :]
                lengths = [len(tail) for tail in tails if tuple(rest[: len(tail)]) == tail]
                if lengths:
                    return len(rest) - max(lengths)
        return len(ids)
