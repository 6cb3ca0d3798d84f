"""Two kernels, one arithmetic: compiled code equals the readable reference, on every CPU, in every batch."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_fixtures import ROOT, SETTINGS, computed_here, logits_of, outcome, random_tensors, start_python

from tinylm import LLM, ModelConfig
from tinylm.kernels import choose
from tinylm.kernels.batch import Batch
from tinylm.kernels.numba import emitter
from tinylm.model import Chunk, Model, ModelRunner

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
# Sizes around those that compiled code works in: 4 inputs, 16 lanes, tiles of 64 rows.
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


def scale_of(logits):
    """Their root mean square: differences are told as shares of it. Logits that have nothing in common have 1.4."""
    return float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))


def row_errors(actual, expected):
    """(R,): the root mean square of each row's difference, as a share of the logits' scale."""
    return np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64), axis=1)) / scale_of(expected)


class Plan:
    """Sequences of random tokens in slots of their own, of which a part is cached before a batch takes the rest."""

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
        """The logits of some rows of the batch, (R, vocab)."""
        runner = ModelRunner(model, self.n_slots, sum(map(len, self.ids)), len(self.rows))
        before = [Chunk(slot, 0, self.cached[slot]) for slot in self.order if self.cached[slot]]
        runner.forward(np.concatenate([self.ids[c.slot][: c.count] for c in before]), before, np.array([0]))
        rest = [Chunk(slot, self.cached[slot], len(self.ids[slot]) - self.cached[slot]) for slot in self.order[::-1]]
        return runner.forward(np.concatenate([self.ids[c.slot][c.start :] for c in rest]), rest, self.rows).copy()


# --- equal to the reference


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_without_rounding_compiled_code_computes_what_the_reference_does(config, seed):
    """Any shape, sequences that begin, go on and decode in one batch: each logit is the same but for float32's end."""
    tensors, plan = random_tensors(config, seed), Plan(config, seed)
    expected = plan.run(Model(config, tensors, "numpy", "float32"))
    actual = plan.run(Model(config, tensors, "numba", "float32"))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_with_rounding_compiled_code_computes_what_the_reference_does(config, seed):
    """Where a number lies next to a half, float32's end decides which way it is rounded: in few rows, but by a step.

    A rounding that is done otherwise (by head for by token, to odd steps, of another number) moves every row by 0.01
    of the scale and more: none would be within 0.0001. A wrong row differs by 1.4. In 1500 models a row moved by 0.08
    at most, and rows stayed within 0.0001: 2 of 3 in each of one layer, 1 of 6 in each of three.
    """
    tensors, plan = random_tensors(config, seed), Plan(config, seed)
    expected = plan.run(Model(config, tensors, "numpy", "int8"))
    errors = row_errors(plan.run(Model(config, tensors, "numba", "int8")), expected)
    assert np.mean(errors < 1e-4) > 0.5 / config.n_layers**2
    assert errors.max() < 0.2


@pytest.mark.parametrize("config", EDGES, ids=lambda c: f"{c.n_heads}x{c.head_dim}-{c.mlp_size}-{c.vocab_size}")
def test_sizes_around_those_of_registers_and_tiles(config):
    """Padding that leaks into a result does so where a size just passes a register's or a tile's."""
    errors = []
    for seed in range(6):
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


def test_no_position_is_rounded_otherwise():
    """The median model of 31, at each of 64 positions: an error of some blocks, lanes or remainders would show."""
    config = ModelConfig(vocab_size=90, hidden_size=36, n_layers=1, n_heads=2, mlp_size=50, context=64)
    errors = []
    for seed in range(31):
        tensors, ids = random_tensors(config, seed), np.random.default_rng(seed).integers(0, 90, 64).tolist()
        numpy, numba = (logits_of(Model(config, tensors, kernels, "int8"), ids) for kernels in ("numpy", "numba"))
        errors.append(row_errors(numba, numpy))
    assert np.median(errors, axis=0).max() < 1e-3


