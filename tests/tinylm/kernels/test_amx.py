"""Matmuls with AMX tiles give the same bits as without, in every thread and fork, and only with Linux's permission."""

from __future__ import annotations

import json
import signal
import threading
import time
from functools import cache

import numpy as np
import pytest
from helpers.kernels import (
    Products,
    computed_here,
    extreme_tensors,
    logits_of,
    outcome,
    random_tensors,
    sampled_stories,
    start_python,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinylm import LLM, ModelConfig
from tinylm.kernels.numba import amx, emitter, make_cache, make_scratch, ops, prepare

needs_tiles = pytest.mark.skipif(not amx.permitted(), reason="this CPU has no AMX tiles, or Linux refuses them")
FORMS = [pytest.param(1, marks=needs_tiles, id="tiles"), pytest.param(amx.NEVER, id="vectors")]
CONFIGS = {  # the released model's matrices; inputs of 1, 2 and 5 tiles; matrices that do not fit tiles
    "real": ModelConfig(n_layers=1),
    "small": ModelConfig(vocab_size=130, hidden_size=128, n_layers=1, n_heads=2, mlp_size=320),
    "mixed": ModelConfig(vocab_size=65, hidden_size=64, n_layers=1, n_heads=2, mlp_size=100),
}


@cache
def products(name, extreme):
    return Products(CONFIGS[name], (extreme_tensors if extreme else random_tensors)(CONFIGS[name], seed=1))


# --- the same bits


@pytest.mark.parametrize("tile_tokens", FORMS)
@settings(max_examples=20)
@given(st.sampled_from(list(CONFIGS)), st.booleans(), st.integers(1, 200), st.integers(0, 2**32 - 1))
@example("real", True, 200, 0)
@example("real", True, 5, 0)
def test_products_are_exact(tile_tokens, name, extreme, n_tokens, seed):
    """For every matrix of a model and any number of tokens, also with the largest sums that bytes can have."""
    matrices = products(name, extreme)
    inputs = matrices.inputs(n_tokens, seed)
    for ours, expected in zip(matrices.compute(*inputs, tile_tokens), matrices.expected(*inputs), strict=True):
        np.testing.assert_array_equal(ours, expected)


@needs_tiles
@settings(max_examples=20)
@given(st.sampled_from(list(CONFIGS)), st.integers(1, 200), st.integers(0, 2**32 - 1), st.floats(-9, 9, width=32))
def test_added_products_have_the_same_bits(name, n_tokens, seed, before):
    matrices = products(name, extreme=False)
    inputs = matrices.inputs(n_tokens, seed)
    with_tiles, without = (matrices.compute(*inputs, tile_tokens, before) for tile_tokens in (1, amx.NEVER))
    for ours, theirs in zip(with_tiles, without, strict=True):
        np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))


@needs_tiles
def test_the_tiles_multiply():
    """Otherwise the other tests would compare vectors with vectors."""
    matrices = products("mixed", extreme=False)
    matrices.compute(*matrices.inputs(5, seed=0))
    assert any("tdpbusd" in code for code in ops.multiply_tiles.inspect_asm().values())
    assert amx.fewest_tokens() == amx.FEWEST_TOKENS


@needs_tiles
def test_attention_has_the_same_bits():
    """For parts of prompts that begin anywhere in a block of the cache, beside sequences that decode."""
    config, rng = ModelConfig(n_layers=1, context=80), np.random.default_rng(5)
    shape = prepare(config, random_tensors(config, seed=5), "int8").shape
    cache, scratch = make_cache(config, 3, "int8"), make_scratch(config, 120, 1)
    for array in cache[:4]:
        array[:] = rng.integers(0, 100, array.shape) if array.itemsize == 1 else rng.uniform(0, 0.1, array.shape)
    for begin, end in [(0, 80), (3, 20), (13, 19), (15, 33), (16, 32), (30, 31)]:
        positions = np.array([7, *range(begin, end), 79])
        slots = np.array([0, *[1] * (end - begin), 2])
        qkv = rng.normal(0, 1, scratch.wide.shape).astype(np.float32)
        outs = []
        for tile_tokens in (amx.FEWEST_TOKENS, amx.NEVER):
            settings, out = scratch._replace(tile_tokens=tile_tokens), np.zeros_like(scratch.normed)
            ops.attend_int8(qkv, len(slots), slots, positions, shape, cache, 0, settings, out)
            outs.append(out.view(np.int32))
        assert outs[0].any()
        np.testing.assert_array_equal(*outs)
    assert any("tdpbsud" in code for code in ops.attend_int8.inspect_asm().values()), "it compared vectors with vectors"


