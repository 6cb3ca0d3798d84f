"""Attention and Muon's iteration on AMX tiles in bfloat16, for training: compiled from the C++ files beside this one.

A head of attention or a matrix of Muon is a task, and its intermediate results stay in a core's cache. Each thread
takes the next task when it is ready, because cores of a shared machine differ in speed. The results don't depend on
the threads.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.kernels.numba.amx import permitted
from tinylm.kernels.numba.emitter import cpu_features
from train.config import ConfigError

HEAD_DIM = 32
MULTIPLE = 32  # of tokens, and of a matrix's rows and columns
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "amx-tile", "amx-bf16")
OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
SOURCES = sorted(str(path) for path in Path(__file__).parent.glob("*.cpp"))


@cache
def library() -> ctypes.CDLL | None:
    """Compile the C++ files, which takes seconds, and load them. Return None without AMX, or if Linux refuses its use.

    The environment variable CXX names the compiler. Raises ConfigError if there is none, or if it fails.
    """
    if not (permitted() and cpu_features().issuperset(FEATURES)):
        return None
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "amx.so")
        compiler, options = os.environ.get("CXX", "g++"), [*OPTIONS, *(f"-m{name}" for name in FEATURES)]
        try:
            subprocess.run([compiler, *options, "-o", path, *SOURCES], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            advice = "set CXX to a working one, or run.compile=false"
            raise ConfigError(
                f"run.compile is true, but the C++ compiler {compiler!r} failed: {advice}\n{reason}"
            ) from None
        return ctypes.CDLL(path)


def _call(name: str, tensors: Sequence[Tensor], *sizes: int) -> None:
    """Call a function of the library with contiguous tensors and 64-bit numbers."""
    function = getattr(library(), name)
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *(ctypes.c_int64(size) for size in sizes))


@torch.library.custom_op("tinylm::attention", mutates_args=())
def attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention with rotary positions, (B, T, n_heads * 32) bfloat16, and (B, n_heads, T) float32.

    qkv: (B, T, 3 * n_heads * 32) bfloat16; a token's queries come first, then its keys and values. T: a multiple of 32.
    cos, sin: (T, 32) float32, from `rope_tables`. The second result is log2 of each softmax's sum; backward needs it.
    """
    rows, n, width = qkv.shape
    n_heads = width // (3 * HEAD_DIM)
    attended, logs = qkv.new_empty(rows, n, width // 3), cos.new_empty(rows, n_heads, n)
    _call("attention_forward", [qkv.contiguous(), cos, sin, attended, logs], rows, n, n_heads)
    return attended, logs


@attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rows, n, width = qkv.shape
    return qkv.new_empty(rows, n, width // 3), cos.new_empty(rows, width // (3 * HEAD_DIM), n)


@torch.library.custom_op("tinylm::attention_backward", mutates_args=())
def attention_backward(
    qkv: Tensor, cos: Tensor, sin: Tensor, attended: Tensor, logs: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of qkv from that of `attended`, (B, T, n_heads * 32) bfloat16."""
    rows, n, width = qkv.shape
    d_qkv = qkv.new_empty(qkv.shape)
    tensors = [qkv.contiguous(), cos, sin, attended, logs, gradient.contiguous(), d_qkv]
    _call("attention_backward", tensors, rows, n, width // (3 * HEAD_DIM))
    return d_qkv


@attention_backward.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, attended: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return attention_backward(*ctx.saved_tensors, gradient), None, None


attention.register_autograd(_gradients, setup_context=_save)


def newton_schulz(x: Tensor, coefficients: Sequence[float], steps: int) -> None:
    """Set x to a x + (b x x^T + c (x x^T)^2) x, `steps` times.

    x: (B, rows, columns) bfloat16, contiguous, with sizes that are multiples of 32. coefficients: a, b and c.
    """
    _call("newton_schulz", [x, torch.tensor(coefficients)], *x.shape, steps)
