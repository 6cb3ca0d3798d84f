"""Find the dot products of bytes that an ARM processor has, and tell Numba of them.

LLVM's list of the features of this processor, which Numba uses, lacks the dot products even of processors that LLVM
knows. Linux and macOS report them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target

ARCHITECTURES = ("aarch64", "arm64")  # Linux and macOS

# Feature of LLVM -> where Linux and macOS report it. Linux: "ELF HWCAPs" in the documentation of arm64, as the argument
# of getauxval and a bit of its result. macOS: a name of sysctl.
LINUX = {"dotprod": (16, 1 << 20), "i8mm": (26, 1 << 13)}
MACOS = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "i8mm": b"hw.optional.arm.FEAT_I8MM"}


def reported_features(system: str = sys.platform, architecture: str = platform.machine()) -> set[str]:
    """Return "dotprod" and "i8mm", in LLVM's names, if the system reports them. Return nothing on other processors."""
    if architecture in ARCHITECTURES:
        with suppress(OSError, AttributeError):  # this system lacks the function
            library = ctypes.CDLL(None)
            if system == "linux":
                return {name for name, (word, bit) in LINUX.items() if _hardware_word(library, word) & bit}
            if system == "darwin":
                return {name for name, variable in MACOS.items() if _is_set(library, variable)}
    return set()


def _hardware_word(library: Any, word: int) -> int:
    library.getauxval.argtypes, library.getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(library.getauxval(word))


def _is_set(library: Any, variable: bytes) -> bool:
    """Return whether a number of macOS's sysctl is there and not 0."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    return library.sysctlbyname(variable, ctypes.byref(value), ctypes.byref(size), None, 0) == 0 and value.value != 0


@cache
def code_generator() -> Any:
    """Return Numba's code generator for this process.

    Numba makes it once. If another library has compiled a function already, or if the user restricts the instructions,
    its features stay as they are.
    """
    features = reported_features()
    if not features or config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        return cpu_target.target_context.codegen()
    names = [get_host_cpu_features(), *(f"+{name}" for name in sorted(features))]
    config.CPU_FEATURES = ",".join(filter(None, names))
    try:
        return cpu_target.target_context.codegen()
    finally:
        config.CPU_FEATURES = None