@pytest.mark.parametrize(("layers", "clean"), [(1, 0.4), (16, 0.0)])
def test_the_real_shape_differs_by_less_than_rounding_does(layers, clean):
    """All 256 positions. Of one layer most rows are the same; through 16, a number rounded otherwise moves others.

    Then the two differ like two ways to round: by less than what rounding itself changes, which is a few percent.
    """
    config = ModelConfig(n_layers=layers)
    tensors, ids = random_tensors(config, seed=1), np.random.default_rng(1).integers(0, 4096, 256).tolist()
    numpy, numba, exact = (
        logits_of(Model(config, tensors, *choice), ids)
        for choice in (("numpy", "int8"), ("numba", "int8"), ("numba", "float32"))
    )
    errors, of_rounding = row_errors(numba, numpy), row_errors(exact, numpy)
    assert np.mean(errors < 1e-3) >= clean
    assert np.sqrt(np.mean(errors**2)) < np.sqrt(np.mean(of_rounding**2)) < 0.1


def test_rounding_costs_the_committed_model_next_to_nothing(stories_dir):
    """Bits per token of a story: int8 arithmetic may not be what makes it worse."""
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
    assert exact < 4, "the model should know such stories: of noise, rounding would cost nothing"
    assert abs(costs["numba", "float32"] - exact) < 1e-4
    for kernels in ("numba", "numpy"):
        assert abs(costs[kernels, "int8"] - exact) < 0.03, costs


# --- the same bits in any batch


@pytest.mark.parametrize("precision", ["int8", "float32"])
@settings(max_examples=40)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_a_sequence_has_the_same_bits_in_any_batch_and_any_chunks(precision, config, seed):
    """A user's answer must not depend on who else is served, or on how a prompt was cut into steps."""
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


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_the_real_model_has_the_same_bits_in_a_batch_of_sixteen(stories_dir, precision):
    """A prompt's last token with 15 others and each alone, to the end of the context."""
    llm = LLM(stories_dir, kernels="numba", precision=precision)
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
    """Compiled code holds no lock of Python's: two engines of one model may compute at the same time."""
    model = Model(tiny_config, tiny_quantized, "numba", "int8")
    sequences = np.random.default_rng(4).integers(0, 4096, (8, 64)).tolist()
    expected = [logits_of(model, ids) for ids in sequences]
    with ThreadPoolExecutor(4) as pool:
        for i, logits in enumerate(pool.map(partial(logits_of, model), sequences * 20)):
            np.testing.assert_array_equal(logits, expected[i % 8])


# --- what lies in the cache


@pytest.mark.parametrize("choice", SETTINGS, ids="-".join)
@settings(max_examples=25)
@given(SHAPES, st.integers(0, 2**32 - 1), st.data())
def test_a_copied_prefix_goes_on_as_the_original(choice, config, seed, data):
    """A shared prompt is read once: who goes on from a copy must get what the first got, and the first stay whole."""
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
@settings(max_examples=25)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_what_others_left_in_cache_and_scratch_never_matters(choice, config, seed):
    """Keys and values a thousand times as large, in every slot and beyond every sequence's end: not a bit changes."""
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


# --- which kernels serve


