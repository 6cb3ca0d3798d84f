"""The counts of an engine equal what it did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import SamplingParams
from tinylm.engine import Engine
from tinylm.engine.stats import Histogram

NUMBERS = st.floats(-10, 10, allow_nan=False)


@given(
    bounds=st.lists(NUMBERS, min_size=1, max_size=6, unique=True).map(sorted),
    values=st.lists(st.tuples(NUMBERS, st.integers(1, 5)), max_size=20),
)
def test_a_histogram_counts_the_values_up_to_each_bound(bounds: list[float], values: list[tuple[float, int]]) -> None:
    histogram = Histogram(bounds)
    for value, times in values:
        histogram.observe(value, times)
    everything = [value for value, times in values for _ in range(times)]
    assert histogram.cumulative() == [sum(v <= bound for v in everything) for bound in [*bounds, np.inf]]
    assert histogram.sum == pytest.approx(sum(everything), abs=1e-9)


@pytest.mark.parametrize("n_slots", [1, 3])
def test_tokens_steps_and_positions_are_counted_once(tiny_model, prompts, n_slots: int) -> None:
    """The answers end by length, by the boundary and by cancellation. The prefill of a prompt takes several steps."""
    engine = Engine(tiny_model, n_slots=n_slots, prefill_tokens=8)
    sequences = [engine.submit(p, SamplingParams(max_tokens=n, seed=n)) for n, p in enumerate(prompts, start=1)]
    n_steps = 0
    while engine.has_work:
        engine.step()
        n_steps += 1
        held = [s.n_cached for s in sequences if s.finish_reason is None]
        assert engine.kv_usage == pytest.approx(sum(held) / (n_slots * tiny_model.config.context))
        if n_steps == 12:
            engine.cancel(next(s for s in sequences if len(s.tokens) > 1))
    stats = engine.stats
    assert engine.kv_usage == 0
    assert stats.step_s.cumulative()[-1] == n_steps
    n_boundaries = sum(s.finish_reason == "stop" for s in sequences)  # sampled, but not part of the answer
    assert stats.batch_size.sum == sum(len(s.tokens) for s in sequences) + n_boundaries
    assert stats.batch_size.cumulative()[-1] <= n_steps
    assert stats.inter_token_s.cumulative()[-1] == sum(max(len(s.tokens) - 1, 0) for s in sequences)
    assert stats.inter_token_s.sum > 0
    assert stats.n_prompt_tokens == sum(len(s.prompt) for s in sequences)
    assert stats.n_reused_tokens == sum(s.n_reused for s in sequences)


def test_inter_token_times_add_up_to_the_time_of_the_answers(tiny_model, prompts) -> None:
    engine = Engine(tiny_model, n_slots=1)
    sequences = [engine.submit(prompt, SamplingParams(max_tokens=9, temperature=0)) for prompt in prompts[:4]]
    while engine.has_work:
        engine.step()
    spans = [s.finished_at - s.first_token_at for s in sequences]
    assert engine.stats.inter_token_s.sum == pytest.approx(sum(spans), rel=0.05)
