"""ARM processors get the same bits as this one. `make arm` runs the compiled code in QEMU, an emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers.kernels import ROOT, computed_here, outcome, sampled_stories, start_python

from tinylm import LLM
from tinylm.kernels.numba import arm, emitter

# --- without the processor


@pytest.mark.parametrize(("system", "architecture"), [("linux", "x86_64"), ("darwin", "x86_64"), ("win32", "arm64")])
def test_other_systems_and_processors_report_no_features(system, architecture):
    assert arm.reported_features(system, architecture) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has the function")
def test_a_system_without_the_function_reports_no_features():
    """Only macOS's C library has sysctlbyname."""
    assert arm.reported_features("darwin", "arm64") == set()


# The code of ARM's forms on this processor, with each instruction replaced by its definition in the ARM manual.
DEFINED = """
import re, sys
from functools import reduce
import numpy as np
from llvmlite import ir
from tinylm.kernels.numba import emitter
from tinylm.kernels.numba.emitter import Emitter, I32

form, file = sys.argv[1:]
emitter.dot_product = lambda: form
call = Emitter.call

def sums(e, products, n):
    parts = [e._shuffle(products, products, list(range(i, products.type.count, n))) for i in range(n)]
    return reduce(e.b.add, parts)

def defined(e, name, kind, *args):
    match = re.match(r"llvm.aarch64.neon.(\\w+)", name)
    if not match:
        return call(e, name, kind, *args)
    if match[1] == "saddlp":
        return sums(e, e.b.sext(args[0], ir.VectorType(I32, 8)), 2)
    total, *operands = args
    first = e.b.sext if match[1] == "sdot" else e.b.zext
    second = e.b.zext if match[1] == "udot" else e.b.sext
    a, b = (extend(x, ir.VectorType(I32, 16)) for extend, x in zip((first, second), operands))
    if match[1] == "usmmla":
        rows = [list(range(8)), list(range(8, 16))]
        a = e._shuffle(a, a, rows[0] + rows[0] + rows[1] + rows[1])
        b = e._shuffle(b, b, rows[0] + rows[1] + rows[0] + rows[1])
        return e.b.add(total, sums(e, e.b.mul(a, b), 8))
    return e.b.add(total, sums(e, e.b.mul(a, b), 4))

Emitter.call = defined
"""
PRODUCTS = """
from helpers.kernels import Products, computed_here, extreme_tensors, random_tensors
from tinylm import ModelConfig

odd = ModelConfig(vocab_size=65, hidden_size=36, n_layers=1, n_heads=2, mlp_size=100)  # odd numbers of four inputs
for config in (ModelConfig(n_layers=1), odd):
    for tensors in (random_tensors(config, 1), extreme_tensors(config, 1)):
        matrices = Products(config, tensors)
        for n_tokens in (1, 2, 3, 7):
            inputs = matrices.inputs(n_tokens, seed=n_tokens)
            for ours, expected in zip(matrices.compute(*inputs), matrices.expected(*inputs), strict=True):
                np.testing.assert_array_equal(ours, expected)
"""
SAVE = "np.savez(file, **computed_here())"
ARM_FORMS = [form for form in emitter.FORMS if form.startswith("neon")]


@pytest.mark.arm
@pytest.mark.parametrize("form", ARM_FORMS)
def test_matmuls_with_defined_instructions_equal_numpys(form, tmp_path):
    outcome(start_python(DEFINED + PRODUCTS, form, "", NUMBA_CACHE_DIR=str(tmp_path)), timeout_s=3600)


@pytest.mark.arm
@pytest.mark.parametrize("form", ARM_FORMS)
def test_a_step_with_defined_instructions_computes_the_same(form, tmp_path):
    file = tmp_path / "theirs.npz"
    outcome(start_python(DEFINED + PRODUCTS + SAVE, form, str(file), NUMBA_CACHE_DIR=str(tmp_path)), timeout_s=3600)
    theirs, ours = dict(np.load(file)), expected()[0]
    for name in ("layer", "stories", "chosen", "products"):
        np.testing.assert_array_equal(theirs[name], ours[name])


# --- in an emulator

# Processors of QEMU, and the form of dot products that each gets.
PROCESSORS = {"max": "neon-i8mm", "neoverse-n1": "neon-dotprod", "cortex-a72": "neon"}
REQUESTS = int(os.environ.get("ARM_REQUESTS", "40"))
STORIES = f"""
import json, sys
import numpy as np
{PRODUCTS}
from helpers.kernels import sampled_stories
from tinylm import LLM

np.savez(sys.argv[1], **computed_here())
print(json.dumps(sampled_stories(LLM("models/stories-8m", kernels="numba"), {REQUESTS})))
"""


@cache
def expected():
    return computed_here(), sampled_stories(LLM(ROOT / "models" / "stories-8m", kernels="numba"), REQUESTS)


def emulated(processor: str, code: str, *arguments: str, directory: Path) -> str:
    """Run Python code for ARM in QEMU, with the packages of `make arm`. Return its standard output."""
    root = Path(os.environ["ARM_ROOT"]).resolve()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "NUMBA_"))}
    env |= {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", root / "packages"))),
        "PYTHONPYCACHEPREFIX": str(root / "bytecode"),
        "NUMBA_CACHE_DIR": str(root / "kernels" / processor),
        "TMPDIR": str(directory),
    }
    python = [str(root / "root" / "usr" / "bin" / "python3"), "-c", code]
    command = ["qemu-aarch64", "-cpu", processor, "-L", str(root / "root"), *python, *arguments]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.arm
@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_emulated_processor_computes_the_same(processor, tmp_path):
    """There, products of bytes equal NumPy's. Logits, greedy tokens and stories equal those of this processor."""
    stories = json.loads(emulated(processor, STORIES, str(tmp_path / "theirs.npz"), directory=tmp_path))
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    ours, our_stories = expected()
    assert theirs.pop("arithmetic") == f"numba, {PROCESSORS[processor]}"
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name])
    assert stories == our_stories