@pytest.mark.parametrize(
    ("choice", "is_quantized", "told"),
    [
        (("cuda", "auto"), True, "kernels is 'cuda': it must be one of auto, numba, numpy"),
        (("", "int8"), False, "kernels is '': it must be one of auto, numba, numpy"),
        (("auto", "int4"), True, "precision is 'int4': it must be one of auto, int8, float32"),
        (("numpy", "Float32"), False, "precision is 'Float32': it must be one of auto, int8, float32"),
        (("numba", "auto"), False, "kernels is 'numba': it must be auto or numpy"),
        (("numba", "float32"), False, "kernels is 'numba': it must be auto or numpy"),
        (("auto", "int8"), False, "precision is 'int8': it must be auto or float32,"),
    ],
)
def test_a_choice_that_can_not_be_is_refused_by_field_and_value(choice, is_quantized, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        choose(*choice, is_quantized)


@pytest.mark.parametrize(
    ("choice", "is_quantized", "chosen"),
    [
        (("auto", "auto"), True, ("numba", "int8")),
        (("auto", "float32"), True, ("numba", "float32")),
        (("numpy", "auto"), True, ("numpy", "float32")),
        (("auto", "auto"), False, ("numpy", "float32")),
        (("numpy", "float32"), False, ("numpy", "float32")),
        *((choice, True, choice) for choice in SETTINGS),
    ],
)
def test_auto_is_the_fastest_that_there_is(choice, is_quantized, chosen):
    kernels, precision = choose(*choice, is_quantized)
    assert (kernels.__name__.removeprefix("tinylm.kernels."), precision) == chosen


def test_a_model_says_how_it_computes(tiny_config, tiny_tensors, tiny_quantized):
    """What `tinylm info` and the service show; a slow form would otherwise go unnoticed."""
    for kernels, precision in SETTINGS:
        model = Model(tiny_config, tiny_quantized, kernels, precision)
        words = model.arithmetic.split(", ")
        assert (words[0], words[-1], model.weight_type) == (kernels, precision, "int8")
        assert (emitter.dot_product() in words) == (kernels == "numba")
    with pytest.raises(ValueError, match=r"kernels is 'numba'.*float32"):
        Model(tiny_config, tiny_tensors, "numba")


WITHOUT_NUMBA = """
import sys, logging
sys.modules["numba"] = None
logging.basicConfig()
from tinylm import LLM, SamplingParams
for _ in range(2):
    llm = LLM("models/stories-8m")
print(llm.model.arithmetic)
print(llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=20))[0].text)
try:
    LLM("models/stories-8m", kernels="numba")
except ValueError as error:
    print(error)
"""


def test_without_numba_numpy_serves_and_says_so_once(stories_dir, greedy):
    """Where Numba can't be installed or imported, the package still works; slowly, which its log tells."""
    out, err = outcome(start_python(WITHOUT_NUMBA))
    arithmetic, text, *error = out.splitlines()
    assert arithmetic == "numpy, float32"
    expected = LLM(stories_dir, kernels="numpy").generate("Once upon a time", greedy)[0].text
    assert expected.startswith(text)
    assert re.match(r"kernels is 'numba': they can't be loaded here: .*numba", " ".join(error))
    assert err.count("using the numpy kernels") == 1, err


NOWHERE_TO_WRITE = """
from tinylm import LLM, SamplingParams
print(LLM("models/stories-8m").generate("Once upon a time", SamplingParams(temperature=0, max_tokens=20))[0].text)
"""


def test_where_nothing_can_be_written_it_still_serves(stories, tmp_path, greedy):
    """A read-only container, a user without a home: there is no place for compiled code to be kept."""
    shutil.copytree(ROOT / "tinylm", tmp_path / "tinylm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tinylm/kernels/numba/__pycache__").touch()  # a file where the folder would be: root can't either
    env = {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"}
    out, _ = outcome(start_python(NOWHERE_TO_WRITE, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1", **env))
    assert stories.generate("Once upon a time", greedy)[0].text.startswith(out.rstrip("\n"))


# --- on every CPU, and in many processes

ON_SOME_CPU = """
import sys
import numpy as np
from kernel_fixtures import computed_here
np.savez(sys.argv[1], **computed_here())
"""


def instruction_sets():
    """Forms of the dot product but AVX-512's, and the features that lead to them: as far as this CPU has them."""
    ours = emitter.cpu_features()
    plain = {feature for feature in ours if not feature.startswith(("avx512", "avx10", "avxvnni"))}
    sets = {"sse2": {"sse2"}, "avx2": plain | {"avx2"}, "avx-vnni": plain | {"avxvnni"}}
    return {form: features for form, features in sets.items() if features <= ours}


def as_env(features, cache):
    listed = ",".join(f"+{feature}" for feature in sorted(features))
    return {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": listed, "NUMBA_CACHE_DIR": str(cache)}


def test_every_instruction_set_computes_the_same(tmp_path):
    """Sums of products of bytes are exact in all of them: a CPU that lacks ours serves the same answers.

    Only the inverse in GELU is another with AVX-512, by the last bit: without it not a bit differs.
    """
    sets = instruction_sets()
    files = {form: tmp_path / f"{form}.npz" for form in sets}
    started = [
        start_python(ON_SOME_CPU, str(files[form]), **as_env(features, tmp_path / form))
        for form, features in sets.items()
    ]
    for process in started:
        outcome(process)
    ours, others = computed_here(), {form: dict(np.load(file)) for form, file in files.items()}
    for form, other in others.items():
        assert other["arithmetic"] == f"numba, {form}"
        errors = row_errors(other["layer"], ours["layer"])
        assert np.mean(errors < 1e-4) > 0.5
        assert errors.max() < 0.2
        assert scale_of(other["stories"] - ours["stories"]) < 0.02 * scale_of(ours["stories"])
        regret = ours["stories"].max(axis=1) - ours["stories"][np.arange(256), other["chosen"]]
        assert regret.max() < 0.1, "a greedy token that is none of ours, by more than a tie"
        for name in ("layer", "stories"):
            np.testing.assert_array_equal(other[name], next(iter(others.values()))[name])


SERVED = """
import json
from tinylm import LLM, SamplingParams
from tinylm.kernels.numba import steps
llm = LLM("models/stories-8m", 4, kernels="numba")
texts = [c.text for c in llm.generate(["Once upon a time", "The king"], SamplingParams(temperature=0, max_tokens=30))]
kept = [f.stats for f in vars(steps).values() if getattr(getattr(f, "stats", None), "cache_path", None)]
compiled, loaded = (sum(sum(getattr(s, n).values()) for s in kept) for n in ("cache_misses", "cache_hits"))
print(json.dumps({"texts": texts, "compiled": compiled, "loaded": loaded, "arithmetic": llm.model.arithmetic}))
"""


def test_processes_that_start_together_compile_once(stories_dir, tmp_path):
    """Four replicas on a fresh machine: else each would compile, all of them slowly. In the plainest CPU's code."""
    started = [start_python(SERVED, **as_env(set(), tmp_path)) for _ in range(4)]
    told = [json.loads(outcome(process)[0]) for process in started]
    assert sorted((t["compiled"] > 0, t["loaded"] > 0) for t in told) == [(False, True)] * 3 + [(True, False)]
    assert {t["arithmetic"] for t in told} == {"numba, portable, int8"}
    [texts] = {tuple(t["texts"]) for t in told}
    llm = LLM(stories_dir, 1, kernels="numba")
    for prompt, text in zip(["Once upon a time", "The king"], texts, strict=True):
        ids = llm.tokenizer.encode_document(prompt + text)
        n_prompt = len(llm.tokenizer.encode_document(prompt))
        assert llm.tokenizer.decode(ids[n_prompt:]) == text
        logits = llm.logits(ids)[n_prompt - 1 : -1]
        assert (logits.max(axis=1) - logits[np.arange(len(logits)), ids[n_prompt:]]).max() < 0.1


# --- memory

GROWTH = """
import sys
sys.modules["scipy"] = None  # which Numba loads where it is; serving does not install it
import json
import numpy as np
import tinylm.kernels.numba
from tinylm import SamplingParams
from tinylm.engine import Engine
from tinylm.llm import load

def memory_mb():
    with open("/proc/self/smaps_rollup") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in file if line.endswith("kB\\n")}
    return np.array([sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Rss"]])

imported = memory_mb()
model = load("models/stories-8m", "numba")[1]
engine, rng, length = Engine(model, n_slots=16), np.random.default_rng(0), model.config.context - 16
for _ in range(16):
    engine.submit(rng.integers(2, model.config.vocab_size, length).tolist(), SamplingParams(temperature=0))
while engine.has_work:
    engine.step()
print(json.dumps((memory_mb() - imported).tolist()), flush=True)
if sys.argv[1:] == ["stay"]:
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="tells its memory elsewhere")
def test_a_replica_is_small():
    """Weights, a full KV cache of 16 slots and the compiled code: many replicas fit on a small machine.

    Memory of its own, that is: pages of LLVM's library, which loading the code touches, are there once for all.
    """
    outcome(start_python(GROWTH))  # so that the code lies compiled on disk
    neighbour = start_python(GROWTH, "stay")  # as replicas have: what both have mapped is nobody's own
    try:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        own_mb, resident_mb = json.loads(outcome(start_python(GROWTH))[0])
    finally:
        neighbour.kill()
        neighbour.wait()
    assert own_mb < 60, f"a loaded engine added {own_mb:.1f} MB of its own ({resident_mb:.1f} MB resident)"
