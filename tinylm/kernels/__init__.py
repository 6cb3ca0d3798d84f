"""The transformer's arithmetic on arrays, one file per implementation, each with the same functions.

`numpy` is the readable reference, `numba` the same compiled. `tinylm.model` calls these functions and nothing below:

    prepare(config, tensors, precision) -> weights        the matrices, in the form that the others want
    make_cache(config, n_slots, precision) -> cache       room for keys and values, n_slots sequences of them
    make_scratch(config, n_tokens, n_rows) -> scratch     room for what a step computes on its way
    warm_up(weights, cache, scratch, batch) -> step       whatever would make the first step slow; `step` for these
    forward(weights, cache, scratch, batch, n_tokens, n_rows)   tokens through the model: fills batch.logits
    sample(scratch, batch, n_rows)                        logits to tokens: fills batch.chosen
    step(weights, cache, scratch, batch, n_tokens, n_rows)      forward, then sample
    copy_prefix(cache, source, target, n)                 the first n tokens' keys and values, slot to slot
    cache_bytes(cache), weight_bytes(weights), describe(), measure_peak()
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Literal, get_args

KernelName = Literal["auto", "numba", "numpy"]
Precision = Literal["auto", "int8", "float32"]

logger = logging.getLogger(__name__)


def choose(name: str, precision: str, quantized: bool) -> tuple[ModuleType, str]:
    """The kernels of that name and a precision that they have, for weights that are int8 (`quantized`) or float32.

    "auto" is numba with int8 arithmetic where it can be, else numpy in float32, where rounding would gain nothing.
    Raises ValueError for names that there are not, and for what can't be done with such weights.
    """
    for field, value, allowed in (("kernels", name, KernelName), ("precision", precision, Precision)):
        if value not in get_args(allowed):
            raise ValueError(f"{field} is {value!r}: it must be one of {', '.join(get_args(allowed))}")
    if not quantized:
        for field, value in (("kernels", name), ("precision", precision)):
            if value in ("numba", "int8"):
                raise ValueError(f"{field} is {value!r}: the model's weights are float32, which numpy computes with")
        return _load("numpy"), "float32"
    if name == "auto":
        name = "numba" if _numba_works() else "numpy"
    if precision == "auto":
        precision = "int8" if name == "numba" else "float32"
    return _load(name), precision


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"tinylm.kernels.{name}")
    except ImportError as error:
        raise ValueError(f"kernels is {name!r}, which can't be loaded here: {error}") from None


@cache
def _numba_works() -> bool:
    try:
        _load("numba")
    except ValueError as error:
        logger.warning("the numpy kernels serve, several times slower than compiled ones: %s", error)
        return False
    return True
