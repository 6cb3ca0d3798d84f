"""The stages of a choice are those of the sampler: the same tokens remain, with the same probabilities."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import ModelConfig, SamplingParams
from tinylm.explain import filters
from tinylm.kernels import numpy as kernels
from tinylm.kernels.batch import FORBIDDEN, Batch

# Scores that are equal or clearly different, so that rounding decides nothing.
SCORES = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-1280, 1280).map(lambda n: n / 64))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(0.05, 10),
    top_p=st.just(1.0) | st.floats(0.001, 0.999),
    top_k=st.just(0) | st.integers(1, 50),
    min_p=st.just(0.0) | st.floats(0.001, 1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.75]),
)


def sampled(
    scores: np.ndarray, seen: np.ndarray, bias: np.ndarray | None, params: SamplingParams, uniforms: np.ndarray
) -> list[int]:
    """Return the tokens that the kernels draw with each random number."""
    n = len(uniforms)
    config = ModelConfig(len(scores), hidden_size=2, n_layers=1, n_heads=1, mlp_size=1, context=1, boundary_id=0)
    batch = Batch.empty(config, n_slots=1, n_tokens=n, n_rows=n)
    batch.set_params(0, params)
    batch.rows[:], batch.uniforms[:], batch.seen[0] = np.arange(n), uniforms, seen
    batch.logits[:, : len(scores)] = scores
    if bias is not None:
        batch.biased[0], batch.bias[0] = True, bias
    kernels.sample(None, batch, n)
    return batch.chosen.tolist()


@given(st.data(), SCORES, PARAMS)
@example(None, np.zeros(12, np.float32), SamplingParams(temperature=1, top_p=0.49, top_k=7))
@example(None, np.log(np.array([1, 2, 3, 4], np.float32)), SamplingParams(temperature=1, top_p=0.75, top_k=3))
def test_the_last_stage_is_what_the_sampler_draws_from(
    data: st.DataObject | None, scores: np.ndarray, params: SamplingParams
) -> None:
    """A random number in the middle of a token's share draws this token, and no number draws a removed one."""
    seen, bias = np.arange(len(scores)) % 3 == 0, None
    if data is not None and data.draw(st.booleans()):
        steps = st.integers(-640, 640).map(lambda n: n / 64) | st.sampled_from([0.0, FORBIDDEN])
        bias = data.draw(hnp.arrays(np.float32, len(scores), elements=steps))
        bias[0] = 0  # one token is allowed
    choice = filters.choose(scores, seen, bias, params)
    kept = np.flatnonzero(choice.stages[-1].weights)
    ends = np.cumsum(choice.stages[-1].probabilities[kept])
    begins = np.concatenate([[0], ends[:-1]])
    wide = ends - begins > 1e-12  # rounding decides about narrower shares
    assert sampled(scores, seen, bias, params, ((begins + ends) / 2)[wide]) == kept[wide].tolist()
    uniforms = np.array([0.0, 0.25, 0.5, 1 - 2**-53])
    drawn = sampled(scores, seen, bias, params, uniforms)
    assert set(drawn) <= set(kept.tolist())
    assert [choice.draw(uniform) for uniform in uniforms] == drawn
    cold = SamplingParams(temperature=0, repetition_penalty=params.repetition_penalty)
    assert sampled(scores, seen, bias, cold, np.zeros(1)) == [choice.greedy]


@given(SCORES, PARAMS)
def test_stages_only_remove(scores: np.ndarray, params: SamplingParams) -> None:
    """After the temperature, a kept token keeps its weight, and what each stage removed is all that is missing."""
    choice = filters.choose(scores, np.zeros(len(scores), bool), None, params)
    assert [stage.name for stage in choice.stages] == [
        *("model", "repetition_penalty", "logit_changes", "temperature", "top_k", "top_p", "min_p")
    ]
    for before, stage in zip(choice.stages[3:], choice.stages[4:], strict=False):
        removed = stage.removed_from(before)
        left = before.weights.copy()
        left[removed] = 0
        np.testing.assert_array_equal(left, stage.weights)
        assert before.n_kept - stage.n_kept == len(removed)
    assert all(abs(stage.probabilities.sum() - 1) < 1e-9 for stage in choice.stages)