@needs_tiles
def test_code_without_amx_gives_the_same_bits(tmp_path):
    """The whole step, compiled for this CPU without AMX. Neither process loads the code that the other one keeps."""
    features = ",".join(f"+{name}" for name in sorted(emitter.cpu_features() - {"amx-int8"}))
    code = "import sys, numpy; from helpers.kernels import computed_here; numpy.savez(sys.argv[1], **computed_here())"
    outcome(start_python(code, str(tmp_path / "theirs.npz"), NUMBA_CPU_FEATURES=features))
    theirs, ours = np.load(tmp_path / "theirs.npz"), computed_here()
    assert (ours.pop("arithmetic"), theirs["arithmetic"]) == ("numba, avx512-vnni+amx", "numba, avx512-vnni")
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


@needs_tiles
def test_sampled_stories_are_the_same(stories, stories_dir, monkeypatch):
    """Fifty requests with prompts of 2 to 100 tokens, in batches that shrink from 16 to 1."""
    with_tiles = sampled_stories(stories, 50)
    monkeypatch.setattr(amx, "FEWEST_TOKENS", amx.NEVER)
    assert sampled_stories(LLM(stories_dir), 50) == with_tiles


# --- processes, threads and signals

STORIES = """
import json
from helpers.kernels import sampled_stories
from tinylm import LLM
llm = LLM("models/stories-8m")
print(json.dumps([llm.model.arithmetic, sampled_stories(llm, 12)]), flush=True)
"""
SMALL_SIGNAL_STACK = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(4096)  # a tile register alone has 1024 bytes, and there are 8
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 4096)), None) == 0
"""
FORK = """
import os
child = os.fork()
line = json.dumps([llm.model.arithmetic, sampled_stories(llm, 12)])
if child:
    assert os.waitpid(child, 0)[1] == 0  # both compute at once, but print one after the other: they share a pipe
print(line, flush=True)
"""


@needs_tiles
def test_without_permission_the_vectors_multiply(stories):
    """Linux refuses tiles to a process with a signal stack that is too small. The same compiled code then runs."""
    out, err = outcome(start_python(SMALL_SIGNAL_STACK + STORIES))
    assert json.loads(out) == ["numba, avx512-vnni, int8", sampled_stories(stories, 12)]
    assert err == ""


@needs_tiles
def test_a_forked_process_has_tiles(stories):
    out, _ = outcome(start_python(STORIES + FORK))
    expected = ["numba, avx512-vnni+amx, int8", sampled_stories(stories, 12)]
    assert [json.loads(line) for line in out.splitlines()] == [expected] * 3  # before the fork, and both after it


@needs_tiles
def test_threads_and_signals_keep_their_tiles(stories, tiny_model):
    """Four engines of two models run at once, while signals interrupt their threads inside of matmuls."""
    ids = np.random.default_rng(4).integers(0, 4096, (4, 60)).tolist()
    models = [stories.model, tiny_model] * 2
    expected = [logits_of(model, row) for model, row in zip(models, ids, strict=True)]
    stop, wrong, rounds = threading.Event(), [], [0] * 4

    def work(i):
        while not stop.is_set():
            if not np.array_equal(logits_of(models[i], ids[i]), expected[i]):
                wrong.append(i)
            rounds[i] += 1

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    try:
        for thread in threads:
            thread.start()
        for i in range(800):
            signal.pthread_kill(threads[i % 4].ident, signal.SIGUSR1)
            time.sleep(0.0005)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert min(rounds) > 0
    assert wrong == []
