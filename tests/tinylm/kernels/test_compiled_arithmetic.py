"""The compiled kernels equal the reference, and give a sequence the same bits in every batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from helpers.kernels import SETTINGS, logits_of, random_tensors, row_errors, scale_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import LLM, ModelConfig
from tinylm.kernels.batch import Batch
from tinylm.model import Chunk, Model, ModelRunner

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.builds(
    lambda n_heads, head_dim, **sizes: ModelConfig(
        hidden_size=n_heads * head_dim, n_heads=n_heads, boundary_id=0, **sizes
    ),
    n_heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32]) | st.integers(1, 20).map(lambda n: 2 * n),
    mlp_size=st.integers(1, 130),
    vocab_size=st.integers(2, 200),
    n_layers=st.integers(1, 3),
    context=st.integers(16, 64),
    norm_eps=st.sampled_from([1e-5, 1e-2]),
)
# Sizes near those of compiled code: 4 inputs of a dot product, 16 lanes of a vector, 64 rows of a tile.
EDGES = [
    ModelConfig(vocab_size, heads * head_dim, layers, heads, mlp_size, context, boundary_id=0)
    for heads, head_dim, mlp_size, vocab_size, layers, context in [
        (1, 2, 1, 2, 1, 16),
        (1, 2, 3, 63, 3, 17),
        (3, 2, 5, 64, 2, 31),
        (1, 14, 15, 65, 2, 32),
        (4, 16, 64, 128, 2, 48),
        (3, 18, 63, 129, 2, 33),
        (2, 30, 65, 127, 2, 64),
        (2, 32, 127, 3, 2, 40),
        (3, 34, 129, 191, 2, 50),
        (1, 40, 60, 193, 3, 63),
    ]
]


class Plan:
    """Random sequences, one per slot. The cache holds a part of each, and one batch computes the rest."""

    def __init__(self, config, seed, n_slots=12):
        rng = np.random.default_rng(seed)
        lengths = np.minimum(1 + rng.exponential(6, n_slots).astype(int), config.context)
        lengths[0] = config.context
        self.n_slots = n_slots
        self.ids = [rng.integers(0, config.vocab_size, n) for n in lengths]
        self.cached = [int(n - 1 if rng.random() < 0.4 else rng.integers(0, n)) for n in lengths]  # decode, prefill
        self.order = rng.permutation(n_slots)
        n_tokens = sum(lengths) - sum(self.cached)
        self.rows = rng.permutation(n_tokens)[: rng.integers(n_tokens // 2, n_tokens + 1)]

    def run(self, model):
        """Return the logits of some tokens of the batch, (R, vocab)."""
        runner = ModelRunner(model, self.n_slots, sum(map(len, self.ids)), len(self.rows))
        before = [Chunk(slot, 0, self.cached[slot]) for slot in self.order if self.cached[slot]]
        runner.forward(np.concatenate([self.ids[c.slot][: c.count] for c in before]), before, np.array([0]))
        rest = [Chunk(slot, self.cached[slot], len(self.ids[slot]) - self.cached[slot]) for slot in self.order[::-1]]
        return runner.forward(np.concatenate([self.ids[c.slot][c.start :] for c in rest]), rest, self.rows).copy()


# --- equal to the reference


@settings(max_examples=30)
@given(SHAPES, SEEDS)
def test_float32_logits_equal_the_reference(config, seed):
    """For any shape, with prompts, continued prompts and decoding in one batch."""
    tensors, plan = random_tensors(config, seed), Plan(config, seed)
    expected = plan.run(Model(config, tensors, "numpy", "float32"))
    actual = plan.run(Model(config, tensors, "numba", "float32"))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@settings(max_examples=30)
@given(SHAPES, SEEDS)
def test_int8_logits_equal_the_reference(config, seed):
    """One kernel may round a number near a half up, and the other down. So a few rows differ a little.

    Another way to round (a scale per head instead of per token) changes every row by at least 0.01 of the logits'
    scale. A wrong row differs by 1.4. In 1500 models, no row differed by more than 0.08, and 2 of 3 rows (with three
    layers 1 of 6) differed by less than 0.0001.
    """
    tensors, plan = random_tensors(config, seed), Plan(config, seed)
    expected = plan.run(Model(config, tensors, "numpy", "int8"))
    errors = row_errors(plan.run(Model(config, tensors, "numba", "int8")), expected)
    assert np.mean(errors < 1e-4) > 0.5 / config.n_layers**2
    assert errors.max() < 0.2


@pytest.mark.parametrize("config", EDGES, ids=lambda c: f"{c.n_heads}x{c.head_dim}-{c.mlp_size}-{c.vocab_size}")
def test_padding_never_changes_a_result(config):
    errors = []
    for seed in range(3):
        tensors, plan = random_tensors(config, seed), Plan(config, seed)
        exact, exact_too, rounded, rounded_too = (
            plan.run(Model(config, tensors, kernels, precision))
            for precision in ("float32", "int8")
            for kernels in ("numpy", "numba")
        )
        assert np.abs(exact_too - exact).max() < 1e-4 * np.abs(exact).max()
        errors += row_errors(rounded_too, rounded).tolist()
    assert np.mean(np.array(errors) < 1e-3) > 0.5
    assert max(errors) < 0.2


def test_one_layer_of_the_real_shape_equals_the_reference():
    """At all 256 positions of the context, most rows are equal."""
    config = ModelConfig(n_layers=1)
    tensors, ids = random_tensors(config, seed=1), np.random.default_rng(1).integers(0, 4096, 256).tolist()
    numpy, numba = (logits_of(Model(config, tensors, kernels, "int8"), ids) for kernels in ("numpy", "numba"))
    errors = row_errors(numba, numpy)
    assert np.mean(errors < 1e-3) >= 0.4
    assert errors.max() < 0.2


def test_rounding_costs_less_than_003_bits_a_token(stories_dir):
    """On a story, with the committed model."""
    stories = {choice: LLM(stories_dir, 1, kernels=choice[0], precision=choice[1]) for choice in SETTINGS}
    ids = stories["numba", "int8"].tokenizer.encode_document(
        "Once upon a time there was a little fox who lived in the woods. One day, he was very hungry. He saw a big "
        'red bird in a tree. "Hello, bird!" said the fox. "Can you help me find some food?" The bird was kind. She '
        'said, "Yes, I can help you. Come with me!" They went to the river and found a lot of fish. The fox was so '
        "happy. He thanked the bird and they became best friends."
    )
    costs = {}
    for choice, llm in stories.items():
        logits = llm.logits(ids)[:-1].astype(float)
        logits -= logits.max(axis=1, keepdims=True)
        nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        costs[choice] = nats.mean() / np.log(2)
    exact = costs["numpy", "float32"]
    assert exact < 4, "the model does not know such stories"
    assert abs(costs["numba", "float32"] - exact) < 1e-4
    for kernels in ("numba", "numpy"):
        assert abs(costs[kernels, "int8"] - exact) < 0.03, costs


# --- the same bits in every batch


@pytest.mark.parametrize("precision", ["int8", "float32"])
@settings(max_examples=30)
@given(SHAPES, SEEDS)
def test_batch_and_chunks_never_change_a_bit(precision, config, seed):
    """An answer must not depend on other requests, or on how the steps divide a prompt."""
    model, plan = Model(config, random_tensors(config, seed), "numba", precision), Plan(config, seed, n_slots=16)
    rng = np.random.default_rng(seed)
    runner = ModelRunner(model, 16, sum(map(len, plan.ids)), sum(map(len, plan.ids)))
    done, logits = [0] * 16, [[] for _ in range(16)]
    while going := [slot for slot in range(16) if done[slot] < len(plan.ids[slot])]:
        slots = rng.permutation(going)[: rng.integers(1, len(going) + 1)]
        left = [len(plan.ids[slot]) - done[slot] for slot in slots]
        counts = [int(rng.choice([1, n, rng.integers(1, n + 1)])) for n in left]
        chunks = [Chunk(int(slot), done[slot], count) for slot, count in zip(slots, counts, strict=True)]
        fed = np.concatenate([plan.ids[c.slot][c.start : c.start + c.count] for c in chunks])
        rows = runner.forward(fed, chunks, np.arange(len(fed)))
        for chunk, part in zip(chunks, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            logits[chunk.slot] += list(part.copy())
            done[chunk.slot] += chunk.count
    for ids, ours in zip(plan.ids, logits, strict=True):
        np.testing.assert_array_equal(np.array(ours), logits_of(model, ids.tolist()))


def test_the_real_model_has_the_same_bits_in_a_batch(stories_dir):
    """The last tokens of 14 prompts of up to 256 tokens, together and each alone."""
    llm = LLM(stories_dir, kernels="numba", precision="int8")
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 4096, n).tolist() for n in (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 200, 256)]
    runner = ModelRunner(llm.model, 14, sum(map(len, sequences)), 14)
    before = [Chunk(slot, 0, len(ids) - 1) for slot, ids in enumerate(sequences) if len(ids) > 1]
    runner.forward(np.concatenate([ids[:-1] for ids in sequences[1:]]), before, np.array([0]))
    last = [Chunk(slot, len(ids) - 1, 1) for slot, ids in enumerate(sequences)]
    together = runner.forward(np.array([ids[-1] for ids in sequences]), last, np.arange(14))
    for ids, ours in zip(sequences, together, strict=True):
        np.testing.assert_array_equal(ours, llm.logits(ids)[-1])


def test_threads_do_not_disturb_each_other(tiny_config, tiny_quantized):
    """Compiled code releases the GIL, so that two engines of one model compute at the same time."""
    model = Model(tiny_config, tiny_quantized, "numba", "int8")
    sequences = np.random.default_rng(4).integers(0, 4096, (8, 64)).tolist()
    expected = [logits_of(model, ids) for ids in sequences]
    with ThreadPoolExecutor(4) as pool:
        for i, logits in enumerate(pool.map(partial(logits_of, model), sequences * 20)):
            np.testing.assert_array_equal(logits, expected[i % 8])


# --- the cache


@pytest.mark.parametrize("choice", SETTINGS, ids="-".join)
@settings(max_examples=10)
@given(SHAPES, SEEDS, st.data())
def test_a_copied_prefix_continues_like_the_original(choice, config, seed, data):
    rng = np.random.default_rng(seed)
    model = Model(config, random_tensors(config, seed), *choice)
    original, other = (rng.integers(0, config.vocab_size, config.context) for _ in range(2))
    n_copied = data.draw(st.integers(1, config.context - 1))
    n_rest = data.draw(st.integers(1, config.context - n_copied))
    rest = rng.integers(0, config.vocab_size, n_rest)
    runner = ModelRunner(model, 4, 3 * config.context, config.context)
    begun = [Chunk(0, 0, config.context - 1), Chunk(2, 0, config.context), Chunk(3, 0, config.context - 1)]
    runner.forward(np.concatenate([original[:-1], other, other[:-1]]), begun, np.array([0]))
    runner.copy_prefix(0, 2, n_copied)

    def last(slot, ids):
        return runner.forward(ids[-1:], [Chunk(slot, config.context - 1, 1)], np.array([0])).copy()

    bystanders = last(0, original), last(3, other)
    copied = runner.forward(rest, [Chunk(2, n_copied, n_rest)], np.arange(n_rest)).copy()
    np.testing.assert_array_equal(bystanders, (last(0, original), last(3, other)))
    in_place = runner.forward(rest, [Chunk(0, n_copied, n_rest)], np.arange(n_rest)).copy()
    if choice[0] == "numba":
        np.testing.assert_array_equal(copied, in_place)
        whole = logits_of(model, [*original[:n_copied].tolist(), *rest.tolist()])
        np.testing.assert_array_equal(copied, whole[n_copied:])
    else:
        assert np.abs(copied - in_place).max() < 1e-5 * scale_of(in_place)


@pytest.mark.parametrize("choice", SETTINGS, ids="-".join)
@settings(max_examples=10)
@given(SHAPES, SEEDS)
def test_leftovers_in_cache_and_scratch_never_change_a_bit(choice, config, seed):
    """The leftovers are a thousand times as large, in every slot and behind the end of every sequence."""
    tensors, rng = random_tensors(config, seed), np.random.default_rng(seed)
    model = Model(config, tensors, *choice)
    loud = {name: 1000 * t if name.endswith("layernorm.weight") else t for name, t in tensors.items()}
    loud_weights = Model(config, loud, *choice).weights
    kernels, n_slots, context = model.kernels, 3, config.context
    lengths = rng.integers(1, context + 1, n_slots)

    def run(leftovers):
        cache = kernels.make_cache(config, n_slots, model.precision)
        scratch = kernels.make_scratch(config, n_slots * context, n_slots * context)
        batch = Batch.empty(config, n_slots, n_slots * context, n_slots * context)
        if leftovers:
            batch.ids[:] = rng.integers(0, config.vocab_size, n_slots * context)
            batch.slots[:], batch.positions[:] = np.divmod(np.arange(n_slots * context), context)
            batch.rows[:] = np.arange(n_slots * context)
            kernels.forward(loud_weights, cache, scratch, batch, n_slots * context, n_slots * context)
        n = int(lengths.sum())
        batch.ids[:n] = np.arange(n) * 7 % config.vocab_size
        batch.slots[:n] = np.repeat(np.arange(n_slots), lengths)
        batch.positions[:n] = np.concatenate([np.arange(length) for length in lengths])
        batch.rows[:n] = np.arange(n)
        kernels.forward(model.weights, cache, scratch, batch, n, n)
        return batch.logits[:n, : config.vocab_size].copy()

    np.testing.assert_array_equal(run(leftovers=True), run(leftovers=False))
