"""Compiled code for several kinds of processors, and the memory that it needs."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.kernels import computed_here, outcome, row_errors, scale_of, start_python

from tinylm.kernels.numba import emitter, simd
from tinylm.kernels.numba.emitter import BYTES, FORMS, I64, INTS, LANES
from tinylm.kernels.numba.jit import compiled
from tinylm.kernels.numba.layout import CACHE_LINE, HUGE_PAGE, aligned_zeros

# --- kinds of processors

SAVE = "import sys, numpy; from helpers.kernels import computed_here; numpy.savez(sys.argv[1], **computed_here())"


def instruction_sets():
    """Return the forms of the step to compile, besides AVX-512's, that this CPU can run, and their features."""
    ours = emitter.cpu_features()
    plain = {feature for feature in ours if not feature.startswith(("avx512", "avx10", "avxvnni"))}
    sets = {"sse2": {"sse2"}, "avx2": plain | {"avx2"}, "avx-vnni": plain | {"avxvnni"}}
    return {form: features for form, features in sets.items() if features <= ours}


@pytest.mark.parametrize("form", FORMS)
def test_every_dot_product_is_exact(form, monkeypatch):
    if not FORMS[form] <= emitter.cpu_features():
        pytest.skip("this CPU lacks the instructions")
    monkeypatch.setattr(emitter, "dot_product", lambda: form)

    @emitter.intrinsic()
    def emit(e, unsigned, signed, out, centered):
        plain, less = e.totals(e.sums, 2)
        for i in (0, 4 * LANES):
            operands = [e.load(array, I64(i), BYTES) for array in (unsigned, signed)]
            e.b.store(e.dot(e.b.load(plain), *operands), plain)
            e.b.store(e.dot_centered(e.b.load(less), *operands), less)
        e.store(e.folded(e.b.load(plain)), out, I64(0))
        excess = e.excess(e.load(centered, I64(0), INTS))
        e.store(e.b.sub(e.folded(e.b.load(less)), excess), centered, I64(0))

    @compiled
    def dot(unsigned, signed, out, centered):
        emit(unsigned, signed, out, centered)

    rng = np.random.default_rng(1)
    unsigned = np.append(rng.integers(0, 256, 96), [255] * 32).astype(np.uint8)
    signed = np.append(rng.integers(-128, 128, 96), [-128, 127] * 16).astype(np.int8)
    out, signed_sums = np.zeros(LANES, np.int32), signed.reshape(2, LANES, 4).sum(axis=(0, 2), dtype=np.int32)
    centered = 128 * signed_sums  # what `dot_centered` may leave to subtract
    dot(unsigned, signed, out, centered)
    products = (unsigned.astype(int) * signed.astype(int)).reshape(2, LANES, 4).sum(axis=(0, 2))
    np.testing.assert_array_equal(out, products)
    np.testing.assert_array_equal(centered, products - 128 * signed_sums)


def test_every_instruction_set_computes_the_same(tmp_path):
    """All forms but AVX-512's give the same bits. The last bit of AVX-512's division in GELU may differ."""
    files = {form: tmp_path / f"{form}.npz" for form in instruction_sets()}
    processes = []
    for form, features in instruction_sets().items():
        env = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features)}
        processes.append(start_python(SAVE, str(files[form]), **env, NUMBA_CACHE_DIR=str(tmp_path / form)))
    for process in processes:
        outcome(process)
    ours, others = computed_here(), {form: dict(np.load(file)) for form, file in files.items()}
    for form, other in others.items():
        assert other["arithmetic"] == f"numba, {form}"
        np.testing.assert_array_equal(other["products"], ours["products"])
        for name in ("layer", "stories"):
            np.testing.assert_array_equal(other[name], next(iter(others.values()))[name])
    errors = row_errors(other["layer"], ours["layer"])
    assert np.mean(errors < 1e-4) > 0.5
    assert errors.max() < 0.2
    assert scale_of(other["stories"] - ours["stories"]) < 0.02 * scale_of(ours["stories"])
    lost = ours["stories"].max(axis=1) - ours["stories"][np.arange(256), other["chosen"]]
    assert lost.max() < 0.1, "a greedy token that is not the most likely one here"


@pytest.mark.skipif(not FORMS["avx2"] <= emitter.cpu_features(), reason="this CPU lacks the instructions")
def test_the_peak_multiplies_for_each_sum(monkeypatch):
    """A compiler computes equal products once. The peak would then be one of additions."""
    monkeypatch.setattr(emitter, "dot_product", lambda: "avx2")

    @compiled
    def rounds(n, out):
        return simd.multiply_adds(n, out)

    n_products = rounds(3, np.arange(LANES, dtype=np.int32))
    (assembly,) = rounds.inspect_asm().values()
    assert len(re.findall(r"pmaddwd\t|vpdpwssd\t", assembly)) >= n_products / 16  # the second one also adds


# --- memory


@pytest.mark.parametrize("size", [1, 1000, HUGE_PAGE + 1])
@pytest.mark.parametrize("has_huge_pages", [True, False])
def test_arrays_begin_on_a_cache_line_with_and_without_huge_pages(size, has_huge_pages, monkeypatch):
    """macOS has no huge pages to ask for."""
    if not has_huge_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    array = aligned_zeros((size,), np.float32)
    assert array.ctypes.data % CACHE_LINE == 0
    assert array.shape == (size,)
    assert not array.any()
    array[:] = 1


GROWTH = """
import sys
sys.modules["scipy"] = None  # Numba loads SciPy if it is installed, and serving does not install it
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


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc of Linux")
def test_an_engine_with_16_full_slots_needs_60_mb(stories):
    """Weights, KV cache and compiled code, without pages that processes share, such as LLVM's library."""
    neighbour = start_python(GROWTH, "stay")  # the other process, which shares these pages
    try:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        own_mb, resident_mb = json.loads(outcome(start_python(GROWTH))[0])
    finally:
        neighbour.kill()
        neighbour.wait()
    assert own_mb < 60, f"a loaded engine added {own_mb:.1f} MB of its own ({resident_mb:.1f} MB resident)"
