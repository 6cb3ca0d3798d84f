"""The compiled kernels: the functions of `tinylm.kernels.protocol`, for int8 weights.

Precision "int8" rounds the input of each matmul to 8 bits with one scale a token, and keeps keys and values as 8 bits
with one scale for each head and token. Precision "float32" rounds nothing but the weights.

`layout` says how arrays lie in memory. `ops` and `sampling` compute, with the inner loops of `simd`, which `emitter`
builds. `steps` puts a step together. `jit` compiles functions and keeps their code on disk.
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
