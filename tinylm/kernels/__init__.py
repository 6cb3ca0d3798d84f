"""The transformer's arithmetic on arrays: a readable implementation (`numpy`) and a fast one (`numba`).

`protocol` lists the functions that both have. This module imports neither of them, so that it loads without NumPy.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tinylm.kernels.protocol import Kernels

KernelName = Literal["auto", "numba", "numpy"]
Precision = Literal["auto", "int8", "float32"]

logger = logging.getLogger(__name__)


def choose(name: str, precision: str, quantized: bool) -> tuple[Kernels[Any, Any, Any], str]:
    """Return the kernels of that name and the precision that they compute with.

    quantized: whether the model's weights are int8; they are float32 otherwise. "auto" means numba with int8 arithmetic
    if Numba works here and the weights are int8, and numpy with float32 arithmetic otherwise.
    Raise ValueError for an unknown name or precision, or if these weights don't allow it.
    """
    for field, value, allowed in (("kernels", name, KernelName), ("precision", precision, Precision)):
        if value not in get_args(allowed):
            raise ValueError(f"{field} is {value!r}: it must be one of {', '.join(get_args(allowed))}")
    if not quantized:
        for field, value, only in (("kernels", name, "numpy"), ("precision", precision, "float32")):
            if value not in ("auto", only):
                raise ValueError(
                    f"{field} is {value!r}: it must be auto or {only}, since the model's weights are float32"
                )
        return _load("numpy"), "float32"
    if name == "auto":
        name = "numba" if _numba_works() else "numpy"
    if precision == "auto":
        precision = "int8" if name == "numba" else "float32"
    return _load(name), precision


def _load(name: str) -> Kernels[Any, Any, Any]:
    try:
        if name == "numba":
            from tinylm.kernels import numba

            return numba
        from tinylm.kernels import numpy

        return numpy
    except ImportError as error:
        raise ValueError(f"kernels is {name!r}: they can't be loaded here: {error}") from None


@cache
def _numba_works() -> bool:
    try:
        _load("numba")
    except ValueError as error:
        logger.warning("using the numpy kernels, which are several times slower than the compiled ones: %s", error)
        return False
    return True
