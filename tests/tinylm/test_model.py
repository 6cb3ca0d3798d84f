"""The forward pass equals PyTorch's, also with a cache and in a batch.

Precision is float32 here. `kernels/test_compiled_arithmetic.py` tests rounding and compares both kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernels import dequantized, logits_of, quantized, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import ModelConfig
from tinylm.llm import load
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.weights import load_model

TOLERANCE = 1e-4
KERNELS = ["numpy", "numba"]


def torch_logits(gpt, ids):
    with torch.no_grad():
        return gpt(torch.tensor([ids]))[0].numpy()


def with_weights(gpt, weights):
    """Replace all weights of a PyTorch model, and return it."""
    gpt.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return gpt


def as_arrays(gpt):
    return {name: parameter.detach().numpy() for name, parameter in gpt.named_parameters()}


def ids_of(rng, count, vocab_size=4096):
    return rng.integers(0, vocab_size, size=count).tolist()


@pytest.fixture(scope="module")
def tiny_exact(tiny_config, tiny_quantized):
    """Return the small model with the reference kernels, which round nothing."""
    return Model(tiny_config, tiny_quantized, "numpy", "float32")


# --- equal to PyTorch


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_real_shape_equals_pytorch(random_gpt, kernels):
    gpt = random_gpt(ModelConfig())
    tensors = quantized(as_arrays(gpt))
    ids = ids_of(np.random.default_rng(0), 256)
    expected = torch_logits(with_weights(gpt, dequantized(tensors)), ids)
    actual = logits_of(Model(gpt.config, tensors, kernels, "float32"), ids)
    assert expected.std() > 0.5, "logits near 0 are always equal"
    assert np.abs(actual - expected).max() < TOLERANCE


def test_float32_weights_equal_pytorch(random_gpt, tiny_config):
    """The numpy kernels accept weights that are not quantized."""
    gpt = random_gpt(tiny_config)
    model = Model(tiny_config, as_arrays(gpt))
    assert (model.weight_type, model.arithmetic) == ("float32", "numpy, float32")
    ids = ids_of(np.random.default_rng(4), 64)
    assert np.abs(logits_of(model, ids) - torch_logits(gpt, ids)).max() < TOLERANCE


@settings(max_examples=20)
@given(st.data())
def test_any_shape_equals_pytorch(random_gpt, data):
    heads = data.draw(st.integers(1, 4))
    config = ModelConfig(
        vocab_size=data.draw(st.integers(2, 50)),
        hidden_size=heads * 2 * data.draw(st.integers(1, 20)),
        n_layers=data.draw(st.integers(1, 3)),
        n_heads=heads,
        mlp_size=data.draw(st.integers(1, 40)),
        context=data.draw(st.integers(16, 40)),
        norm_eps=data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_theta=data.draw(st.sampled_from([100.0, 10000.0])),
    )
    tensors = random_tensors(config, seed=data.draw(st.integers(0, 99)))
    gpt = with_weights(random_gpt(config), dequantized(tensors))
    ids = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=config.context))
    expected = torch_logits(gpt, ids)
    actual = logits_of(Model(config, tensors, "numpy", "float32"), ids)
    assert np.abs(actual - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_committed_model_equals_pytorch(stories_dir, random_gpt, kernels):
    config, tensors = load_model(stories_dir)
    gpt = with_weights(random_gpt(config), dequantized(tensors))
    tokenizer, model = load(stories_dir, kernels, "float32")
    ids = tokenizer.encode_document("Once upon a time there was a small fox. " * 12)[:120]
    ids += ids_of(np.random.default_rng(1), 256 - len(ids))  # a story, then random tokens up to the context
    expected = torch_logits(gpt, ids)
    scale = max(1.0, float(np.abs(expected).max()) / 10)  # a trained model's logits are larger
    assert np.abs(logits_of(model, ids) - expected).max() < TOLERANCE * scale


# --- cached and batched


@settings(max_examples=20)
@given(st.data())
def test_sequences_in_a_batch_are_independent(tiny_exact, data):
    """Some sequences begin and others continue, in any slots."""
    n = data.draw(st.integers(1, 5))
    slots = data.draw(st.permutations(range(6)))[:n]
    sequences = [data.draw(st.lists(st.integers(0, 4095), min_size=1, max_size=20)) for _ in range(n)]
    begun = [data.draw(st.integers(0, len(ids) - 1)) for ids in sequences]
    runner = ModelRunner(tiny_exact, 6, 100, 100)
    for slot in range(6):  # leave other keys and values in each slot
        runner.forward(np.arange(64) * 7 + slot, [Chunk(slot, 0, 64)], np.array([0]))
    for ids, slot, count in zip(sequences, slots, begun, strict=True):
        if count:
            runner.forward(np.array(ids[:count]), [Chunk(slot, 0, count)], np.array([0]))
    rest = [ids[count:] for ids, count in zip(sequences, begun, strict=True)]
    chunks = [Chunk(slot, count, len(ids)) for slot, count, ids in zip(slots, begun, rest, strict=True)]
    together = np.concatenate([np.array(ids) for ids in rest])
    logits = runner.forward(together, chunks, np.arange(len(together)))
    alone = [logits_of(tiny_exact, ids)[count:] for ids, count in zip(sequences, begun, strict=True)]
    assert np.abs(logits - np.concatenate(alone)).max() < TOLERANCE


def test_only_requested_rows_get_logits(tiny_exact):
    ids = ids_of(np.random.default_rng(2), 20)
    whole = logits_of(tiny_exact, ids)
    runner = ModelRunner(tiny_exact, 1, 20, 2)
    some = runner.forward(np.array(ids), [Chunk(0, 0, 20)], np.array([19, 3]))
    assert some.shape == (2, 4096)
    assert np.abs(some - whole[[19, 3]]).max() < TOLERANCE
    none = runner.forward(np.array(ids), [Chunk(0, 0, 20)], np.array([], int))
    assert none.shape == (0, 4096)


@pytest.mark.parametrize(
    ("settings", "bytes_per_head"),
    [
        (("numpy", "float32"), 32 * 4),
        (("numpy", "int8"), 32 * 4),  # rounded numbers are stored as float32
        (("numba", "float32"), 32 * 4),
        (("numba", "int8"), 32 + 4),  # one byte for a number, and a scale
    ],
)
def test_the_cache_has_the_documented_size(settings, bytes_per_head):
    config = ModelConfig(vocab_size=50, hidden_size=192, n_heads=6, n_layers=2, mlp_size=8, context=256)
    runner = ModelRunner(Model(config, random_tensors(config, seed=0), *settings), 3, 1, 1)
    assert runner.cache_bytes == 2 * 2 * 3 * 256 * 6 * bytes_per_head
