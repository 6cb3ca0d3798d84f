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
from helpers.kernels import ROOT, computed_here, sampled_stories

from tinylm import LLM
from tinylm.kernels.numba import arm

# --- without the processor


@pytest.mark.parametrize(("system", "architecture"), [("linux", "x86_64"), ("darwin", "x86_64"), ("win32", "arm64")])
def test_other_systems_and_processors_report_no_features(system, architecture):
    assert arm.reported_features(system, architecture) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has the function")
def test_a_system_without_the_function_reports_no_features():
    """Only macOS's C library has sysctlbyname."""
    assert arm.reported_features("darwin", "arm64") == set()


# --- in an emulator

# Processors of QEMU, and the form of dot products that each gets.
PROCESSORS = {"max": "neon-i8mm", "neoverse-n1": "neon-dotprod", "cortex-a72": "neon"}
REQUESTS = int(os.environ.get("ARM_REQUESTS", "40"))
STORIES = f"""
import json, sys
import numpy as np
from helpers.kernels import Products, computed_here, extreme_tensors, random_tensors, sampled_stories
from tinylm import LLM, ModelConfig

odd = ModelConfig(vocab_size=65, hidden_size=36, n_layers=1, n_heads=2, mlp_size=100)
for config in (ModelConfig(n_layers=1), odd):
    for tensors in (random_tensors(config, 1), extreme_tensors(config, 1)):
        matrices = Products(config, tensors)
        for n_tokens in (1, 2, 3, 7):
            inputs = matrices.inputs(n_tokens, seed=n_tokens)
            for ours, expected in zip(matrices.compute(*inputs), matrices.expected(*inputs), strict=True):
                np.testing.assert_array_equal(ours, expected)
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
