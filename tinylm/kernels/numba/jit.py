"""How functions are compiled, and how machine code is kept on disk.

Numba keeps the code of a step beside the module that defines it, or in NUMBA_CACHE_DIR, per kind of processor. It
discards the code when that module changes, but it does not look at the modules that are compiled into the step. So
`SOURCES`, a hash of all of them, is a closure variable of the step: Numba compares those too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock
from numba import njit
from numba.core.caching import NullCache

from tinylm.kernels import batch

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # no GIL, and no check for division by zero
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function when it is first called, for the types that it is called with."""
    return cast(Function, njit(**OPTIONS)(function))


def kept_on_disk(function: Callable[..., None]) -> Any:
    """Compile a function like `compiled`, and keep its machine code on disk. Return Numba's dispatcher."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # Numba finds no directory that it can write to: each process compiles for itself
        return njit(**OPTIONS)(function)


def compile_or_load(dispatcher: Any, *arguments: Any) -> Callable[..., None]:
    """Call a function that `kept_on_disk` returned, so that it is compiled or loaded, and return its machine code.

    Compiling takes some ten seconds. A file lock makes processes that start together take turns, so that the first one
    compiles and the others load. The returned function accepts arguments of these types only and does not check them,
    which saves the 10 us that a dispatcher takes per call.

    A cache that cannot be used (a full disk, a directory without write permission, a damaged file) is reported once
    per process. The process then goes on without it.
    """
    directory = dispatcher.stats.cache_path
    try:
        with FileLock(Path(directory) / "tinylm.lock") if directory else nullcontext():
            dispatcher(*arguments)
    except Exception as error:
        if not directory:
            raise
        logger.warning(
            "cannot keep compiled kernels in %s (%s: %s): this process compiles them for itself. Free some space, "
            "remove that directory, or set NUMBA_CACHE_DIR to another one",
            directory, type(error).__name__, error,
        )  # fmt: skip
        dispatcher._cache = NullCache()  # Numba 0.68 has no public way to drop a dispatcher's cache
        dispatcher(*arguments)
    types = tuple(map(dispatcher.typeof_pyval, arguments))
    return cast(Callable[..., None], dispatcher.overloads[types].entry_point)


def hash_of(files: list[Path]) -> str:
    """Return a hash of the content of these files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


SOURCES = hash_of([Path(batch.__file__), *sorted(Path(__file__).parent.glob("*.py"))])
