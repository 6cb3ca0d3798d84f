"""Apply the settings of a request to the scores of the next token, one after the other, and see what each removes.

The functions of `tinylm.kernels.numpy` do it, in the order of its `sample`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinylm.kernels import numpy as kernels
from tinylm.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Stage:
    """The probabilities of the next token after one setting."""

    name: str  # "model" before all settings, else the setting; "logit_changes" is all that changes single scores
    value: float | None  # of the setting; None for "model" and "logit_changes"
    weights: np.ndarray  # (vocab,) float64: the largest is 1; 0 for a token that cannot be chosen

    @property
    def probabilities(self) -> np.ndarray:
        """Return the probabilities (vocab,), which add up to 1."""
        return self.weights / self.weights.sum()

    @property
    def n_kept(self) -> int:
        """Return how many tokens can still be chosen."""
        return int(np.count_nonzero(self.weights))

    def removed_from(self, before: Stage) -> np.ndarray:
        """Return the ids of the tokens that the stage `before` kept and this stage does not, the most likely first."""
        removed = np.flatnonzero((before.weights > 0) & (self.weights == 0))
        return removed[np.argsort(-before.weights[removed], kind="stable")]


@dataclass(frozen=True, slots=True)
class Choice:
    """How the settings choose a token."""

    stages: list[Stage]  # from the model's own probabilities to those from which a token is drawn
    greedy: int  # the token that temperature 0 takes

    def draw(self, uniform: float) -> int:
        """Return the token that a random number in [0, 1) selects."""
        return kernels.draw(self.stages[-1].weights, uniform)


def choose(scores: np.ndarray, seen: np.ndarray, bias: np.ndarray | None, params: SamplingParams) -> Choice:
    """Apply the settings to the scores of the next token.

    scores: (vocab,) float32 logits. seen: (vocab,) bool, the tokens that the repetition penalty applies to.
    bias: (vocab,) float32, added after the penalty; None adds nothing.
    """
    penalized = kernels.penalize(scores, seen, params.repetition_penalty)
    changed = penalized if bias is None else penalized + bias
    greedy = int(changed.argmax())
    if params.temperature == 0:
        warm = np.zeros(len(changed))
        warm[greedy] = 1
    else:
        warm = kernels.soften(changed, params.temperature)
    by_top_k = kernels.keep(warm, params.top_k, 1, 0)
    by_top_p = kernels.keep(by_top_k, 0, params.top_p, 0)
    stages = [
        Stage("model", None, kernels.soften(scores, 1)),
        Stage("repetition_penalty", params.repetition_penalty, kernels.soften(penalized, 1)),
        Stage("logit_changes", None, kernels.soften(changed, 1)),
        Stage("temperature", params.temperature, warm),
        Stage("top_k", params.top_k, by_top_k),
        Stage("top_p", params.top_p, by_top_p),
        Stage("min_p", params.min_p, kernels.keep(by_top_p, 0, 1, params.min_p)),
    ]
    return Choice(stages, greedy)
