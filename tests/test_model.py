"""The forward pass: equal to PyTorch, whatever is cached, batched or chunked, and blind to the future."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import ModelConfig
from tinylm.kv_cache import KVCache
from tinylm.model import Chunk, Model
from tinylm.weights import QuantizedMatrix, load_model

TOLERANCE = 1e-4


def logits_of(model, ids):
    """All positions at once, from nothing cached: (T, vocab)."""
    cache = KVCache(model.config, n_slots=1)
    return model.forward(np.array(ids), [Chunk(0, 0, len(ids))], cache, np.arange(len(ids)))


def torch_logits(gpt, ids):
    with torch.no_grad():
        return gpt(torch.tensor([ids]))[0].numpy()


def as_arrays(gpt):
    return {name: parameter.detach().numpy() for name, parameter in gpt.named_parameters()}


def ids_of(rng, count, vocab_size=4096):
    return rng.integers(0, vocab_size, size=count).tolist()


@pytest.fixture(scope="module")
def tiny_gpt(random_gpt, tiny_config):
    return random_gpt(tiny_config)


@pytest.fixture(scope="module")
def tiny_exact(tiny_gpt):
    """The small model in float32, so that nothing but the arithmetic can differ."""
    return Model(tiny_gpt.config, as_arrays(tiny_gpt))


# --- equal to PyTorch


def test_the_full_shape_computes_what_pytorch_does(random_gpt):
    """16 layers, all 256 positions: a wrong angle, mask or scale anywhere would show."""
    gpt = random_gpt(ModelConfig())
    ids = ids_of(np.random.default_rng(0), 256)
    expected = torch_logits(gpt, ids)
    actual = logits_of(Model(gpt.config, as_arrays(gpt)), ids)
    assert expected.std() > 0.5, "logits near 0 would agree by themselves"
    assert np.abs(actual - expected).max() < TOLERANCE


@settings(max_examples=20)
@given(st.data())
def test_any_shape_computes_what_pytorch_does(random_gpt, data):
    heads = data.draw(st.integers(1, 4))
    config = ModelConfig(
        vocab_size=data.draw(st.integers(2, 50)),
        hidden_size=heads * 2 * data.draw(st.integers(1, 8)),
        n_layers=data.draw(st.integers(1, 3)),
        n_heads=heads,
        mlp_size=data.draw(st.integers(1, 40)),
        context=16,
        norm_eps=data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_theta=data.draw(st.sampled_from([100.0, 10000.0])),
    )
    gpt = random_gpt(config, seed=data.draw(st.integers(0, 99)))
    ids = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=16))
    actual = logits_of(Model(config, as_arrays(gpt)), ids)
    assert np.abs(actual - torch_logits(gpt, ids)).max() < TOLERANCE


def test_the_committed_int8_model_computes_what_pytorch_does_with_its_weights(stories, stories_dir, random_gpt):
    config, tensors = load_model(stories_dir)
    weights = {n: t.dequantize() if isinstance(t, QuantizedMatrix) else t for n, t in tensors.items()}
    gpt = random_gpt(config)  # every weight of which is replaced
    gpt.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    ids = stories.tokenizer.encode_document("Once upon a time there was a small fox. " * 12)[:120]
    ids += ids_of(np.random.default_rng(1), 256 - len(ids))  # sense and nonsense, to the end of the context
    expected = torch_logits(gpt, ids)
    scale = max(1.0, float(np.abs(expected).max()) / 10)  # trained logits are larger than random ones
    assert np.abs(stories.logits(ids) - expected).max() < TOLERANCE * scale


# --- cached, chunked, batched


@settings(max_examples=40)
@given(st.data())
def test_a_cache_filled_in_any_chunks_gives_the_same_logits(tiny_exact, data):
    """Prefill in one go, token by token, and everything between."""
    ids = data.draw(st.lists(st.integers(0, 4095), min_size=1, max_size=64))
    cache = KVCache(tiny_exact.config, n_slots=2)
    slot = data.draw(st.integers(0, 1))
    rows, start = [], 0
    while start < len(ids):
        count = data.draw(st.integers(1, len(ids) - start))
        chunk = Chunk(slot, start, count)
        rows.append(tiny_exact.forward(np.array(ids[start : start + count]), [chunk], cache, np.arange(count)))
        start += count
    assert np.abs(np.concatenate(rows) - logits_of(tiny_exact, ids)).max() < TOLERANCE


@settings(max_examples=30)
@given(st.data())
def test_sequences_in_one_batch_do_not_see_each_other(tiny_exact, data):
    """Some beginning, some halfway, in slots of any order, each as if it were alone."""
    n = data.draw(st.integers(1, 5))
    slots = data.draw(st.permutations(range(6)))[:n]
    sequences = [data.draw(st.lists(st.integers(0, 4095), min_size=1, max_size=20)) for _ in range(n)]
    begun = [data.draw(st.integers(0, len(ids) - 1)) for ids in sequences]
    cache = KVCache(tiny_exact.config, n_slots=6)
    cache.keys[:], cache.values[:] = 1e3, 1e3  # what an earlier sequence left in a slot must not matter
    for ids, slot, count in zip(sequences, slots, begun, strict=True):
        if count:
            tiny_exact.forward(np.array(ids[:count]), [Chunk(slot, 0, count)], cache, np.array([0]))
    rest = [ids[count:] for ids, count in zip(sequences, begun, strict=True)]
    chunks = [Chunk(slot, count, len(ids)) for slot, count, ids in zip(slots, begun, rest, strict=True)]
    together = np.concatenate([np.array(ids) for ids in rest])
    logits = tiny_exact.forward(together, chunks, cache, np.arange(len(together)))
    alone = [logits_of(tiny_exact, ids)[count:] for ids, count in zip(sequences, begun, strict=True)]
    assert np.abs(logits - np.concatenate(alone)).max() < TOLERANCE


def test_only_the_rows_asked_for_are_scored(tiny_exact):
    ids = ids_of(np.random.default_rng(2), 20)
    whole = logits_of(tiny_exact, ids)
    cache = KVCache(tiny_exact.config, n_slots=1)
    some = tiny_exact.forward(np.array(ids), [Chunk(0, 0, 20)], cache, np.array([19, 3]))
    assert some.shape == (2, 4096)
    assert np.abs(some - whole[[19, 3]]).max() < TOLERANCE
    none = tiny_exact.forward(np.array(ids), [Chunk(0, 0, 20)], cache, np.array([], int))
    assert none.shape == (0, 4096)


# --- blind to the future, and to nothing else


@settings(max_examples=40)
@given(st.data())
def test_a_token_never_changes_what_came_before_it(tiny_exact, data):
    ids = data.draw(st.lists(st.integers(0, 4095), min_size=2, max_size=32))
    place = data.draw(st.integers(0, len(ids) - 1))
    other = data.draw(st.integers(0, 4095).filter(lambda token: token != ids[place]))
    before = logits_of(tiny_exact, ids)
    after = logits_of(tiny_exact, [*ids[:place], other, *ids[place + 1 :]])
    assert np.abs(before[:place] - after[:place]).max(initial=0) < TOLERANCE
    assert np.abs(before[place] - after[place]).max() > TOLERANCE, "its own place must feel it"
    assert np.abs(before[-1] - after[-1]).max() > TOLERANCE / 10, "and so must the last"


def test_the_order_of_tokens_matters(tiny_exact):
    """Without positions, attention could not tell 'dog bites man' from 'man bites dog'."""
    forward = logits_of(tiny_exact, [5, 6, 7, 8])[-1]
    shuffled = logits_of(tiny_exact, [6, 5, 7, 8])[-1]
    assert np.abs(forward - shuffled).max() > 0.01


def test_a_cache_is_as_large_as_it_says():
    config = ModelConfig()
    cache = KVCache(config, n_slots=3)
    assert cache.nbytes == 2 * 16 * 3 * 256 * 192 * 4
