"""The compiled kernels: the functions of `tinylm.kernels.protocol`, for int8 weights.

Precision "int8" rounds the input of each matmul to 8 bits with one scale per token, and keeps keys and values as 8 bits
with one scale per head and token. Precision "float32" rounds only the weights.

`layout` defines the arrays. `ops` and `sampling` compute, with the inner loops of `simd` and `amx`, which `emitter`
builds. `steps` combines them to a step. `jit` compiles functions and keeps their code on disk.
"""

from tinylm.kernels.numba.layout import (
    cache_bytes,
    copy_prefix,
    make_cache,
    make_scratch,
    prepare,
    weight_bytes,
)
from tinylm.kernels.numba.steps import describe, forward, measure_peak, sample, step, warm_up

__all__ = [
    "cache_bytes",
    "copy_prefix",
    "describe",
    "forward",
    "make_cache",
    "make_scratch",
    "measure_peak",
    "prepare",
    "sample",
    "step",
    "warm_up",
    "weight_bytes",
]
