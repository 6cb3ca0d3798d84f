"""What a request's settings add to the logits of its next token: logit_bias, penalties, DRY and forbidden tokens.

The kernels add it after the repetition penalty and before the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinylm.config import ModelConfig
from tinylm.engine.dry import Dry
from tinylm.engine.word_tokens import WordTokens
from tinylm.kernels.batch import FORBIDDEN
from tinylm.sampling import SamplingParams


class LogitChanges:
    """Computes the changes of one request's logits, step by step.

    `begin` forgets everything but the settings. So the request's tokens alone determine the changes, also after an
    interrupted step.
    """

    def __init__(self, params: SamplingParams, words: WordTokens, config: ModelConfig) -> None:
        """Raise ValueError if all tokens are forbidden."""
        self._params, self._vocab_size = params, config.vocab_size
        self._ends = sorted({config.boundary_id, *params.stop_token_ids})  # forbidden before min_tokens
        self._fixed = dict(params.logit_bias)
        if params.ignore_eos:
            self._fixed[config.boundary_id] = FORBIDDEN
        self._bad_words: dict[int, list[tuple[list[int], int]]] = {}  # by the last token before the forbidden token
        for *before, token in words.bad_words:
            if before:
                self._bad_words.setdefault(before[-1], []).append((before, token))
            else:
                self._fixed[token] = FORBIDDEN
        self._check_that_a_token_is_left(words)
        self._dry = Dry(params, words.breakers, config.context) if params.uses_dry else None
        self._n_counted = 0  # how many tokens of the answer are in the counts and in DRY's text
        self._counts: dict[int, int] = {}  # how often the answer holds a token
        self._lasting = np.zeros(0, np.float32)  # (vocab,): the changes that do not depend on the last tokens

    def _check_that_a_token_is_left(self, words: WordTokens) -> None:
        forbidden = {ids[-1] for ids in words.bad_words} | {t for t, bias in self._fixed.items() if bias == FORBIDDEN}
        if self._params.min_tokens > 0:
            forbidden.update(self._ends)
        if len(forbidden) >= self._vocab_size:
            raise ValueError(
                f"bad_words, ignore_eos, stop_token_ids and min_tokens forbid all {self._vocab_size} tokens: "
                "leave at least one"
            )

    def begin(self, prompt: Sequence[int]) -> None:
        """Start with a prompt and an empty answer."""
        self._n_counted = 0
        self._counts = {}
        if self._dry is not None:
            self._dry.begin(prompt)
        self._lasting = np.zeros(self._vocab_size, np.float32)
        for token, bias in self._fixed.items():
            self._lasting[token] = bias

    def write(self, tokens: list[int], bias: np.ndarray) -> None:
        """Write the changes for the token after an answer of these tokens to `bias` (vocab,) float32.

        The tokens continue those of the last call.
        """
        params = self._params
        for token in tokens[self._n_counted :]:
            self._count(token)
        bias[:] = self._lasting
        if self._dry is not None:
            for token, penalty in self._dry.penalties().items():
                bias[token] -= penalty
        if len(tokens) < params.min_tokens:
            bias[self._ends] = FORBIDDEN
        for before, token in self._bad_words.get(tokens[-1], ()) if tokens else ():
            if tokens[-len(before) :] == before:
                bias[token] = FORBIDDEN

    def _count(self, token: int) -> None:
        """Take a new token of the answer into account."""
        params = self._params
        self._n_counted += 1
        if self._dry is not None:
            self._dry.add(token)
        n = self._counts[token] = self._counts.get(token, 0) + 1
        penalty = params.presence_penalty + params.frequency_penalty * n
        self._lasting[token] = self._fixed.get(token, 0.0) - penalty


def logit_changes(params: SamplingParams, words: WordTokens | None, config: ModelConfig) -> LogitChanges | None:
    """Return the changes that the settings ask for, or None if they ask for none. Raise ValueError as `LogitChanges`.

    words: the token ids of the settings' strings, if there are any.
    """
    if words is None and (params.bad_words or params.uses_dry):
        raise ValueError("bad_words and dry_multiplier need token ids: pass the result of word_tokens")
    changes = (
        params.ignore_eos
        or params.min_tokens > 0
        or params.logit_bias
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or words is not None
    )
    return LogitChanges(params, words or WordTokens(), config) if changes else None
