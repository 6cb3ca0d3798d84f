"""Limit the threads of NumPy's matrix library (BLAS) while a function runs.

The number of BLAS threads belongs to the process, so this module keeps the limits of all threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")

_lock = threading.Lock()
_limits: dict[int, int] = {}  # thread id -> the limit that this thread needs
_before: list[tuple[Any, int]] = []  # each library, and its number of threads before the first limit


def _after_fork() -> None:
    """Forget the other threads in a forked child: they exist only in the parent."""
    global _lock
    _lock = threading.Lock()
    _limits.clear()


os.register_at_fork(after_in_child=_after_fork)


def run_limited(n_threads: int, function: Callable[[], T]) -> T:
    """Call `function` with at most `n_threads` BLAS threads and return what it returns.

    Several threads may do this at once: the lowest limit applies to all, and the last thread that returns restores the
    number from before. Calls by one thread must not be nested.
    """
    try:
        try:
            _enter(n_threads)
            return function()
        finally:
            _leave()
    finally:
        _leave()  # again: a second Ctrl-C can interrupt the first


def _enter(n_threads: int) -> None:
    with _lock:
        if not _limits:
            _before[:] = [(library, library.num_threads) for library in _libraries()]
        _limits[threading.get_ident()] = n_threads
        _apply(min(_limits.values()))


def _leave() -> None:
    this = threading.get_ident()
    if this not in _limits:
        return
    with _lock:
        _apply(min((limit for thread, limit in _limits.items() if thread != this), default=None))
        _limits.pop(this, None)  # last, so that an interrupted call can be repeated


def _apply(limit: int | None) -> None:
    """Set the limit in all libraries; None restores the numbers from before."""
    for library, n_before in _before:
        # Since threadpoolctl 3.8, only the thread that first limited OpenBLAS can change the number until that thread
        # ends. Here any thread may be the last one, which must restore the number.
        release = getattr(library, "clear_controlling_thread", _nothing)
        release(force=True)
        library.set_num_threads(n_before if limit is None else limit)
        release(force=True)


def _nothing(force: bool) -> None:
    pass


@cache
def _libraries() -> list[Any]:
    return ThreadpoolController().select(user_api="blas").lib_controllers
