"""Scheduling decisions: which slot a request gets, and which tokens a step computes."""

from hypothesis import given
from hypothesis import strategies as st

from tinylm.engine.scheduler import LEAST_TO_COPY, choose_slot, share_tokens


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=5),
    st.data(),
)
def test_the_chosen_slot_is_free_and_its_prefix_right(ids, cached, data):
    """The prefix leaves a token to compute. It comes from another slot only if it is much longer there."""
    slots = range(len(cached))
    free = data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True))
    slot, source, n = choose_slot(ids, cached, free)
    assert slot in free
    assert n < len(ids)
    assert ids[:n] == cached[source][:n]
    lengths = [max(k for k in range(len(ids)) if ids[:k] == tokens[:k]) for tokens in cached]
    if source == slot:
        assert n == max(lengths[f] for f in free)
        assert slot == next(f for f in free if lengths[f] == n), "the longest unused slot comes first"
        assert max(lengths) < n + LEAST_TO_COPY
    else:
        assert n == max(lengths) >= max(lengths[f] for f in free) + LEAST_TO_COPY
        assert slot == free[0]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 64), st.integers(64, 256))
def test_every_decoding_request_takes_part_in_each_step(pending, prefill_tokens, context):
    """The rest of the step is prefill, in the order of requests, up to its limit."""
    shares = share_tokens(pending, prefill_tokens, context)
    counts = dict(shares)
    assert len(counts) == len(shares)
    decoding = [place for place, count in enumerate(pending) if count == 1]
    assert all(counts[place] == 1 for place in decoding)
    limit = prefill_tokens if decoding else context
    in_prefill = [place for place, count in enumerate(pending) if count > 1]
    assert sum(counts.get(place, 0) for place in in_prefill) == min(limit, sum(pending[p] for p in in_prefill))
    served = [place for place in in_prefill if place in counts]
    assert served == in_prefill[: len(served)]
    assert all(counts[place] == pending[place] for place in served[:-1])
