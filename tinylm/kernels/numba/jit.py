"""Compile functions, and keep machine code on disk.

Numba keeps the code of a step in NUMBA_CACHE_DIR, beside the module that defines it, or in the user's cache directory,
for each kind of processor. If it can write to none of these, this module offers the user's temporary directory. Numba
discards the code when that module changes, but it ignores changes of the other modules that the step calls. So the step
has `SOURCES`, a hash of all these modules, as a closure variable, which Numba compares too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock
from numba import njit
from numba.core import config
from numba.core.caching import NullCache

from tinylm.kernels import batch
from tinylm.kernels.sharing import private_directory

logger = logging.getLogger(__name__)

# No GIL, no check for division by zero, and no reference counts of arrays (`_nrt`). Compiled code allocates no array,
# and counting the references to all arrays of a step takes time in each call of a compiled function.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}
# For a user without a home. In its place, Numba would make a directory with the name "~" in the working directory.
WITHOUT_HOME = "UserProvidedCacheLocator,InTreeCacheLocator"
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function when it is first called, for the types that it is called with."""
    return cast(Function, njit(**OPTIONS)(function))


def kept_on_disk(function: Callable[..., None]) -> Any:
    """Compile a function like `compiled`, and keep its machine code on disk. Return Numba's dispatcher."""
    has_home = "XDG_CACHE_HOME" in os.environ or Path(os.path.expanduser("~")).is_absolute()  # noqa: PTH111  (no error)
    try:
        if has_home or config.CACHE_LOCATOR_CLASSES:
            return _kept(function)
        return _kept(function, CACHE_LOCATOR_CLASSES=WITHOUT_HOME)
    except RuntimeError as error:  # Numba finds no directory that it can write to
        with suppress(OSError, RuntimeError):
            return _kept(function, CACHE_DIR=str(private_directory()))
        _report(os.environ.get("NUMBA_CACHE_DIR", "the user's cache directory"), str(error))
        return njit(**OPTIONS)(function)


def _kept(function: Callable[..., None], **settings: str) -> Any:
    """Return a dispatcher that keeps its machine code on disk. Raise RuntimeError if there is no directory for it.

    settings: of Numba, only while it chooses the directory.
    """
    before = {name: getattr(config, name) for name in settings}
    vars(config).update(settings)
    try:
        return njit(cache=True, **OPTIONS)(function)
    finally:
        vars(config).update(before)


def compile_or_load(dispatcher: Any, *arguments: Any) -> Callable[..., None]:
    """Compile or load a function that `kept_on_disk` returned by a call, and return its machine code.

    Compiling takes about ten seconds. With a file lock, the first of several processes compiles and the others load.
    The returned function accepts only arguments of these types and does not check them. This saves the 10 us that a
    dispatcher takes per call.

    This replaces a damaged file in the cache. If the cache cannot be used (a full disk, no write permission), it logs
    one warning and compiles without the cache.
    """
    directory = dispatcher.stats.cache_path
    if directory is None:
        dispatcher(*arguments)
    else:
        try:
            with FileLock(Path(directory) / "tinylm.lock"):
                _compile_into_cache(dispatcher, arguments)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            _report(directory, f"{type(error).__name__}: {error}")
            dispatcher._cache = NullCache()  # Numba 0.68 has no public way to drop a dispatcher's cache
            dispatcher(*arguments)
    types = tuple(map(dispatcher.typeof_pyval, arguments))
    return cast(Callable[..., None], dispatcher.overloads[types].entry_point)


def _compile_into_cache(dispatcher: Any, arguments: tuple[Any, ...]) -> None:
    """Call a function once. If that fails, delete the cache's index.

    Numba writes the index first. On a full disk, the index would then describe code that was not written, and the next
    process would run the code of an earlier version.
    """
    index = Path(dispatcher._cache._cache_file._index_path)
    try:
        dispatcher(*arguments)
    except (OSError, KeyboardInterrupt):
        index.unlink(missing_ok=True)
        raise
    except Exception:  # a damaged file causes many kinds of errors
        index.unlink(missing_ok=True)
        dispatcher(*arguments)


@cache
def _report(directory: str, reason: str) -> None:
    """Log, once per process, that there is no cache."""
    logger.warning(
        "cannot keep compiled kernels in %s (%s), so every process compiles them. Free some space, remove that "
        "directory, or set NUMBA_CACHE_DIR to another directory",
        directory,
        reason,
    )


def hash_of(files: list[Path]) -> str:
    """Return a hash of the content of these files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


SOURCES = hash_of([Path(batch.__file__), *sorted(Path(__file__).parent.glob("*.py"))])
