"""The next token by an engine, with the log-probabilities that it reports, to compare with the reference kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.engine import Engine
from tinylm.engine.logprobs import token_logprobs
from tinylm.engine.request import Progress
from tinylm.engine.word_tokens import WordTokens
from tinylm.sampling import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """The token that an engine takes, and the tokens that it reports as the most likely."""

    token: int
    logprobs: dict[int, float]  # token -> its natural logarithm of the probability, before all settings

    @classmethod
    def of(cls, progress: Progress) -> EngineAnswer:
        """Return the answer of a request with the settings `for_one_token`.

        Raise ValueError if it ended without a token, for example because its time limit passed.
        """
        if progress.ending is not None:
            token, entry = progress.ending
        elif progress.tokens:
            token, entry = progress.tokens[0], progress.logprobs[0]
        else:
            raise ValueError(f"the engine's answer has no token: it ended with {progress.finish_reason!r}")
        return cls(token, {**dict(entry.top), token: entry.logprob})

    def to_json(self) -> dict[str, Any]:
        """Return what `json.dumps` accepts and `from_json` reads."""
        return {"token": self.token, "logprobs": list(self.logprobs.items())}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EngineAnswer:
        return cls(value["token"], dict(value["logprobs"]))


@dataclass(frozen=True, slots=True)
class Difference:
    """How an engine's answer differs from the reference kernels."""

    token: int  # the engine's
    same_token: bool  # whether the reference takes it too
    largest: float  # the largest difference of a log-probability
    n_compared: int  # tokens whose log-probabilities were compared


def for_one_token(params: SamplingParams) -> SamplingParams:
    """Return the settings for a request of one token, which is greedy if there is no seed."""
    return dataclasses.replace(
        params,
        max_tokens=1,
        min_tokens=min(params.min_tokens, 1),
        temperature=0 if params.seed is None else params.temperature,
        logprobs=MAX_LOGPROBS,
        prompt_logprobs=None,
        stop=(),
    )


def ask(engine: Engine, ids: Sequence[int], params: SamplingParams, words: WordTokens | None) -> EngineAnswer:
    """Return the engine's next token after a prompt of token ids. The caller alone steps the engine."""
    request = engine.submit(ids, for_one_token(params), words=words)
    while request.finish_reason is None:
        engine.step()
    return EngineAnswer.of(request.progress())


def difference(answer: EngineAnswer, logits: np.ndarray, token: int) -> Difference:
    """Compare an engine's answer with the logits (vocab,) of the reference kernels and the token that they take."""
    compared = list(answer.logprobs)
    ours = token_logprobs(np.broadcast_to(logits, (len(compared), len(logits))), compared, 0)
    largest = max(abs(entry.logprob - answer.logprobs[one]) for one, entry in zip(compared, ours, strict=True))
    return Difference(answer.token, answer.token == token, largest, len(compared))
